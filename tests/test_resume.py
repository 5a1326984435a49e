"""A run that is killed, damaged, moved or signalled goes on, and ends with the bits of one that never was."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch

from mistral_nb.config import ConfigError
from mistral_nb.config import TrainConfig
from mistral_nb.run import Run
from mistral_nb.run import train
from mistral_nb.train import mirror as mirror_module
from mistral_nb.train import trainer
from mistral_nb.train.folder import RunFolder
from mistral_nb.train.folder import RunFolderError
from mistral_nb.train.folder import list_checkpoints
from mistral_nb.train.folder import read_jsonl
from mistral_nb.train.folder import read_status
from mistral_nb.train.folder import write_status
from mistral_nb.train.resume import check_files
from mistral_nb.train.resume import read_manifest
from mistral_nb.train.trainer import fit
from tiny_run import make_config
from tiny_run import make_model
from tiny_run import quiet_machine  # noqa: F401, every test of the module has it

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")

# A process with everything imported, which forks one run after the other: a run then starts in a moment, and is a real
# process to be killed. A run may be told to die at its nth write: what a kill at exactly that moment leaves.
NURSERY = """
import json, os, signal, sys, time, traceback
import torch, torch.utils.tensorboard
torch.set_num_threads(1)
from mistral_nb import cli, run
from mistral_nb.data.tokenize import load_tokenizer
from mistral_nb.train import trainer
from mistral_nb.weights.checkpoint import check_folder
check_folder(sys.argv[1]), load_tokenizer(sys.argv[1])
trainer.use_fast_float32 = lambda device: "float32 products: as they are"

def dying(place, name, calls, at):
    real = getattr(place, name)
    def call(*args, **options):
        calls.append(name)
        if len(calls) == at: os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **options)
    setattr(place, name, call)

for line in sys.stdin:
    job = json.loads(line)
    pid = os.fork()
    if not pid:
        code, calls = 1, []
        if "die_at" in job:
            for name in ("fsync", "replace", "open", "unlink", "rmdir", "mkdir"): dying(os, name, calls, job["die_at"])
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        try: code = cli.main(["train", job["cfg"]])
        except BaseException: traceback.print_exc()
        os._exit(code)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Nursery:
    """Starts runs as processes of their own."""
    def __init__(self, model_dir: Path):
        env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "IN_TEST": "1", "TQDM_DISABLE": "1"}
        self.process = subprocess.Popen([sys.executable, "-c", NURSERY, str(model_dir)], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env)

    def start(self, cfg: TrainConfig, **job) -> int:
        path = Path(cfg.run_dir).parent / f"{Path(cfg.run_dir).name}.yaml"
        cfg.save(path)
        self.process.stdin.write(json.dumps({"cfg": str(path), **job}) + "\n")
        self.process.stdin.flush()
        pid = int(self.process.stdout.readline())
        assert pid > 1, "the code of an earlier run was not asked for"
        return pid

    def code(self) -> int: return int(self.process.stdout.readline())

    def run(self, cfg: TrainConfig, **job) -> int:
        self.start(cfg, **job)
        return self.code()


@pytest.fixture(scope="module")
def nursery(model_dir):
    it = Nursery(model_dir)
    yield it
    it.process.stdin.close()
    it.process.wait(30)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "tiny")


SETTINGS = {"max_steps": 12, "ckpt_freq": 2, "num_ckpt_keep": 2, "lora__dropout": 0.1, "no_eval": False, "eval_freq": 3}


def settings(model_dir: Path, home: Path, name: str = "run", **changes) -> TrainConfig:
    return make_config(model_dir, home, name, **(SETTINGS | changes))


@pytest.fixture(scope="module")
def whole(model_dir, tmp_path_factory) -> RunFolder:
    """The run that never was interrupted."""
    cfg = settings(model_dir, tmp_path_factory.mktemp("whole"), num_ckpt_keep=None)
    return RunFolder(fit(cfg, device=CPU))


