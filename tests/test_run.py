"""The handle on a run: while another process writes it, in a real notebook kernel, and with its weights."""

import json
import os
import queue
import subprocess
import sys
import time
from pathlib import Path

import jupyter_client
import pytest
import torch

from mistral_nb.run import Run
from mistral_nb.run import train
from mistral_nb.train import trainer
from mistral_nb.train.folder import RunFolderError
from tiny_run import make_config
from tiny_run import make_model

CPU = torch.device("cpu")
IDS = torch.arange(3, 20)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def done(model_dir, tmp_path_factory) -> tuple[Run, torch.Tensor]:
    """A finished run, and the logits of the model as the trainer left it."""
    models, save = [], trainer.save_adapter
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "save_adapter", lambda model, *rest: (models.append(model), save(model, *rest)))
        run = train(make_config(model_dir, tmp_path_factory.mktemp("done"), ckpt_freq=3, no_eval=False, eval_freq=3,
                                max_steps=12), device=CPU)
    return run, logits(models[-1])


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval().logits(model(IDS, [6, 11]))


def test_numbers(done):
    run, _ = done
    assert run.status["state"] == "finished" and run.config.max_steps == 12
    assert list(run.metrics["step"]) == list(range(1, 13)) and list(run.eval_metrics["step"]) == [3, 6, 9, 12]
    assert {"loss", "lr", "grad_norm", "wps", "avg_wps", "eta_in_seconds", "peak_allocated_mem"} <= set(run.metrics)
    assert [c.name[-2:] for c in run.checkpoints] == ["06", "09", "12"]
    assert run.adapter == run.checkpoints[-1] / "consolidated" / "lora.safetensors"
    assert set(run.curve.series) == {"train loss", "eval loss"}


def test_shown(done, tmp_path):
    run, _ = done
    page = run._repr_html_()
    assert "<svg" in page and "finished" in page and "12 of 12" in page and "perplexity" in page
    run.plot().savefig(tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes()[:4] == b"\x89PNG" and run.plot()._repr_png_()[:4] == b"\x89PNG"
    assert "finished" in repr(run) and str(run.path) in repr(run)


def test_loads_what_was_trained(done, monkeypatch, tmp_path):
    run, trained = done
    model, tokenizer = run.load(device=CPU)
    torch.testing.assert_close(logits(model), trained)
    assert not model.training and tokenizer.instruct_tokenizer.tokenizer.n_words == 32768
    earlier = [logits(run.load(which, device=CPU)[0]) for which in (6, "checkpoint_000006", run.checkpoints[0])]
    assert torch.equal(earlier[0], earlier[1]) and torch.equal(earlier[0], earlier[2])
    assert not torch.equal(earlier[0], trained)
    with pytest.raises(RunFolderError, match="checkpoint_000003; it has checkpoint_000006"): run.load(3)


def test_a_relative_model_path_is_found_from_elsewhere(model_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(model_dir.parent)
    run = train(make_config(Path("tiny"), tmp_path, max_steps=1), device=CPU)
    monkeypatch.chdir(tmp_path)
    assert Run(run.path).load(device=CPU)[0].args.dim == 16


def test_says_and_compares(done):
    run, _ = done
    options = {"max_tokens": 5, "temperature": 0.0}
    said = run.generate("Say cat 3 times.", **options)
    assert said == run.generate([{"role": "user", "content": "Say cat 3 times."}], **options)
    assert said == run.chat("Say cat 3 times.", **options)
    table = run.compare(["Say cat 3 times.", "<b>hi</b>"], max_tokens=5)
    assert table.tuned[0] == said and table.base != table.tuned and list(table.frame) == ["prompt", "base", "tuned"]
    assert "<b>hi" not in table._repr_html_() and "&lt;b&gt;hi" in table._repr_html_()
    assert run.generate("Say cat 3 times.", **options) == said  # the adapters are on again


def test_merged_runs_load_and_compare(model_dir, tmp_path):
    changes = {"max_steps": 12, "ckpt_freq": 0}
    adapters = train(make_config(model_dir, tmp_path, "adapters", **changes), device=CPU)
    merged = train(make_config(model_dir, tmp_path, "merged", save_adapters=False, **changes), device=CPU)
    assert merged.adapter is None and merged.checkpoints
    a, b = (logits(r.load(device=CPU)[0]) for r in (adapters, merged))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    prompts = ["Say cat 3 times."]
    both = [r.compare(prompts, max_tokens=4) for r in (adapters, merged)]
    assert both[0].base == both[1].base and both[0].tuned == both[1].tuned


def test_nothing_to_load(model_dir, tmp_path):
    run = train(make_config(model_dir, tmp_path, no_ckpt=True, max_steps=1), device=CPU)
    with pytest.raises(RunFolderError, match="no checkpoint yet"): run.load()
    assert run.adapter is None


def test_a_config_file_will_do(model_dir, tmp_path):
    make_config(model_dir, tmp_path, max_steps=2).save(tmp_path / "cfg.yaml")
    assert len(train(tmp_path / "cfg.yaml", device=CPU).metrics) == 2


def test_folders_of_the_reference_are_read(tmp_path):
    record = {"lr": 1e-5, "step": 1, "loss": 2.0, "percent_done": 50.0, "wps": 9.0, "avg_wps": 9.0,
              "eta_in_seconds": 3.0, "at": "2024-05-24T10:00:00"}
    (tmp_path / "metrics.train.jsonl").write_text(json.dumps(record) + "\n")
    run = Run(tmp_path)
    assert run.status["state"] == "new" and run.metrics["loss"].tolist() == [2.0] and run.eval_metrics.empty


WRITER = """
import json, sys, time
with open(sys.argv[1], "w") as file:
    for step in range(1, 400):
        line = json.dumps({"step": step, "loss": 1 / step, "lr": 1e-4, "pad": "x" * 200}) + "\\n"
        for part in (line[:20], line[20:100], line[100:]):
            file.write(part); file.flush(); time.sleep(0.0005)
"""


def test_read_while_it_is_written(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path / "metrics.train.jsonl")])
    seen, run = [], None
    while child.poll() is None:
        if run is None and (tmp_path / "metrics.train.jsonl").exists(): run = Run(tmp_path)
        if not run: continue
        steps = run.metrics["step"].tolist()
        assert steps == list(range(1, len(steps) + 1))
        seen.append(len(steps))
    assert child.returncode == 0 and len(run.metrics) == 399 and len(set(seen)) > 20 and seen == sorted(seen)


