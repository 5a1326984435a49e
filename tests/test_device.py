"""Choices for machines that are not at hand: GPUs with and without bfloat16, CPUs whose fast products are not exact."""

import pytest
import torch

from mistral_nb import device
from mistral_nb.device import DeviceError
from mistral_nb.device import Float32Check
from mistral_nb.device import Memory

GPU = torch.device("cuda", 0)


def pretend(monkeypatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda d: "Tesla T4")


def test_old_gpu(monkeypatch):
    pretend(monkeypatch, (7, 5))
    assert device.compute_dtype("auto", GPU) == torch.float16 == device.compute_dtype("float16", GPU)
    with pytest.raises(DeviceError, match="Tesla T4 has no bfloat16; use `dtype: auto` or float16"):
        device.compute_dtype("bfloat16", GPU)


def test_new_gpu(monkeypatch):
    pretend(monkeypatch, (9, 0))
    assert device.compute_dtype("auto", GPU) == torch.bfloat16 and device.compute_dtype("float32", GPU) == torch.float32


def test_each_process_has_its_own_gpu(monkeypatch):
    pretend(monkeypatch, (9, 0))
    for name, value in {"RANK": "11", "WORLD_SIZE": "16", "LOCAL_RANK": "3"}.items(): monkeypatch.setenv(name, value)
    assert (device.rank(), device.world_size(), device.default_device()) == (11, 16, torch.device("cuda", 3))


def test_gpu_memory_is_torchs(monkeypatch):
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda d: 5)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda d: 7)
    assert device.memory(GPU) == Memory(5, 7)


@pytest.fixture
def precision():
    device.check_float32.cache_clear()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)
    device.check_float32.cache_clear()


@pytest.mark.parametrize(("error", "seconds", "choice"), [
    (3e-7, 0.5, "medium"), (3e-7, 1.02, "medium"), (3e-7, 1.2, "highest"), (2e-3, 0.1, "highest"),
    (3e-4, 0.1, "highest")])
def test_fast_products_only_where_exact(monkeypatch, precision, error, seconds, choice):
    monkeypatch.setattr(device, "product_error", lambda p, a, b: error if p == "medium" else 2e-7)
    monkeypatch.setattr(device, "product_seconds", lambda p, a, b: seconds if p == "medium" else 1.0)
    assert device.fast_float32() == choice
    said = device.use_fast_float32(torch.device("cpu"))
    assert torch.get_float32_matmul_precision() == choice and f"float32 products: {choice}" in said


def test_the_look_itself(precision):
    found = device.check_float32()
    assert isinstance(found, Float32Check) and found.errors[0] < 1e-6
    assert found.precision == "highest" or found.errors[1] <= 4 * found.errors[0]
    assert torch.get_float32_matmul_precision() == "highest"  # measuring changes nothing


def test_a_gpu_is_never_given_tf32(precision):
    assert "left as it is on cuda" in device.use_fast_float32(GPU) and torch.get_float32_matmul_precision() == "highest"


def test_without_proc(monkeypatch):
    def missing(*args, **kwargs): raise FileNotFoundError
    monkeypatch.setattr(device.Path, "read_text", missing)
    assert device.memory(torch.device("cpu")).peak > 0
    monkeypatch.setattr(device.Path, "write_text", missing)
    device.reset_peak(torch.device("cpu"))