NUMBERS = ("step", "loss", "lr", "grad_norm", "percent_done", "train_loss", "eval_loss", "eval_tokens")


def numbers(folder: RunFolder, tag: str = "train") -> list[dict]:
    """Everything in the metrics that is no measurement of time or memory."""
    return [{k: r[k] for k in NUMBERS if k in r} for r in read_jsonl(folder.metrics(tag))]


def weights(folder: RunFolder, step: int = 12, name: str = "lora.safetensors") -> bytes:
    return (folder.checkpoint_dir / f"checkpoint_{step:06d}" / "consolidated" / name).read_bytes()


def names(folder: RunFolder) -> list[str]:
    return [path.name for path in list_checkpoints(folder)]


def assert_same(folder: RunFolder, whole: RunFolder, step: int = 12, name: str = "lora.safetensors") -> None:
    """`folder` holds what the run that never was interrupted holds, and nothing half done."""
    assert read_status(folder)["state"] == "finished" and read_status(folder)["step"] == step
    for tag in ("train", "eval"): assert numbers(folder, tag) == numbers(whole, tag)
    assert weights(folder, step, name) == weights(whole, step, name)
    for checkpoint in list_checkpoints(folder): check_files(checkpoint, read_manifest(checkpoint))
    assert not [p for p in folder.checkpoint_dir.iterdir() if not p.name.startswith("checkpoint_")]


def copy_of(folder: RunFolder, home: Path, name: str = "run", drop_after: int = 12) -> RunFolder:
    """A copy of a run folder as it was when the process was killed after `drop_after` steps."""
    shutil.copytree(folder.path, home / name)
    out = RunFolder(home / name)
    for checkpoint in list_checkpoints(out):
        if int(checkpoint.name[-6:]) > drop_after: shutil.rmtree(checkpoint)
    status = json.loads(out.status_file.read_text())
    out.status_file.write_text(json.dumps(status | {"state": "running", "pid": 2 ** 22 + 1, "step": 0}))
    return out


def stop_at(monkeypatch, step: int) -> None:
    """Stands for a kill: an error that nothing catches or saves, after the metrics of `step` were written."""
    class Killed(BaseException): pass
    tick = trainer.Log.tick
    def dying(self, number):
        if number == step: raise Killed
        tick(self, number)
    monkeypatch.setattr(trainer.Log, "tick", dying)
    return Killed


# Killed


def test_killed_at_random_moments(nursery, model_dir, whole, tmp_path):
    cfg, dice, kills, since = settings(model_dir, tmp_path), random.Random(7), 0, time.monotonic()
    folder = RunFolder(cfg.run_dir)
    while kills < 10 or read_status(folder)["state"] != "finished":
        pid = nursery.start(cfg)
        if kills < 10:
            time.sleep(dice.uniform(0.05, 0.6))
            with contextlib.suppress(ProcessLookupError): os.kill(pid, signal.SIGKILL)  # unless it has ended by now
        code = nursery.code()
        assert code in (0, -signal.SIGKILL)
        kills += code != 0
        if code == 0 and kills < 10: shutil.rmtree(folder.path)  # it was faster than we: once more from the start
        assert time.monotonic() - since < 120
    assert_same(folder, whole)


def test_killed_at_each_write_of_a_checkpoint(nursery, model_dir, whole, tmp_path):
    """Every call that changes the disk, from one checkpoint to the next, is once the last."""
    start, cfg = copy_of(whole, tmp_path, "start", drop_after=6), settings(model_dir, tmp_path)
    folder, deaths = RunFolder(cfg.run_dir), 0
    for at in range(int(os.environ.get("FIRST_WRITE", 1)), 400, int(os.environ.get("WRITES_APART", 11))):
        shutil.rmtree(folder.path, ignore_errors=True)
        shutil.copytree(start.path, folder.path)
        code = nursery.run(cfg, die_at=at)
        deaths += code == -signal.SIGKILL
        assert nursery.run(cfg) == 0
        assert_same(folder, whole)
        if code == 0: break
    assert deaths >= 10


