"""Whole runs: what they leave behind, that they repeat exactly, and what happens when they are interrupted or break."""

import gc
import json
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
import types
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mistral_nb import device as device_module
from mistral_nb.config import ConfigError
from mistral_nb.data.loader import Batch
from mistral_nb.data.loader import TrainLoader
from mistral_nb.train import log as log_module
from mistral_nb.train import trainer
from mistral_nb.train.folder import RunFolder
from mistral_nb.train.folder import RunFolderError
from mistral_nb.train.folder import list_checkpoints
from mistral_nb.train.folder import read_jsonl
from mistral_nb.train.folder import read_status
from mistral_nb.train.trainer import TrainingError
from mistral_nb.train.trainer import fit
from mistral_nb.weights.checkpoint import CheckpointError
from mistral_nb.weights.checkpoint import load_adapter
from mistral_nb.weights.checkpoint import load_model
from tiny_run import make_config
from tiny_run import make_model
from tiny_run import quiet_machine  # noqa: F401, every test of the module has it

CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def reference(model_dir, tmp_path_factory) -> RunFolder:
    """One plain run of six steps with a checkpoint after each, to compare others with."""
    home = tmp_path_factory.mktemp("reference")
    return run(make_config(model_dir, home, ckpt_freq=1, num_ckpt_keep=None, lora__dropout=0.1))


def run(cfg, **options) -> RunFolder:
    return RunFolder(fit(cfg, device=CPU, **options))


def train_records(folder: RunFolder) -> list[dict]:
    return read_jsonl(folder.metrics("train"))


def losses(folder: RunFolder) -> list[float]:
    return [record["loss"] for record in train_records(folder)]


def adapter(folder: RunFolder, step: int) -> bytes:
    return (folder.checkpoint_dir / f"checkpoint_{step:06d}" / "consolidated" / "lora.safetensors").read_bytes()


def names(folder: RunFolder) -> list[str]:
    return [path.name for path in list_checkpoints(folder)]


def at_step(monkeypatch, step: int, act) -> None:
    """Call `act` while the batch of `step` (from 1) is made."""
    batch = TrainLoader.batch

    def watched(self, number, *args):
        if number == step - 1: act()
        return batch(self, number, *args)
    monkeypatch.setattr(TrainLoader, "batch", watched)


# What a run leaves behind


def test_folder_and_records(reference, model_dir):
    found = {str(p.relative_to(reference.path)) for p in reference.path.rglob("*") if p.is_file()}
    weights = "checkpoints/checkpoint_000006/consolidated/"
    assert {"args.yaml", "metrics.train.jsonl", "status.json", "log.txt", weights + "lora.safetensors",
            weights + "params.json", weights + "tokenizer.model.v3"} <= found
    assert not [name for name in found if ".part" in name or ".gone" in name]
    assert any(name.startswith("tb/events") for name in found) and "metrics.eval.jsonl" not in found
    records = train_records(reference)
    assert [r["step"] for r in records] == [1, 2, 3, 4, 5, 6]
    keys = {"loss", "lr", "grad_norm", "percent_done", "peak_allocated_mem", "allocated_mem", "wps", "avg_wps",
            "eta_in_seconds", "at"}
    assert all(keys <= set(r) for r in records)
    assert records[-1]["percent_done"] == 100
    assert records[-1]["eta_in_seconds"] == 0 and records[0]["eta_in_seconds"] > 0
    assert 0 < records[0]["allocated_mem"] <= records[0]["peak_allocated_mem"] < 100
    assert losses(reference)[-1] < losses(reference)[0] - 0.5
    assert read_status(reference)["state"] == "finished" and read_status(reference)["step"] == 6
    log = reference.log.read_text()
    assert "float32 products" in log and "finished after 6 of 6 steps" in log and "times through the data" in log


def test_settings_come_back(reference, model_dir):
    from mistral_nb.config import TrainConfig
    assert TrainConfig.load(reference.args).model_id_or_path == str(model_dir)


def test_tensorboard_holds_the_same_numbers(reference):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(reference.tb))
    events.Reload()
    assert [e.value for e in events.Scalars("train.loss")] == pytest.approx(losses(reference), rel=1e-6)
    assert [e.step for e in events.Scalars("train.grad_norm")] == [1, 2, 3, 4, 5, 6]


# The same again


