"""Token stores across processes, crashes, damage and locales."""

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from mistral_nb.data.sample import RowError
from mistral_nb.data.source import Source
from mistral_nb.data.store import DamagedStore
from mistral_nb.data.store import DataError
from mistral_nb.data.store import Encoder
from mistral_nb.data.store import TokenStore
from mistral_nb.data.store import Worker
from mistral_nb.data.store import build_store
from mistral_nb.data.store import default_workers
from mistral_nb.data.store import encode_rows
from mistral_nb.data.store import raw_rows
from mistral_nb.data.store import read_batches
from mistral_nb.data.store import read_manifest
from mistral_nb.data.tokenize import encode_all

v3 = MistralTokenizer.v3()
v7 = MistralTokenizer.v7()
ROOT = Path(__file__).resolve().parents[1]


def chat(i):
    turns = [{"role": "system", "content": "Kürze"}] * (i % 3 == 0)
    for k in range(1 + i % 4):
        turns += [{"role": "user", "content": f"Frage {i} {k} é→"}, {"role": "assistant", "content": f"ja {k}"}]
    return {"messages": turns}


def write(path, rows):
    lines = (r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in rows)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture
def file(tmp_path):
    return write(tmp_path / "chats.jsonl", [chat(i) for i in range(300)])


def build(path, cache, **options):
    return build_store(Source(path), options.pop("tokenizer", v3), cache_dir=cache, progress=False, **options)


def stored(cache):
    return sorted(p for p in (cache / "tokens").glob("*") if p.is_dir())


def same(a: TokenStore, b: TokenStore):
    assert len(a) == len(b) and [a.origin(i) for i in range(len(a))] == [b.origin(i) for i in range(len(b))]
    for i in range(len(a)):
        x, y = a.sample(i), b.sample(i)
        assert (x.ids == y.ids).all() and (x.mask == y.mask).all() and x.ids.dtype == np.int32 and x.mask.dtype == bool


@pytest.mark.parametrize("options", [{}, {"exact_context": False}, {"tokenizer": v7}])
def test_holds_what_encode_all_gives(file, tmp_path, options):
    store, at = build(file, tmp_path, **options), 0
    tokenizer, exact = options.get("tokenizer", v3), options.get("exact_context", True)
    for line, row in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        for sample in encode_all(json.loads(row), tokenizer, "instruct", exact, True):
            got = store.sample(at)
            assert (got.ids == sample.ids).all() and (got.mask == sample.mask).all()
            assert store.origin(at) == f"{file}:{line}"
            assert (store.lengths[at], store.trained[at]) == (len(sample.ids), sample.mask[1:].sum())
            at += 1
    assert at == len(store)


def test_workers_give_the_same(file, tmp_path):
    same(build(file, tmp_path / "a", workers=1), build(file, tmp_path / "b", workers=2))


def test_a_row_without_samples_is_kept_as_an_empty_one(tmp_path):
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]}
    store = build(write(tmp_path / "a.jsonl", [chat(1), row]), tmp_path)
    last = len(store) - 1
    assert store.trained[last] == 0 and store.origin(last).endswith("a.jsonl:2") and len(store.sample(last).ids) == 0


def test_texts(tmp_path):
    path = write(tmp_path / "t.jsonl", [{"text": "Hello"}, {"text": "x y z"}])
    store = build_store(Source(path, kind="pretrain"), v3, cache_dir=tmp_path, progress=False)
    assert store.kind == "pretrain" and store.trained.tolist() == (store.lengths - 1).tolist()


def test_the_key_is_the_content(file, tmp_path):
    cache = tmp_path / "cache"
    first = build(file, cache)
    moved = file.rename(tmp_path / "moved.jsonl")
    assert build(moved, cache).origin(0) == f"{moved}:1" and len(stored(cache)) == 1
    for options in ({"exact_context": False}, {"dynamic_chunk_fn_call": False}, {"tokenizer": v7}):
        build(moved, cache, **options)
    assert len(stored(cache)) == 4
    write(moved, [chat(i) for i in range(299)] + [chat(301)])
    changed = build(moved, cache)
    assert len(stored(cache)) == 5 and first.sample(0).ids.tolist() == changed.sample(0).ids.tolist()
    assert changed.sample(len(changed) - 1).ids.tolist() != first.sample(len(first) - 1).ids.tolist()


def test_a_folder_is_one_source(tmp_path):
    (tmp_path / "d" / "deep").mkdir(parents=True)
    a = write(tmp_path / "d" / "a.jsonl", [chat(1)])
    b = write(tmp_path / "d" / "deep" / "b.jsonl", [chat(1), chat(2)])
    store = build(tmp_path / "d", tmp_path)
    assert {store.origin(i) for i in range(len(store))} == {f"{a}:1", f"{b}:1", f"{b}:2"}