def test_killed_again_and_again_while_it_writes(nursery, model_dir, whole, tmp_path):
    cfg, dice = settings(model_dir, tmp_path, ckpt_freq=1), random.Random(3)
    deaths = sum(nursery.run(cfg, die_at=dice.randrange(60, 160)) == -signal.SIGKILL for _ in range(6))
    assert nursery.run(cfg) == 0 and deaths >= 3
    assert_same(RunFolder(cfg.run_dir), whole)


@pytest.mark.parametrize("changes, name", [
    ({"lora__enable": False, "lora__dropout": 0.0, "optim__lr": 0.003}, "consolidated.safetensors"),
    ({"save_adapters": False}, "consolidated.safetensors"),
    ({"num_microbatches": 2, "checkpoint": True, "data.instruct.shuffle": False}, "lora.safetensors"),
    ({"dtype": "float16"}, "lora.safetensors"), ({"dtype": "bfloat16"}, "lora.safetensors")])
def test_other_kinds_of_run(model_dir, tmp_path, monkeypatch, changes, name):
    changes = changes | {"max_steps": 7, "ckpt_freq": 2}
    once = RunFolder(fit(settings(model_dir, tmp_path, "once", **changes), device=CPU))
    cfg  = settings(model_dir, tmp_path, "twice", **changes)
    with monkeypatch.context() as patch, pytest.raises(stop_at(patch, 5)): fit(cfg, device=CPU)
    assert names(RunFolder(cfg.run_dir)) == ["checkpoint_000002", "checkpoint_000004"]
    fit(cfg, device=CPU)
    assert_same(RunFolder(cfg.run_dir), once, 7, name)


def test_with_other_settings_that_do_not_count(model_dir, whole, tmp_path):
    folder = copy_of(whole, tmp_path, drop_after=6)
    cfg = settings(model_dir, tmp_path, num_ckpt_keep=1, log_freq=4, ckpt_freq=5, eval_freq=6, ckpt_seconds=1e6)
    fit(cfg, device=CPU)
    assert weights(folder) == weights(whole) and names(folder) == ["checkpoint_000012"]
    expected = [r for r in numbers(whole) if r["step"] <= 6 or r["step"] % 4 == 0]
    assert numbers(folder) == expected and [r["step"] for r in numbers(folder, "eval")] == [3, 6, 12]
    assert TrainConfig.load(folder.args) == cfg


def test_with_less_memory(model_dir, tmp_path, monkeypatch):
    once = RunFolder(fit(settings(model_dir, tmp_path, "once", batch_size=4, lora__dropout=0.0), device=CPU))
    cfg  = settings(model_dir, tmp_path, "twice", batch_size=4, lora__dropout=0.0)
    def full(): raise torch.OutOfMemoryError("CUDA out of memory")
    batch = trainer.TrainLoader.batch
    with monkeypatch.context() as patch, pytest.raises(trainer.TrainingError, match="out of memory"):
        patch.setattr(trainer.TrainLoader, "batch", lambda self, n, *a: full() if n == 7 else batch(self, n, *a))
        fit(cfg, device=CPU)
    with pytest.raises(RunFolderError, match="batch_size × num_microbatches: was 4, now 2"):
        fit(cfg.model_copy(update={"batch_size": 2}), device=CPU)
    folder = RunFolder(fit(cfg.model_copy(update={"batch_size": 1, "num_microbatches": 4, "checkpoint": True}), CPU))
    assert "batch_size was 4, now 1" in folder.log.read_text() and read_status(folder)["resumed_step"] == 6
    assert [r["loss"] for r in numbers(folder)] == pytest.approx([r["loss"] for r in numbers(once)], rel=1e-5)


# Lines of metrics


