"""A launched tree of processes: what comes out of it, how it is stopped, and that nothing of it is ever left behind."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from collections.abc import Iterator
from pathlib import Path

import pytest

from mistral_nb.config import TrainConfig
from mistral_nb.train import guard
from mistral_nb.train import launch as launching
from mistral_nb.train.launch import LaunchError
from mistral_nb.train.launch import launch
from waiting import until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="trees are guarded through Linux's subreaper")

SLEEPER = """
import os, signal, sys, time
def end(*_): print("saved by", os.environ["RANK"], flush=True); sys.exit(0)
signal.signal(signal.SIGTERM, end)
print("rank", os.environ["RANK"], "port", os.environ["MASTER_PORT"], flush=True)
while True: time.sleep(0.05)
"""

RANKS = """
import os, signal, sys, time
from pathlib import Path
from mistral_nb.config import TrainConfig
from mistral_nb.train.launch import told
def work():
    import torch
    from mistral_nb.train.distributed import joined
    with joined(torch.device("cpu"), Path(TrainConfig.load(sys.argv[-1]).run_dir, ".ranks")) as ranks:
        for step in range(1, 1000):
            ranks.now(f"step {step}", strict=True)
            if ranks.first: print("step", step, flush=True)
            if step == 3 and not ranks.first: act()
            ranks.sum([step])
            time.sleep(0.05)