def test_twice_the_same_bits(reference, model_dir, tmp_path):
    torch.manual_seed(random.randrange(10**6))
    again = run(make_config(model_dir, tmp_path, lora__dropout=0.1))
    assert losses(again) == losses(reference) and adapter(again, 6) == adapter(reference, 6)
    other = run(make_config(model_dir, tmp_path, "other", lora__dropout=0.1, seed=1))
    assert losses(other) != losses(reference)


def test_evaluation_changes_nothing(reference, model_dir, tmp_path):
    folder = run(make_config(model_dir, tmp_path, lora__dropout=0.1, no_eval=False, eval_freq=2))
    assert losses(folder) == losses(reference) and adapter(folder, 6) == adapter(reference, 6)
    records = read_jsonl(folder.metrics("eval"))
    assert [r["step"] for r in records] == [2, 4, 6]
    assert all(r["perplexity"] == pytest.approx(math.exp(r["eval_loss"])) for r in records)
    assert [r["train_loss"] for r in records] == losses(folder)[1::2]
    assert records[-1]["eval_loss"] < records[0]["eval_loss"]


def test_microbatches_equal_one_batch(model_dir, tmp_path):
    one = run(make_config(model_dir, tmp_path, "one", batch_size=4))
    four = run(make_config(model_dir, tmp_path, "four", batch_size=1, num_microbatches=4))
    assert losses(four) == pytest.approx(losses(one), rel=1e-6)
    a, b = (load_file(f.checkpoint_dir / "checkpoint_000006/consolidated/lora.safetensors") for f in (one, four))
    for name in a: torch.testing.assert_close(a[name].float(), b[name].float(), rtol=1e-3, atol=1e-4)


def test_activation_checkpointing_changes_no_number(reference, model_dir, tmp_path):
    folder = run(make_config(model_dir, tmp_path, lora__dropout=0.1, checkpoint=True))
    assert losses(folder) == pytest.approx(losses(reference), rel=1e-6)


def test_nothing_is_left_changed_in_torch(model_dir, tmp_path, monkeypatch):
    medium = lambda device: torch.set_float32_matmul_precision("medium") or "medium"
    monkeypatch.setattr(trainer, "use_fast_float32", medium)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    run(make_config(model_dir, tmp_path, max_steps=2))
    assert torch.equal(torch.get_rng_state(), before) and torch.get_float32_matmul_precision() == "highest"


# Told before anything is made


def test_faults_are_told_before_anything_is_made(model_dir, tmp_path, monkeypatch):
    loaded = []
    monkeypatch.setattr(trainer, "load_model", lambda *a, **k: loaded.append(1))
    (tmp_path / "bad.jsonl").write_text('{"messages": [{"role": "user", "content": "no answer"}]}\n')
    (tmp_path / "broken").mkdir()
    for error, changes in [
        (CheckpointError, {"model_id_or_path": str(tmp_path / "nowhere")}),
        (CheckpointError, {"model_id_or_path": str(tmp_path / "broken")}),
        (ValueError, {"data.instruct_data": str(tmp_path / "bad.jsonl")}),
        (ValueError, {"data.instruct_data": str(tmp_path / "missing.jsonl")}),
        (ConfigError, {"data.instruct_data": ""}),
        (ConfigError, {"data.eval_instruct_data": "", "no_eval": False}),
        (RunFolderError, {"run_dir": str(tmp_path / "bad.jsonl" / "run")}),
    ]:
        cfg = make_config(model_dir, tmp_path, **changes)
        with pytest.raises(error): fit(cfg, device=CPU)
        assert not Path(cfg.run_dir).exists() and not loaded, changes


def test_used_folder(model_dir, tmp_path):
    cfg = make_config(model_dir, tmp_path, max_steps=3, ckpt_freq=1)
    folder = run(cfg)
    (folder.path / "notes.txt").write_text("mine")
    with pytest.raises(RunFolderError, match="overwrite: true"): run(cfg.model_copy(update={"resume": "never"}))
    with pytest.raises(RunFolderError, match="seed: was 0, now 1"): run(cfg.model_copy(update={"seed": 1}))
    assert names(folder) == ["checkpoint_000001", "checkpoint_000002", "checkpoint_000003"]
    run(cfg.model_copy(update={"overwrite": True, "max_steps": 2, "ckpt_freq": 0}))
    assert names(folder) == ["checkpoint_000002"] and len(losses(folder)) == 2
    assert len(list(folder.tb.iterdir())) == 1 and (folder.path / "notes.txt").read_text() == "mine"