def test_metrics_hold_each_step_once(model_dir, whole, tmp_path):
    folder = copy_of(whole, tmp_path, drop_after=8)
    lines = folder.metrics("train").read_bytes().splitlines(keepends=True)
    folder.metrics("train").write_bytes(b"".join(lines[:11]) + lines[11][:37])
    fit(settings(model_dir, tmp_path), device=CPU)
    assert_same(folder, whole)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(folder.tb))
    events.Reload()
    assert [e.step for e in events.Scalars("train.loss")] == list(range(1, 13))


def test_speed_goes_on(model_dir, whole, tmp_path):
    folder = copy_of(whole, tmp_path, drop_after=8)
    before = read_jsonl(folder.metrics("train"))[7]
    fit(settings(model_dir, tmp_path), device=CPU)
    after = read_jsonl(folder.metrics("train"))[8]
    assert after["avg_wps"] == pytest.approx(before["avg_wps"]) and after["percent_done"] == 75
    assert 0 < after["eta_in_seconds"] < 60


def test_an_interrupted_evaluation_is_made_up_for(model_dir, whole, tmp_path, monkeypatch):
    real, calls = trainer.loss_sums, []
    def interrupted(model, batches):
        calls.append(1)
        if len(calls) == 2: signal.raise_signal(signal.SIGTERM)
        return real(model, batches)
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "loss_sums", interrupted)
        folder = RunFolder(fit(settings(model_dir, tmp_path), device=CPU))
    assert read_status(folder)["step"] == 6 and [r["step"] for r in numbers(folder, "eval")] == [3]
    fit(settings(model_dir, tmp_path), device=CPU)
    assert_same(folder, whole)


