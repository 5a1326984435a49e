"""Two ranks take the steps that one would take, share one run folder, stop together, and go on together."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mistral_nb.config import TrainConfig
from mistral_nb.run import Run
from mistral_nb.train.folder import RunFolder
from mistral_nb.train.folder import read_jsonl
from mistral_nb.train.folder import read_status
from mistral_nb.train.launch import Launched
from mistral_nb.train.launch import LaunchError
from mistral_nb.train.launch import launch
from mistral_nb.train.trainer import fit
from mistral_nb.weights.tensors import SafetensorsFile
from tiny_run import make_config
from tiny_run import make_model

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="trees are guarded through Linux's subreaper")

MODELS = {"dense": {}, "moe": {"moe": {"num_experts": 3, "num_experts_per_tok": 2}}}
KINDS  = {"lora": {}, "full": {"lora__enable": False, "optim__lr": 0.001, "save_adapters": False}}

# All settings in one pair of processes, for each import of torch costs seconds. How float32 is multiplied is otherwise
# chosen by a look at the clock, and two runs compared bit for bit must choose the same.
ALL = """
import json, os, sys, time
import torch
from mistral_nb.config import TrainConfig
from mistral_nb.train import trainer
from mistral_nb.train.distributed import joined
from mistral_nb.train.launch import told
from mistral_nb.train.trainer import fit_rank
def work():
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("medium")
    cfg, real = TrainConfig.load(sys.argv[-1]), trainer.seed_step
    trainer.seed_step = lambda *a: time.sleep(float(os.environ.get("SLOW", 0))) or real(*a)
    with joined(torch.device("cpu")) as ranks:
        for path in json.load(open(cfg.run_dir + ".json")): fit_rank(ranks, TrainConfig.load(path), ranks.device)
sys.exit(told(work))
"""


@pytest.fixture(scope="module", autouse=True)
def quiet() -> None:
    patch = pytest.MonkeyPatch()
    for name, value in {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "CUDA_VISIBLE_DEVICES": ""}.items():
        patch.setenv(name, value)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ranks")
    for name, changes in MODELS.items(): make_model(path / name, **changes)
    (path / "all.py").write_text(ALL)
    return path


def config(home: Path, name: str, world: int, model: str = "dense", **changes) -> TrainConfig:
    """Settings with four sequences in a step, whatever the number of ranks."""
    return make_config(home / model, home, name, num_microbatches=4 // world // 2,
                       **{"max_steps": 20, "batch_size": 2, "no_eval": False, "eval_freq": 10} | changes)


def together(home: Path, configs: list[TrainConfig], name: str = "all", **options) -> Launched:
    """Run them one after the other with two ranks."""
    paths = [str(cfg.save(home / f"{name}{i}.yaml")) for i, cfg in enumerate(configs)]
    (home / f"{name}.json").write_text(json.dumps(paths))
    cfg = TrainConfig(model_id_or_path="none", run_dir=str(home / name))
    return launch(cfg, nproc_per_node=2, program=[home / "all.py"], **options)


def kill_second(folder: RunFolder) -> None:
    """kill -9 for one of the two."""
    os.kill(json.loads((folder.path / ".ranks" / "rank1.json").read_text())["pid"], signal.SIGKILL)


def shell(config: Path) -> subprocess.CompletedProcess:
    """The command as a user types it; `torchrun` is short for this module."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    return subprocess.run([*torchrun, "-m", "mistral_nb.train", config], capture_output=True, text=True, timeout=120)


def until(true: Callable[[], object], seconds: float = 120) -> object:
    end = time.monotonic() + seconds
    while not (value := true()):
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)
    return value


def numbers(folder: Path, tag: str, *names: str) -> torch.Tensor:
    return torch.tensor([[r[name] for name in names] for r in read_jsonl(RunFolder(folder).metrics(tag))])


def weights(folder: Path) -> dict[str, torch.Tensor]:
    file = SafetensorsFile(max((folder / "checkpoints").glob("*/consolidated/*.safetensors")))
    return {name: file.read(name) for name in file.entries}