# Checkpoints


def test_how_many_are_kept(model_dir, tmp_path):
    kept = run(make_config(model_dir, tmp_path, "kept", ckpt_freq=2, max_steps=7, num_ckpt_keep=2))
    assert names(kept) == ["checkpoint_000006", "checkpoint_000007"]
    none = run(make_config(model_dir, tmp_path, "none", no_ckpt=True))
    assert names(none) == [] and "no checkpoint was saved" in none.log.read_text()


def test_merged_weights_say_what_base_and_adapter_say(reference, model_dir, tmp_path):
    merged = run(make_config(model_dir, tmp_path, save_adapters=False, lora__dropout=0.1))
    place = merged.checkpoint_dir / "checkpoint_000006" / "consolidated"
    assert sorted(p.name for p in place.iterdir()) == ["consolidated.safetensors", "params.json", "tokenizer.model.v3"]
    tuned = load_model(model_dir, device=CPU, dtype=torch.float32)
    load_adapter(tuned, reference.checkpoint_dir / "checkpoint_000006" / "consolidated" / "lora.safetensors")
    whole = load_model(place, device=CPU, dtype=torch.float32)
    ids = torch.arange(3, 20)
    with torch.no_grad(): a, b = (m.eval().logits(m(ids, [6, 11])) for m in (tuned, whole))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_full_fine_tuning(model_dir, tmp_path):
    folder = run(make_config(model_dir, tmp_path, lora__enable=False, optim__lr=0.003, max_steps=8))
    place = folder.checkpoint_dir / "checkpoint_000008" / "consolidated"
    assert sorted(p.name for p in place.iterdir()) == ["consolidated.safetensors", "params.json", "tokenizer.model.v3"]
    assert losses(folder)[-1] < losses(folder)[0] - 0.3 and "(100.0%)" in folder.log.read_text()
    base, tuned = (load_model(p, device=CPU, dtype=torch.float32).state_dict() for p in (model_dir, place))
    assert all(not torch.equal(base[name], tuned[name]) for name in base)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("lora", [True, False])
def test_half_precision(reference, model_dir, tmp_path, dtype, lora):
    folder = run(make_config(model_dir, tmp_path, dtype=dtype, lora__enable=lora, lora__dropout=0.1 * lora,
                             max_steps=12, optim__lr=0.01 if lora else 0.003))
    assert losses(folder)[0] == pytest.approx(losses(reference)[0], rel=0.01)
    assert losses(folder)[-1] < losses(folder)[0] - 0.2


# Interrupts


@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_the_step_and_saves(reference, model_dir, tmp_path, monkeypatch, sig):
    before = signal.getsignal(sig)
    at_step(monkeypatch, 3, lambda: signal.raise_signal(sig))
    folder = run(make_config(model_dir, tmp_path, lora__dropout=0.1))
    assert names(folder) == ["checkpoint_000003"] and adapter(folder, 3) == adapter(reference, 3)
    assert losses(folder) == losses(reference)[:3]
    assert read_status(folder) | {"state": "interrupted", "step": 3} == read_status(folder)
    assert "interrupted after 3 of 6 steps" in folder.log.read_text() and signal.getsignal(sig) is before


def test_a_second_interrupt_aborts(model_dir, tmp_path, monkeypatch):
    at_step(monkeypatch, 3, lambda: (signal.raise_signal(signal.SIGINT), signal.raise_signal(signal.SIGINT)))
    cfg = make_config(model_dir, tmp_path)
    with pytest.raises(KeyboardInterrupt): run(cfg)
    folder = RunFolder(cfg.run_dir)
    assert names(folder) == [] and read_status(folder)["state"] == "interrupted" and len(losses(folder)) == 2
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupt_ends_an_evaluation(model_dir, tmp_path, monkeypatch):
    calls, evaluate = [], trainer.loss_sums
    def interrupted(model, batches):
        calls.append(1)
        if len(calls) == 2: signal.raise_signal(signal.SIGINT)
        return evaluate(model, batches)
    monkeypatch.setattr(trainer, "loss_sums", interrupted)
    folder = run(make_config(model_dir, tmp_path, no_eval=False, eval_freq=1))
    assert [r["step"] for r in read_jsonl(folder.metrics("eval"))] == [1] and names(folder) == ["checkpoint_000002"]