def act(): ACT
sys.exit(told(work))
"""


def named(mark: Path) -> list[int]:
    """The living processes whose command names `mark`."""
    mine = lambda pid: str(mark).encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
    out = []
    for pid in guard.parents():
        try: out += [pid] if pid != os.getpid() and mine(pid) else []
        except OSError: pass
    return out


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Callable]:
    """A function that launches a program; whatever it started is gone at the end of the test."""
    runs = []
    def start(program: str, name: str = "run", **options) -> launching.Launched:
        (tmp_path / f"{name}.py").write_text(program)
        cfg = TrainConfig(model_id_or_path="none", run_dir=str(tmp_path / name))
        runs.append(launch(cfg, **{"nproc_per_node": 2, "program": [tmp_path / f"{name}.py"]} | options))
        return runs[-1]
    yield start
    for run in runs: run.kill()
    assert not named(tmp_path)


def test_stop_asks_the_ranks_and_two_launches_do_not_meet(started: Callable) -> None:
    one, two = started(SLEEPER, "one"), started(SLEEPER, "two")
    for run in (one, two): until(lambda run=run: run.output.count("port") == 2)
    ports = [{line.split()[-1] for line in run.output.splitlines() if "port" in line} for run in (one, two)]
    assert len(ports[0]) == len(ports[1]) == 1 and ports[0] != ports[1]
    assert one.running and one.returncode is None and "running" in repr(one)
    one.stop(timeout=20)
    assert one.returncode == 0 and one.failure is None
    assert {"saved by 0", "saved by 1"} <= set(one.output.splitlines())
    assert two.running
    assert one.wait() is one and one.stop() is one, "waiting for and stopping what has ended does nothing"


def test_interrupted_waiting_leaves_the_run_going(started: Callable, capsys: pytest.CaptureFixture) -> None:
    run = started(SLEEPER, nproc_per_node=1)
    until(lambda: "port" in run.output)
    old = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    try: assert run.wait() is run
    finally: signal.signal(signal.SIGALRM, old)
    printed = capsys.readouterr().out
    assert run.running and "rank 0 port" in printed and "`.stop()` saves and stops it" in printed
    assert run.wait(timeout=0.2).running


def test_a_rank_s_exception_comes_back_as_its_traceback(started: Callable) -> None:
    run = started(RANKS.replace("ACT", "{}['ids']"))
    until(lambda: "step 3" in run.output)
    began = time.monotonic()
    until(lambda: run.failure)
    assert time.monotonic() - began < 10
    assert run.failure.rank == 1 and "in act" in run.failure.traceback
    with pytest.raises(LaunchError, match="rank 1 failed: KeyError: 'ids'") as failed: run.wait(30, show=False)
    assert "in act" in str(failed.value)
    with pytest.raises(LaunchError) as failed: run.wait(show=True)
    assert "in act" not in str(failed.value), "it was printed already"
    assert "rank 1: Traceback" in run.output and "went away" in run.output
    assert run.failure.rank == 1 and run.returncode == 1


def test_a_killed_rank_ends_the_job_with_its_name(started: Callable) -> None:
    run = started(RANKS.replace("ACT", "os.kill(os.getpid(), signal.SIGKILL)"))
    with pytest.raises(LaunchError, match="rank 1 failed: process .* SIGKILL"): run.wait(40, show=False)


@pytest.mark.parametrize(("act", "told"), [
    ("time.sleep(1000)", "been at one thing for"),
    ("time.sleep(1); os.kill(os.getpid(), signal.SIGSTOP)", "gave no sign of life for"),
])
def test_a_hung_rank_is_named(started: Callable, act: str, told: str) -> None:
    run = started(RANKS.replace("ACT", act), patience=2.5)
    failure = until(lambda: run.failure)
    assert failure.reason.startswith("rank 0 waited in vain: rank 1 (process") and told in failure.reason
    assert "step 3" in failure.reason and "in act" in failure.reason
    run.kill()
    assert not run.running


PARENT = """
import sys, time
from mistral_nb.config import TrainConfig
from mistral_nb.train.launch import launch
cfg = TrainConfig(model_id_or_path="none", run_dir=sys.argv[1])
launch(cfg, nproc_per_node=2, program=[sys.argv[2]], detach=sys.argv[3] == "detach", grace=3)
print("launched", flush=True)
time.sleep(1000)
"""


def parent_of(home: Path, program: str, how: str) -> subprocess.Popen:
    """A process that launches, as a kernel does, and then sleeps."""
    (home / "program.py").write_text(program)
    return subprocess.Popen([sys.executable, "-c", PARENT, str(home / "run"), str(home / "program.py"), how])


def test_nothing_is_left_when_the_kernel_is_killed(tmp_path: Path) -> None:
    said   = tmp_path / "said"
    saying = SLEEPER.replace("print(", f"open({str(said)!r}, 'a').write('x') or print(")
    kernel = parent_of(tmp_path, saying, "attached")
    until(lambda: said.exists() and len(said.read_text()) == 2)
    tree = guard.descendants(kernel.pid)
    assert len(tree) >= 4, "guard, torchrun, two ranks"
    kernel.kill()
    kernel.wait()
    until(lambda: not set(tree) & set(guard.parents()), 15)
    assert len(said.read_text()) == 4, "both ranks were asked to save first"
    assert not named(tmp_path)


def test_a_detached_run_outlives_the_kernel(tmp_path: Path) -> None:
    beat   = tmp_path / "beat"
    loop   = f"import time\nfor i in range(1000): open({str(beat)!r}, 'a').write('x'); time.sleep(0.05)"
    kernel = parent_of(tmp_path, loop, "detach")
    until(beat.exists)
    guards = guard.children(kernel.pid)
    kernel.kill()
    kernel.wait()
    time.sleep(1)
    before = beat.stat().st_size
    until(lambda: beat.stat().st_size > before + 5, 5)
    guard.signal_all(guards, signal.SIGTERM)
    until(lambda: not named(tmp_path), 15)


def test_a_stubborn_tree_is_ended(tmp_path: Path) -> None:
    """The guard alone: helpers with sessions of their own that ignore SIGTERM, orphans, and a kernel killed by -9."""
    helper = "setsid sh -c 'trap \"\" TERM; (sleep 300 & ) ; sleep 300 & wait'"
    script = f"trap '' TERM; {helper} & sleep 300 & echo up; wait"
    code = ("import sys; from pathlib import Path; from mistral_nb.train.guard import guarded; import time\n"
            "g = guarded(['sh', '-c', sys.argv[1]], Path(sys.argv[2]), grace=0.5); time.sleep(1000)")
    kernel = subprocess.Popen([sys.executable, "-c", code, script, str(tmp_path / "out")])
    until(lambda: (tmp_path / "out").exists() and "up" in (tmp_path / "out").read_text())
    tree = until(lambda: len(t := guard.descendants(kernel.pid)) >= 6 and t)
    kernel.kill()
    kernel.wait()
    until(lambda: not set(tree) & set(guard.parents()), 15)


def test_another_run_s_words_are_not_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("RANK", "WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_RUN_ID"): monkeypatch.setenv(key, "7")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    env = launching.environment(2, alone=True)
    assert not {"RANK", "WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_RUN_ID"} & set(env)
    assert env["CUDA_VISIBLE_DEVICES"] == "1"


def test_an_error_file_half_written_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "attempt_0" / "0").mkdir(parents=True)
    (tmp_path / "attempt_0" / "0" / "error.json").write_text(json.dumps({"message": "x"})[:8])
    assert launching.find_failure(tmp_path) is None