CASES = [(model, kind) for model in MODELS for kind in KINDS]


@pytest.fixture(scope="module")
def pairs(home: Path) -> Path:
    """Every case with one rank and with two."""
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("medium")
    for model, kind in CASES: fit(config(home, f"{model}-{kind}-1", 1, model, **KINDS[kind]), CPU)
    torch.set_float32_matmul_precision("highest")
    together(home, [config(home, f"{model}-{kind}-2", 2, model, **KINDS[kind]) for model, kind in CASES]).wait(120)
    return home


@pytest.mark.parametrize(("model", "kind"), CASES)
def test_two_ranks_equal_one(pairs: Path, model: str, kind: str) -> None:
    one, two = (pairs / f"{model}-{kind}-{world}" for world in (1, 2))
    for tag, names in [("train", ("step", "loss", "lr", "grad_norm")), ("eval", ("step", "eval_loss", "eval_tokens"))]:
        a, b = numbers(one, tag, *names), numbers(two, tag, *names)
        assert len(a) == (20 if tag == "train" else 2)
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    a, b = weights(one), weights(two)
    assert set(a) == set(b)
    for name in a: torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-5)
    assert read_status(RunFolder(two))["state"] == "finished" and not (two / ".ranks").exists()
    assert "on 2 × CPU" in Run(two).folder.log.read_text()


def test_stopped_killed_and_gone_on_with(pairs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stop saves at one step for all, a killed rank ends the job with its name, and the end has the same bits."""
    cfg    = config(pairs, "broken", 2, ckpt_freq=4)
    folder = RunFolder(cfg.run_dir)
    steps  = lambda: len(read_jsonl(folder.metrics("train")))
    monkeypatch.setenv("SLOW", "0.1")

    run = together(pairs, [cfg], "one")
    until(lambda: steps() >= 3 or not run.running)
    run.stop(timeout=120)
    status = read_status(folder)
    assert run.returncode == 0 and status["state"] == "interrupted" and status["step"] == steps() < 20, run.output
    assert [path.name for path in Run(folder.path).checkpoints][-1] == f"checkpoint_{status['step']:06d}"

    run = together(pairs, [cfg], "two")
    until(lambda: steps() >= status["step"] + 3 or not run.running)
    kill_second(folder)
    with pytest.raises(LaunchError, match=r"rank 1 failed: process \d+ was ended by SIGKILL"): run.wait(120, show=False)
    status = read_status(folder)
    assert status["state"] == "failed" and status["reason"].startswith("rank 1 (process"), status

    run = together(pairs, [cfg], "three", max_restarts=1) # torchrun itself starts both again
    until(lambda: steps() >= 12 or not run.running)
    kill_second(folder)
    run.wait(120)
    assert run.returncode == 0 and run.failure is None
    whole = pairs / "dense-lora-2"
    assert read_status(folder)["state"] == "finished"
    for tag, names in [("train", ("step", "loss", "grad_norm")), ("eval", ("step", "eval_loss"))]:
        assert torch.equal(numbers(folder.path, tag, *names), numbers(whole, tag, *names))
    a, b = weights(folder.path), weights(whole)
    assert all(torch.equal(a[name], b[name]) for name in b)


def test_the_command_of_a_shell(home: Path) -> None:
    done = shell(config(home, "shell", 2, max_steps=2, no_eval=True).save(home / "shell.yaml"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("finished after 2 of 2 steps") == 1, "only the first rank speaks"


def test_a_mistake_is_told_once(home: Path) -> None:
    cfg = config(home, "mistake", 2, data__instruct_data=str(home / "none.jsonl"))
    with pytest.raises(LaunchError, match="rank 0 failed: .*none.jsonl") as failed:
        launch(cfg, nproc_per_node=2).wait(120, show=False)
    assert not (home / "mistake").exists() and "RankLost" not in str(failed.value)