def test_an_interrupt_while_loading_leaves_nothing(model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "load_model", lambda *a, **k: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt): run(make_config(model_dir, tmp_path))
    assert not (tmp_path / "run").exists()


def test_another_thread_trains_and_is_stopped(reference, model_dir, tmp_path, monkeypatch):
    stop, out = threading.Event(), []
    at_step(monkeypatch, 2, stop.set)
    cfg = make_config(model_dir, tmp_path, lora__dropout=0.1)
    thread = threading.Thread(target=lambda: out.append(run(cfg, stop=stop)))
    thread.start()
    thread.join(60)
    assert names(out[0]) == ["checkpoint_000002"] and adapter(out[0], 2) == adapter(reference, 2)


def test_stopped_before_the_first_step(model_dir, tmp_path):
    stop = threading.Event()
    stop.set()
    folder = run(make_config(model_dir, tmp_path), stop=stop)
    assert read_status(folder)["state"] == "interrupted" and read_status(folder)["step"] == 0
    assert names(folder) == [] and "no checkpoint was saved" in folder.log.read_text()


def test_a_real_process_and_a_real_signal(model_dir, tmp_path):
    cfg = make_config(model_dir, tmp_path, max_steps=100_000)
    cfg.save(tmp_path / "cfg.yaml")
    code = ("import sys, torch; torch.set_num_threads(1)\nfrom mistral_nb.config import TrainConfig\n"
            "from mistral_nb.train.trainer import fit\nfit(TrainConfig.load(sys.argv[1]), device=torch.device('cpu'))")
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "cfg.yaml")], stdout=subprocess.DEVNULL,
                             stderr=subprocess.PIPE, env={**os.environ, "WORLD_SIZE": "1"})
    folder, deadline = RunFolder(cfg.run_dir), time.monotonic() + 60
    while len(losses(folder)) < 3 and child.poll() is None and time.monotonic() < deadline: time.sleep(0.05)
    assert read_status(folder)["state"] == "running"
    with pytest.raises(RunFolderError, match="is training in it now"):
        fit(cfg.model_copy(update={"overwrite": True}), CPU)
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == 0 and b"stopping: this step is finished" in errors
    status = read_status(folder)
    assert status["state"] == "interrupted" and names(folder) == [f"checkpoint_{status['step']:06d}"]


# Breaks


def break_at(monkeypatch, step: int, value: float) -> None:
    """Make the loss of `step` (from 1) not finite."""
    seen, loss = [], trainer.masked_cross_entropy
    def broken(*args):
        seen.append(1)
        return loss(*args) * (value if len(seen) == step else 1.0)
    monkeypatch.setattr(trainer, "masked_cross_entropy", broken)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite(reference, model_dir, tmp_path, monkeypatch, value):
    break_at(monkeypatch, 4, value)
    cfg = make_config(model_dir, tmp_path, lora__dropout=0.1)
    with pytest.raises(TrainingError) as error: run(cfg)
    text, folder = str(error.value), RunFolder(cfg.run_dir)
    assert f"step 4: the loss is {value}" in text and "train.jsonl:" in text and "learning rate" in text
    assert f"{train_records(folder)[2]['grad_norm']:.3g}" in text and "lower `optim.lr`" in text
    assert "checkpoint_000003" in text and adapter(folder, 3) == adapter(reference, 3)
    assert read_status(folder)["state"] == "failed" and "step 4" in read_status(folder)["reason"]
    assert losses(folder) == losses(reference)[:3] and "stopped: step 4" in folder.log.read_text()


def test_a_break_keeps_the_checkpoint_there_is(reference, model_dir, tmp_path, monkeypatch):
    break_at(monkeypatch, 5, math.nan)
    cfg = make_config(model_dir, tmp_path, lora__dropout=0.1, ckpt_freq=2)
    with pytest.raises(TrainingError): run(cfg)
    assert names(RunFolder(cfg.run_dir)) == ["checkpoint_000002", "checkpoint_000004"]
    assert adapter(RunFolder(cfg.run_dir), 4) == adapter(reference, 4)