# Damage


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) * 2 // 3] ^= 4
    {"flip": lambda: path.write_bytes(data), "cut": lambda: os.truncate(path, len(data) * 2 // 3),
     "empty": lambda: os.truncate(path, 0), "gone": path.unlink}[how]()


@pytest.mark.parametrize("how", ["flip", "cut", "empty", "gone"])
@pytest.mark.parametrize("name", ["state/rank0.safetensors", "state/rank0.json", "state/manifest.json",
                                  "consolidated/lora.safetensors"])
def test_a_damaged_checkpoint_is_noticed_and_the_one_before_used(model_dir, whole, tmp_path, how, name):
    folder = copy_of(whole, tmp_path, drop_after=10)
    damage(folder.checkpoint_dir / "checkpoint_000010" / name, how)
    with pytest.warns(UserWarning, match="checkpoint_000010: .*checkpoint_000008 used"):
        fit(settings(model_dir, tmp_path, num_ckpt_keep=None), device=CPU)
    assert "checkpoint_000010: " in folder.log.read_text()
    shutil.rmtree(folder.checkpoint_dir / "aside_000010")
    assert_same(folder, whole)
    assert read_status(folder)["resumed_step"] == 8 and weights(folder, 10) == weights(whole, 10)


def test_no_whole_checkpoint_is_left(model_dir, whole, tmp_path):
    folder = copy_of(whole, tmp_path, drop_after=4)
    for checkpoint in list_checkpoints(folder): damage(checkpoint / "state" / "rank0.safetensors", "flip")
    cfg = settings(model_dir, tmp_path)
    with pytest.raises(RunFolderError, match="no checkpoint is whole:\n.*checkpoint_000004(.|\n)*overwrite: true"):
        fit(cfg, device=CPU)
    assert names(folder) == ["checkpoint_000002", "checkpoint_000004"]
    fit(cfg.model_copy(update={"overwrite": True}), device=CPU)
    assert_same(folder, whole)


# Signals


def wait_for(condition, seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_sigterm_saves_and_ends_well(nursery, model_dir, tmp_path):
    cfg = settings(model_dir, tmp_path, max_steps=100_000, ckpt_freq=0, no_eval=True)
    pid, folder = nursery.start(cfg), RunFolder(cfg.run_dir)
    wait_for(lambda: len(numbers(folder)) > 2)
    for _ in range(3): os.kill(pid, signal.SIGTERM)  # some schedulers send it more than once
    assert nursery.code() == 0
    status = read_status(folder)
    assert status["state"] == "interrupted" and names(folder) == [f"checkpoint_{status['step']:06d}"]


def test_sigusr1_saves_and_goes_on(nursery, model_dir, whole, tmp_path):
    cfg = settings(model_dir, tmp_path, max_steps=100_000, ckpt_freq=0, no_eval=True, num_ckpt_keep=None)
    pid, folder = nursery.start(cfg), RunFolder(cfg.run_dir)
    wait_for(lambda: len(numbers(folder)) > 2)
    os.kill(pid, signal.SIGUSR1)
    wait_for(lambda: names(folder))
    steps = len(numbers(folder))
    wait_for(lambda: len(numbers(folder)) > steps + 3)
    os.kill(pid, signal.SIGKILL)
    assert nursery.code() == -signal.SIGKILL and "SIGUSR1 asks for a checkpoint" in folder.log.read_text()
    check_files(list_checkpoints(folder)[0], read_manifest(list_checkpoints(folder)[0]))


def test_a_checkpoint_by_the_clock(model_dir, tmp_path, monkeypatch):
    hours = iter(range(0, 10 ** 6, 400))
    monkeypatch.setattr(trainer, "time", types.SimpleNamespace(monotonic=lambda: next(hours)))
    cfg = settings(model_dir, tmp_path, ckpt_freq=0, ckpt_seconds=600, num_ckpt_keep=None)
    folder = RunFolder(fit(cfg, device=CPU))
    assert [int(n[-6:]) for n in names(folder)] == [2, 4, 6, 8, 10, 12]


# Which run, and from where


@pytest.mark.parametrize("changes, said", [
    ({"lora__rank": 8}, "lora.rank: was 4, now 8"), ({"max_steps": 13}, "max_steps: was 12, now 13"),
    ({"seed": 1, "seq_len": 64}, "seed: was 0, now 1\n.*seq_len: was 48, now 64")])
def test_other_settings_are_refused_key_by_key(model_dir, whole, tmp_path, changes, said):
    folder = copy_of(whole, tmp_path, drop_after=6)
    before = {p: p.read_bytes() for p in folder.path.rglob("*") if p.is_file()}
    for more in ({}, {"num_ckpt_keep": 1}):
        with pytest.raises(RunFolderError, match=said): fit(settings(model_dir, tmp_path, **changes | more), device=CPU)
    assert before == {p: p.read_bytes() for p in folder.path.rglob("*") if p.is_file()}


def test_changed_rows_and_a_changed_model_are_noticed(model_dir, whole, tmp_path):
    copy_of(whole, tmp_path, drop_after=6)
    cfg = settings(model_dir, tmp_path)
    rows = Path(cfg.data.instruct_data).read_text()
    Path(cfg.data.instruct_data).write_text(rows.replace("Say cat", "Say dog"))
    with pytest.raises(RunFolderError, match="the rows are not those .*12 samples"): fit(cfg, device=CPU)
    Path(cfg.data.instruct_data).rename(tmp_path / "moved.jsonl").write_text(rows)
    make_model(tmp_path / "other", seed=1)
    cfg.data.instruct_data = str(tmp_path / "moved.jsonl")
    with pytest.raises(RunFolderError, match="the model is not the one"):
        fit(cfg.model_copy(update={"model_id_or_path": str(tmp_path / "other")}), device=CPU)
    shutil.copytree(model_dir, tmp_path / "same")
    cfg.model_id_or_path = str(tmp_path / "same")
    fit(cfg, device=CPU)
    assert_same(RunFolder(cfg.run_dir), whole)


def test_a_finished_run_is_handed_back(model_dir, whole, tmp_path, capsys, monkeypatch):
    folder = copy_of(whole, tmp_path)
    folder.status_file.write_text(whole.status_file.read_text())
    monkeypatch.setattr(trainer, "load_model", lambda *a, **k: pytest.fail("nothing needs loading"))
    run = train(settings(model_dir, tmp_path), device=CPU)
    assert "this run is finished, after 12 of 12 steps" in capsys.readouterr().out
    assert run.status["state"] == "finished" and len(run.metrics) == 12 and run.resume(device=CPU).path == run.path
    with pytest.raises(RunFolderError, match="max_steps: was 12, now 20"):
        train(settings(model_dir, tmp_path, max_steps=20), device=CPU)


def test_killed_after_the_last_checkpoint(model_dir, whole, tmp_path):
    folder = copy_of(whole, tmp_path)
    assert read_status(folder)["state"] == "died"
    fit(settings(model_dir, tmp_path), device=CPU)
    assert_same(folder, whole)
    assert names(folder) == ["checkpoint_000010", "checkpoint_000012"]


def test_a_used_folder_without_a_checkpoint(model_dir, whole, tmp_path):
    folder = copy_of(whole, tmp_path, drop_after=0)
    cfg = TrainConfig.load(whole.args).model_copy(update={"run_dir": str(folder.path)})
    for key, value in [("seed", 5), ("model_id_or_path", "elsewhere")]:
        with pytest.raises(RunFolderError, match=f"{key}: was .*, now {value!r}"):
            fit(cfg.model_copy(update={key: value}), device=CPU)
    fit(cfg, device=CPU)
    assert_same(folder, whole)
    assert "no checkpoint was saved in it: starting at step 0" in folder.log.read_text()
    assert "resumed_step" not in read_status(folder)


def test_resume_from_the_handle(model_dir, whole, tmp_path):
    copy_of(whole, tmp_path, drop_after=6)
    run = Run(tmp_path / "run")
    assert run.status["state"] == "died"
    again = run.resume(device=CPU)
    assert again.status["resumed_step"] == 6 and "checkpoint_000006" in again.status["resumed_from"]
    assert "went on after step 6" in repr(again)
    assert_same(RunFolder(run.path), whole)


def test_never_and_an_explicit_checkpoint(model_dir, whole, tmp_path):
    folder = copy_of(whole, tmp_path, "first")
    with pytest.raises(RunFolderError, match="holds a run already"):
        fit(settings(model_dir, tmp_path, "first", resume="never"), device=CPU)
    middle = str(folder.checkpoint_dir / "checkpoint_000006")
    fit(settings(model_dir, tmp_path, "second", resume=middle), device=CPU)
    second = RunFolder(tmp_path / "second")
    assert_same(second, whole)
    assert read_status(second)["resumed_step"] == 6
    with pytest.raises(RunFolderError, match="holds a run already"):
        fit(settings(model_dir, tmp_path, "second", resume=str(tmp_path / "first")), device=CPU)
    earlier = str(folder.checkpoint_dir / "checkpoint_000004")
    fit(settings(model_dir, tmp_path, "second", resume=earlier, overwrite=True), device=CPU)
    assert_same(second, whole)
    assert read_status(second)["resumed_step"] == 4
    with pytest.raises(RunFolderError, match="there is no .*nowhere"):
        fit(settings(model_dir, tmp_path, "third", resume=str(tmp_path / "nowhere")), device=CPU)
    damage(Path(middle) / "state" / "rank0.safetensors", "flip")
    with pytest.raises(RunFolderError, match="checksum"):
        fit(settings(model_dir, tmp_path, "third", resume=middle), device=CPU)


# Adapters alone


def test_an_adapter_in_its_own_folder_keeps_its_step(model_dir, whole, tmp_path):
    folder = copy_of(whole, tmp_path, drop_after=6)
    for checkpoint in list_checkpoints(folder): shutil.rmtree(checkpoint / "state")
    fit(settings(model_dir, tmp_path), device=CPU)
    assert "the optimiser's moments are lost" in folder.log.read_text()
    assert numbers(folder)[:7] == numbers(whole)[:7] and numbers(folder)[7:] != numbers(whole)[7:]
    assert [r["lr"] for r in numbers(folder)] == [r["lr"] for r in numbers(whole)]


def test_an_adapter_from_elsewhere_starts_a_new_run(model_dir, whole, tmp_path, monkeypatch):
    shutil.copy(whole.checkpoint_dir / "checkpoint_000012/consolidated/lora.safetensors", tmp_path / "lora.safetensors")
    cfg = settings(model_dir, tmp_path, resume=str(tmp_path / "lora.safetensors"))
    with monkeypatch.context() as patch, pytest.raises(stop_at(patch, 1)): fit(cfg, device=CPU)
    fit(cfg, device=CPU)  # killed before a checkpoint: the adapters again, not a fresh start
    folder = RunFolder(cfg.run_dir)
    assert "position in schedule and data are lost: step 0 again" in folder.log.read_text()
    assert numbers(folder)[0]["loss"] < numbers(whole)[0]["loss"] - 0.5 and len(numbers(folder)) == 12
    for changes, said in [({"lora__rank": 8}, "set `lora.rank: 4`"),
                          ({"lora__scaling": 1.0}, "set `lora.scaling: 2.0`"),
                          ({"lora__enable": False}, "set `lora.enable: true`")]:
        with pytest.raises(RunFolderError, match=said):
            fit(settings(model_dir, tmp_path, "new", resume=cfg.resume, **changes), device=CPU)


def test_adapters_in_the_folder_that_would_be_cleared(model_dir, whole, tmp_path):
    folder = copy_of(whole, tmp_path)
    file = folder.checkpoint_dir / "checkpoint_000012/consolidated/lora.safetensors"
    with pytest.raises(RunFolderError, match="run's own folder"):
        fit(settings(model_dir, tmp_path, resume=str(file)), device=CPU)
    assert file.exists()


# A second place


def test_a_lost_disk_is_made_good_from_the_second_place(model_dir, whole, tmp_path, monkeypatch):
    cfg = settings(model_dir, tmp_path, save_to=str(tmp_path / "drive"))
    with monkeypatch.context() as patch:
        killed = stop_at(patch, 7)
        patch.setattr(trainer.Mirror, "offer", lambda self, path: self.place.put(path))
        with pytest.raises(killed): fit(cfg, device=CPU)
    shutil.rmtree(cfg.run_dir)
    fit(cfg, device=CPU)
    assert_same(RunFolder(cfg.run_dir), whole)
    assert_same(RunFolder(cfg.save_to), whole)
    assert "drive" in read_status(RunFolder(cfg.run_dir))["resumed_from"]
    shutil.rmtree(cfg.run_dir)
    fit(cfg, device=CPU)  # finished there: brought back, and not trained
    assert weights(RunFolder(cfg.run_dir)) == weights(whole)


def test_the_second_place_holds_another_run(model_dir, whole, tmp_path):
    copy_of(whole, tmp_path, "drive")
    cfg = settings(model_dir, tmp_path, seed=4, save_to=str(tmp_path / "drive"))
    with pytest.raises(RunFolderError, match="drive holds a run with other settings(.|\n)*seed: was 0, now 4"):
        fit(cfg, device=CPU)
    fit(cfg.model_copy(update={"overwrite": True}), device=CPU)
    assert TrainConfig.load(tmp_path / "drive" / "args.yaml").seed == 4
    assert weights(RunFolder(tmp_path / "drive")) != weights(whole)


def test_a_second_place_that_fails_ends_nothing(model_dir, whole, tmp_path, monkeypatch):
    def full(*args, **options): raise OSError(28, "No space left on device")
    monkeypatch.setattr(mirror_module, "copy_checkpoint", full)
    monkeypatch.setattr(trainer, "Mirror", lambda place: mirror_module.Mirror(place, pause=0.001))
    folder = RunFolder(fit(settings(model_dir, tmp_path, save_to=str(tmp_path / "drive")), device=CPU))
    assert_same(folder, whole)
    assert "could not copy to" in folder.log.read_text() and "No space left" in read_status(folder)["save_to"]["failed"]


class FakeHub:
    """One repository, in a folder, with the calls of `HfApi` that are used."""
    def __init__(self, path: Path): self.path, self.made = path, None
    def repo_exists(self, repo: str) -> bool: return self.path.exists()
    def list_repo_files(self, repo: str) -> list[str]:
        return [p.relative_to(self.path).as_posix() for p in self.path.rglob("*") if p.is_file()]
    def create_repo(self, repo: str, **options) -> None:
        self.made = options
        self.path.mkdir(exist_ok=True)
    def upload_folder(self, repo_id, folder_path, path_in_repo=".", allow_patterns=None, commit_message="") -> None:
        ignore = shutil.ignore_patterns("checkpoints", "tb") if allow_patterns else None
        shutil.copytree(folder_path, self.path / path_in_repo, dirs_exist_ok=True, ignore=ignore)
    def snapshot_download(self, repo_id, local_dir, allow_patterns) -> None:
        shutil.copytree(self.path, local_dir, dirs_exist_ok=True)


def test_the_hub_is_an_extra(model_dir, whole, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    cfg = settings(model_dir, tmp_path, save_to="hf://me/tuned")
    with pytest.raises(RunFolderError, match="pip install huggingface_hub"): fit(cfg, device=CPU)
    hub = FakeHub(tmp_path / "hub")
    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(HfApi=lambda: hub))
    with monkeypatch.context() as patch:
        killed = stop_at(patch, 7)
        patch.setattr(trainer.Mirror, "offer", lambda self, path: self.place.put(path))
        with pytest.raises(killed): fit(cfg, device=CPU)
    assert hub.made == {"private": True, "exist_ok": True} and (hub.path / "checkpoints/checkpoint_000006").is_dir()
    shutil.rmtree(cfg.run_dir)
    fit(cfg, device=CPU)
    assert_same(RunFolder(cfg.run_dir), whole)
    assert read_status(RunFolder(cfg.run_dir))["resumed_step"] == 6
    assert "checkpoint_000012" in os.listdir(hub.path / "checkpoints")
    monkeypatch.setattr(hub, "repo_exists", lambda repo: 1 / 0)
    with pytest.raises(RunFolderError, match="hf://me/tuned cannot be asked"):
        fit(settings(model_dir, tmp_path, "new", save_to=cfg.save_to), device=CPU)


# The disk


def test_the_folder_is_deleted_while_it_trains(model_dir, tmp_path, monkeypatch):
    cfg, tick = settings(model_dir, tmp_path, ckpt_freq=0, no_eval=True), trainer.Log.tick
    with monkeypatch.context() as patch:
        patch.setattr(trainer.Log, "tick", lambda log, n: (tick(log, n), n == 4 and shutil.rmtree(cfg.run_dir)))
        with pytest.raises(FileNotFoundError, match="metrics.train.jsonl") as error: fit(cfg, device=CPU)
    assert "deleted while the run went on" in error.value.__notes__[0]
    assert read_status(RunFolder(fit(cfg, device=CPU)))["state"] == "finished"


def test_a_full_disk_leaves_the_checkpoints_there_are(model_dir, whole, tmp_path, monkeypatch):
    folder, cfg = copy_of(whole, tmp_path, drop_after=6), settings(model_dir, tmp_path)
    def full(*args, **options): raise OSError(28, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "save_state", full)
        patch.setattr(trainer, "write_status", lambda *a, **k: full() if a[1] == "failed" else write_status(*a, **k))
        with pytest.raises(OSError, match="No space left"): fit(cfg, device=CPU)
    assert names(folder)[-1] == "checkpoint_000006" and json.loads(folder.status_file.read_text())["state"] == "running"
    fit(cfg, device=CPU)  # room was made: the same kernel tries again
    assert_same(folder, whole)


@pytest.mark.parametrize("key, value", [("ckpt_seconds", 0), ("ckpt_seconds", -1.0), ("resume", "")])
def test_bounds(model_dir, tmp_path, key, value):
    with pytest.raises(ConfigError, match=key): settings(model_dir, tmp_path, **{key: value})