def test_an_empty_file_is_an_empty_store(tmp_path):
    assert len(build(write(tmp_path / "e.jsonl", []), tmp_path)) == 0 == len(build(tmp_path / "e.jsonl", tmp_path))


@pytest.mark.parametrize("bad, code, workers", [
    ('{"messages": ', "not_json", 1), ({"messages": None}, "no_messages", 1), ("[1]", "not_an_object", 2),
    ({"messages": [{"role": "bot", "content": "x"}]}, "unknown_role", 1)])
def test_bad_rows_stop_training_and_are_remembered(tmp_path, monkeypatch, bad, code, workers):
    path = write(tmp_path / "a.jsonl", [chat(i) for i in range(280)] + [bad, {"messages": 1}])
    for _ in range(2):
        with pytest.raises(DataError, match="the first of 2 such rows") as e: build(path, tmp_path, workers=workers)
        assert (e.value.file, e.value.line, e.value.code, e.value.num) == (str(path), 281, code, 2)
        assert f"{path}:281: " in str(e.value) and f"[{code}]" in str(e.value) and "mistral-nb validate" in str(e.value)
        monkeypatch.setattr("mistral_nb.data.store.write_store", lambda job: pytest.fail("read again"))
    assert len(stored(tmp_path)) == 1 and not list(tmp_path.glob("tokens/*.tmp"))


def test_errors_survive_pickling():
    import pickle
    e = pickle.loads(pickle.dumps(DataError("a.jsonl", 3, RowError("not_text", "why", "messages"))))
    assert (e.file, e.line, e.code) == ("a.jsonl", 3, "not_text") and "a.jsonl:3: messages: why" in str(e)


@pytest.mark.parametrize("name", ["samples.arrow", "index.arrow", "rows.arrow", "problems.arrow", "manifest.json"])
def test_truncated_and_empty_files_are_built_again(file, tmp_path, name):
    good, cache = build(file, tmp_path / "good"), tmp_path / "cache"
    build(file, cache)
    path = stored(cache)[0] / name
    whole = path.read_bytes()
    for size in (0, 7, len(whole) // 2, len(whole) - 1):
        path.unlink()  # a mapped file must not shrink under its readers
        path.write_bytes(whole[:size])
        with pytest.warns(UserWarning, match="its store is damaged"): same(build(file, cache), good)
        assert path.read_bytes() == whole
    path.unlink()
    with pytest.warns(UserWarning, match="its store is damaged"): same(build(file, cache), good)


def test_any_flipped_bit_is_noticed(file, tmp_path):
    build(file, tmp_path)
    rng, folder = np.random.default_rng(0), stored(tmp_path)[0]
    for path in folder.glob("*.arrow"):
        whole = path.read_bytes()
        for at in rng.integers(0, len(whole), 40):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << rng.integers(8))]) + whole[at + 1:])
            with pytest.raises(DamagedStore, match="checksum"): read_manifest(folder)
        path.write_bytes(whole)
    assert read_manifest(folder)["errors"] == 0


def test_tables_of_rows_and_problems(tmp_path):
    rows = [chat(0), {"messages": [{"role": "bot", "content": "x"}]}, chat(1), chat(3), chat(1)]
    with pytest.raises(DataError): build(write(tmp_path / "a.jsonl", rows), tmp_path)
    [folder] = stored(tmp_path)
    [table], [problems] = read_batches(folder, "rows"), read_batches(folder, "problems")
    assert table.column("line").to_pylist() == [1, 3, 4, 5] and table.column("turns").to_pylist() == [1, 2, 4, 2]
    assert table.column("digest")[1] == table.column("digest")[3] != table.column("digest")[2]
    [problem] = problems.to_pylist()
    assert (problem["line"], problem["code"], problem["level"]) == (2, "unknown_role", "error")


def test_it_is_mapped_not_read(file, tmp_path):
    store = build(file, tmp_path)
    assert not store.sample(0).ids.flags.owndata
    with pytest.raises(ValueError): store.sample(0).ids[0] = 1


CODE = """
import sys
from pathlib import Path
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from mistral_nb.data.source import Source
from mistral_nb.data import store
write = store.write_store
def counted(job):
    Path(sys.argv[3]).open("a").write("built\\n")
    import time; time.sleep(1)
    write(job)
store.write_store = counted
s = store.build_store(Source(Path(sys.argv[1])), MistralTokenizer.v3(), cache_dir=sys.argv[2], progress=False)
print(len(s), s.origin(0))
"""