def test_a_break_at_the_first_step_saves_nothing(model_dir, tmp_path, monkeypatch):
    break_at(monkeypatch, 1, math.nan)
    cfg = make_config(model_dir, tmp_path)
    with pytest.raises(TrainingError, match="the model itself: does it answer"): run(cfg)
    assert names(RunFolder(cfg.run_dir)) == []


def test_an_infinite_gradient_in_float32_is_a_break(model_dir, tmp_path, monkeypatch):
    norm = trainer.Updater.norm
    monkeypatch.setattr(trainer.Updater, "norm", lambda self: norm(self) * math.inf)
    cfg = make_config(model_dir, tmp_path)
    with pytest.raises(TrainingError, match="step 1: the gradient norm is inf"): run(cfg)


def test_float16_skips_an_overflow_and_gives_up_on_many(model_dir, tmp_path, monkeypatch):
    norm, seen = trainer.Updater.norm, []
    def overflowing(self):
        value = norm(self)
        seen.append(1)
        return value * math.inf if len(seen) in bad else value
    monkeypatch.setattr(trainer.Updater, "norm", overflowing)
    bad = {3, 4}
    folder = run(make_config(model_dir, tmp_path, "some", dtype="float16"))
    assert "float16 steps overflowed and were skipped" in folder.log.read_text() and len(losses(folder)) == 6
    assert [r["grad_norm"] for r in train_records(folder)][2:4] == [None, None]
    bad = set(range(100))
    seen.clear()
    cfg = make_config(model_dir, tmp_path, "many", dtype="float16", max_steps=40)
    with pytest.raises(TrainingError, match=f"step {trainer.MOST_SKIPPED}: the gradient norm is"): run(cfg)


def test_out_of_memory_says_what_to_lower(reference, model_dir, tmp_path, monkeypatch):
    def full(): raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    at_step(monkeypatch, 4, full)
    cfg = make_config(model_dir, tmp_path, lora__dropout=0.1)
    with pytest.raises(TrainingError, match="seq_len") as error: run(cfg)
    assert "2.00 GiB" in str(error.value) and "checkpoint: true" in str(error.value)
    assert adapter(RunFolder(cfg.run_dir), 3) == adapter(reference, 3)


def test_any_other_error_keeps_the_work(reference, model_dir, tmp_path, monkeypatch):
    def lost(): raise OSError("the disk with the data is gone")
    at_step(monkeypatch, 5, lost)
    cfg = make_config(model_dir, tmp_path, lora__dropout=0.1)
    with pytest.raises(OSError, match="is gone") as error: run(cfg)
    assert "checkpoint_000004" in error.value.__notes__[0]
    assert adapter(RunFolder(cfg.run_dir), 4) == adapter(reference, 4)


def test_an_update_broken_off_is_not_saved(model_dir, tmp_path, monkeypatch):
    calls = []
    def broken(self, *args):
        calls.append(1)
        if len(calls) == 3: raise RuntimeError("device-side assert")
        return step(self, *args)
    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", broken)
    cfg = make_config(model_dir, tmp_path)
    with pytest.raises(RuntimeError, match="device-side"): run(cfg)
    assert names(RunFolder(cfg.run_dir)) == []


def test_an_error_does_not_hold_the_model(model_dir, tmp_path, monkeypatch):
    """A notebook keeps the last traceback; a GPU must be free for the next try all the same."""
    models, load = [], trainer.load_model
    def loaded(*args, **options):
        models.append(weakref.ref(model := load(*args, **options)))
        return model
    monkeypatch.setattr(trainer, "load_model", loaded)
    break_at(monkeypatch, 2, math.nan)
    with pytest.raises(TrainingError) as error: run(make_config(model_dir, tmp_path))
    gc.collect()
    assert error.traceback and models[0]() is None