# In a real kernel


class Kernel:
    """A notebook kernel, and what its cells put out."""
    def __init__(self):
        root = str(Path(__file__).resolve().parents[1])
        env = {k: v for k, v in os.environ.items() if k != "IN_TEST"} | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
        self.manager = jupyter_client.KernelManager(kernel_name="python3")
        self.manager.start_kernel(env=env)
        self.client = self.manager.client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=60)

    def start(self, code: str) -> str: return self.client.execute(code, store_history=False)

    def finish(self, msg_id: str, timeout: float = 60) -> tuple[str, list[dict]]:
        """The reply's status, and the messages of a cell until it is idle."""
        messages, deadline = [], time.monotonic() + timeout
        while time.monotonic() < deadline:
            try: message = self.client.get_iopub_msg(timeout=1)
            except queue.Empty: continue
            if message["parent_header"].get("msg_id") != msg_id: continue
            if message["msg_type"] == "status" and message["content"]["execution_state"] == "idle": break
            messages.append(message)
        while (reply := self.client.get_shell_msg(timeout=10))["parent_header"].get("msg_id") != msg_id: pass
        return reply["content"]["status"], messages

    def run(self, code: str) -> tuple[str, list[dict]]: return self.finish(self.start(code))


@pytest.fixture(scope="module")
def kernel():
    it = Kernel()
    yield it
    it.client.stop_channels()
    it.manager.shutdown_kernel(now=True)


def curves(messages: list[dict], kind: str) -> list[dict]:
    return [m["content"] for m in messages if m["msg_type"] == kind and "image/svg+xml" in m["content"]["data"]]


START = "from mistral_nb.run import train\nrun = train({!r})"


def test_a_live_curve_in_the_cell_that_trains(kernel, model_dir, tmp_path):
    make_config(model_dir, tmp_path, "live", max_steps=40).save(tmp_path / "cfg.yaml")
    status, messages = kernel.run(START.format(str(tmp_path / "cfg.yaml")))
    shown, updates = curves(messages, "display_data"), curves(messages, "update_display_data")
    assert status == "ok" and len(shown) == 1 and updates
    assert all("image/png" not in c["data"] for c in [*shown, *updates[:-1]]) and "image/png" in updates[-1]["data"]
    assert {c["transient"]["display_id"] for c in updates} == {shown[0]["transient"]["display_id"]}
    assert "step 40 of 40" in updates[-1]["data"]["image/svg+xml"]


def test_the_stop_button_saves_and_returns_the_run(kernel, model_dir, tmp_path):
    cfg = make_config(model_dir, tmp_path, "stopped", max_steps=100_000)
    cfg.save(tmp_path / "cfg.yaml")
    cell = kernel.start(START.format(str(tmp_path / "cfg.yaml")))
    metrics, deadline = Path(cfg.run_dir) / "metrics.train.jsonl", time.monotonic() + 60
    def lines() -> int: return metrics.read_text().count("\n") if metrics.exists() else 0
    while lines() < 5 and time.monotonic() < deadline: time.sleep(0.05)
    kernel.manager.interrupt_kernel()
    asked = time.monotonic()
    status, _ = kernel.finish(cell)
    assert status == "ok" and time.monotonic() - asked < 5
    told = "import json\nprint(json.dumps([*map(run.status.get, ['state', 'step']), str(run.adapter)]))"
    status, messages = kernel.run(told)
    state, step, adapter = json.loads("".join(m["content"]["text"] for m in messages if m["msg_type"] == "stream"))
    assert state == "interrupted" and f"checkpoint_{step:06d}" in adapter and Path(adapter).exists()
    status, _ = kernel.run("1 + 1")  # the kernel's own interrupt works again
    cell = kernel.start("import time\nwhile True: time.sleep(0.01)")
    time.sleep(0.3)
    kernel.manager.interrupt_kernel()
    assert kernel.finish(cell)[0] == "error"