def start(*args, code=CODE, **env):
    env = {**os.environ, "PYTHONPATH": str(ROOT), **env}
    return subprocess.Popen([sys.executable, "-c", code, *map(str, args)], env=env, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, encoding="utf-8")


def test_two_processes_build_once(file, tmp_path):
    log = tmp_path / "log"
    both = [start(file, tmp_path / "cache", log) for _ in range(2)]
    outs = [p.communicate(timeout=60) for p in both]
    assert [p.returncode for p in both] == [0, 0], outs
    assert outs[0][0] == outs[1][0] and log.read_text() == "built\n"


def test_a_killed_builder_leaves_no_lock(file, tmp_path):
    first = start(file, tmp_path / "cache", tmp_path / "log")
    while not (tmp_path / "log").exists(): time.sleep(0.05)
    first.kill(), first.wait()
    assert len(build(file, tmp_path / "cache")) > 300


def test_a_c_locale(file, tmp_path):
    old = {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "utf-8"}
    bad = write(tmp_path / "schlecht_é.jsonl", [chat(1), {"messages": [{"role": "böt", "content": "x"}]}])
    p = start(file, tmp_path / "c", tmp_path / "log", **old)
    out, err = p.communicate(timeout=60)
    assert p.returncode == 0, err
    assert out.split()[0] == str(len(build(file, tmp_path / "here")))
    both = [{p.name: p.read_bytes() for p in stored(tmp_path / name)[0].iterdir()} for name in ("c", "here")]
    assert both[0] == both[1]
    p = start(bad, tmp_path / "c", tmp_path / "log", **old)
    assert "böt" in p.communicate(timeout=60)[1] and p.returncode == 1


def alive(pid):
    try: os.kill(pid, 0)
    except ProcessLookupError: return False
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_children_end_with_their_parent(tmp_path):
    """A parent that is killed, at rest or in mid-work, leaves no child behind."""
    code = """
import sys, time
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from mistral_nb.data.store import Encoder, Worker
workers = [Worker(Encoder(MistralTokenizer.v3(), "pretrain")) for _ in range(2)]
workers[0]([(0, 1, b'{"text": "x"}', None)])
workers[1]._send([(0, 1, b'{"text": "' + b"word " * 20000 + b'"}', None)] * 20)
print(*(w.process.pid for w in workers), flush=True)
time.sleep(60)
"""
    parent = start(code=code)
    children = [int(pid) for pid in parent.stdout.readline().split()]
    parent.send_signal(signal.SIGKILL), parent.wait()
    end = time.monotonic() + 30
    while any(map(alive, children)) and time.monotonic() < end: time.sleep(0.1)
    assert len(children) == 2 and not any(map(alive, children))


def test_an_abandoned_reading_ends_its_workers(file):
    rows = encode_rows((r for _ in range(8) for r in raw_rows([file])), Encoder(v3, "instruct"), workers=2)
    next(rows)
    rows.close()
    assert not subprocess.run(["ps", "--ppid", str(os.getpid()), "-o", "args="], capture_output=True, encoding="utf-8"
                              ).stdout.count("serve()")


def test_a_dead_worker_is_said():
    worker = Worker(Encoder(v3, "instruct"))
    worker.process.kill()
    with pytest.raises(RuntimeError, match="ended with code -9.*workers=1"): worker([(0, 1, b"{}", None)])
    worker.close()


def test_a_script_without_a_main_guard(tmp_path, file):
    """Workers do not run the main script again."""
    script = tmp_path / "script.py"
    script.write_text(CODE.replace("progress=False", "workers=2, progress=False"), encoding="utf-8")
    out = subprocess.run([sys.executable, script, file, tmp_path / "cache", tmp_path / "log"], capture_output=True,
                         env={**os.environ, "PYTHONPATH": str(ROOT)}, encoding="utf-8", timeout=120)
    assert out.returncode == 0 and (tmp_path / "log").read_text() == "built\n", out.stderr


def test_default_workers():
    assert default_workers(1000) == 1 <= default_workers(1 << 30) <= 16


def test_rows_are_read_a_window_ahead(file):
    """Memory stays bounded: rows are not read further than the workers are."""
    seen = []
    rows = (seen.append(r[1]) or r for _ in range(10) for r in raw_rows([file]))
    results = encode_rows(rows, Encoder(v3, "instruct"), workers=1)
    next(results)
    assert len(seen) <= 600
    results.close()


def test_no_warning_on_a_sound_store(file, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2): build(file, tmp_path)


def test_a_cache_that_cannot_be_written_is_said(file, tmp_path):
    (tmp_path / "taken").write_text("a file where a folder should be")
    with pytest.raises(ValueError, match="MISTRAL_NB_CACHE"): build(file, tmp_path / "taken")