def test_a_full_disk_stops_the_run(model_dir, tmp_path, monkeypatch):
    def full(*args, **kwargs): raise OSError(28, "No space left on device")
    monkeypatch.setattr(trainer, "save_adapter", full)
    cfg = make_config(model_dir, tmp_path)
    with pytest.raises(OSError, match="No space left"): run(cfg)
    folder = RunFolder(cfg.run_dir)
    assert list(folder.checkpoint_dir.iterdir()) == [] and read_status(folder)["state"] == "failed"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_microbatch_without_trained_tokens(model_dir, dtype):
    cfg = make_config(model_dir, model_dir.parent)
    model = load_model(model_dir, cfg.lora, device=CPU, dtype=dtype).train()
    ids = torch.arange(3, 14)
    def batch(trained: bool) -> Batch:
        mask = torch.zeros(10, dtype=torch.bool)
        mask[4:] = trained
        return Batch(ids[:-1], ids[1:], mask, [6, 4], ["a:1", "a:2"])
    updater = trainer.Updater(trainer.make_optimizer(model.parameters(), cfg.optim), 1.0, dtype)
    alone, norm = trainer.train_step(model, [batch(True)], updater)
    assert trainer.train_step(model, [batch(False), batch(False)], updater) == (0.0, 0.0)
    assert math.isfinite(trainer.train_step(model, [batch(False), batch(True)], updater)[0]) and norm > 0


# Tracking servers


class FakeRun:
    def __init__(self): self.records, self.finished = [], False
    def log(self, record, step): self.records.append((step, record))
    def finish(self): self.finished = True


def test_wandb(model_dir, tmp_path, monkeypatch):
    made = []
    def init(**options): made.append((FakeRun(), options)); return made[-1][0]
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(run=None, init=init))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    folder = run(make_config(model_dir, tmp_path, max_steps=3, no_eval=False, wandb__project="p", wandb__key="s3cret",
                             wandb__offline=True))
    (server, options), = made
    assert options["project"] == "p" and options["mode"] == "offline" and options["name"] == "run" and server.finished
    assert [step for step, _ in server.records] == [1, 2, 3, 3]
    assert server.records[0][1]["train/loss"] == losses(folder)[0] and "eval/perplexity" in server.records[-1][1]
    assert os.environ["WANDB_API_KEY"] == "s3cret" and "s3cret" not in str(options)
    for path in folder.path.rglob("*"):
        assert not path.is_file() or b"s3cret" not in path.read_bytes(), path


def test_a_tracking_server_that_fails_does_not_stop_the_run(reference, model_dir, tmp_path, monkeypatch):
    def init(**options): raise ConnectionError("no route to api.wandb.ai")
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(run=None, init=init))
    monkeypatch.setitem(sys.modules, "mlflow", None)
    folder = run(make_config(model_dir, tmp_path, lora__dropout=0.1, wandb__project="p",
                             mlflow__tracking_uri="https://me:s3cret@tracking.example"))
    log = folder.log.read_text()
    assert "wandb is off: it could not be opened (no route to api.wandb.ai)" in log and "pip install mlflow" in log
    assert losses(folder) == losses(reference) and "s3cret" not in folder.args.read_text()


def test_mlflow(model_dir, tmp_path, monkeypatch):
    calls = []
    fake = types.SimpleNamespace(**{name: (lambda *a, _name=name, **k: calls.append((_name, a, k))) for name in
                                    ["set_tracking_uri", "set_experiment", "start_run", "log_metrics", "end_run"]})
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    folder = run(make_config(model_dir, tmp_path, max_steps=2, mlflow__tracking_uri="file:x",
                             mlflow__experiment_name="e"))
    assert [c[0] for c in calls] == ["set_tracking_uri", "set_experiment", "start_run", *["log_metrics"] * 2, "end_run"]
    assert calls[1][1] == ("e",) and calls[3][1][0]["train.loss"] == losses(folder)[0] and calls[3][2] == {"step": 1}


def test_trackers_are_not_imported_unasked(model_dir, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "mlflow", None)
    folder = run(make_config(model_dir, tmp_path, max_steps=1, wandb__project="", mlflow__tracking_uri=""))
    assert "is off" not in folder.log.read_text()


def test_progress_bar_of_a_terminal(model_dir, tmp_path, capfd):
    run(make_config(model_dir, tmp_path, max_steps=3, log_freq=2))
    out, err = capfd.readouterr()
    assert "3/3" in err and "loss=" in err and "tokens/s=" in err and "lr=" in err
    assert "training" in out and json.dumps(out).count("finished after 3 of 3 steps") == 1


def test_log_freq(model_dir, tmp_path):
    folder = run(make_config(model_dir, tmp_path, max_steps=8, log_freq=3))
    assert [r["step"] for r in train_records(folder)] == [1, 3, 6, 8]
    assert log_module.Meter and device_module.rank() == 0
