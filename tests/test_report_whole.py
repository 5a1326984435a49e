"""What only the whole of the data shows: rows that come twice, ends that are lost, new files, how long it trains."""

import json
import random
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import HealthCheck
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from mistral_nb.config import TrainConfig
from mistral_nb.data.report import H100
from mistral_nb.data.report import expected
from mistral_nb.data.report import known_speed
from mistral_nb.data.report import loader_of
from mistral_nb.data.report import measured_speed
from mistral_nb.data.report import published_speed
from mistral_nb.data.report import validate
from mistral_nb.data.source import read_rows
from mistral_nb.data.tokenize import encode_all

v3 = MistralTokenizer.v3()
WORDS = "river stone lamp garden winter bread letter window horse paper silver cloud road music table green".split()
MANY = settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))


def chat(*texts, **more):
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return {"messages": messages, **more}


def essay(seed, num=120):
    """A chat whose answer has `num` words, like that of no other seed."""
    rng = random.Random(seed)
    return chat(f"essay {seed}?", " ".join(rng.choice(WORDS) for _ in range(num)))


def changed(row, word="changed"):
    """Nearly the same row."""
    *first, last = row["messages"]
    words = last["content"].split()
    return {**row, "messages": [*first, {**last, "content": " ".join([*words[:-1], word])}]}


def tool_chat(num, answer="done"):
    """A chat with `num` questions, each answered through a call."""
    tool = {"type": "function", "function": {"name": "look", "description": "look it up", "parameters": {
        "type": "object", "properties": {"at": {"type": "integer"}}}}}
    messages = []
    for i in range(num):
        mark = f"callnum{i:02}"
        call = {"id": mark, "type": "function", "function": {"name": "look", "arguments": json.dumps({"at": i})}}
        messages += [{"role": "user", "content": f"What is at {i}?"}, {"role": "assistant", "tool_calls": [call]},
                     {"role": "tool", "tool_call_id": mark, "content": str(i * i)},
                     {"role": "assistant", "content": f"{answer} {i}"}]
    return {"tools": [tool], "messages": messages}


def as_bytes(rows):
    """Rows, or raw lines, as a file."""
    lines = [r if isinstance(r, bytes) else json.dumps(r, ensure_ascii=False).encode() for r in rows]
    return b"".join(line + b"\n" for line in lines)


class Folder:
    """Files in a folder, and configs and reports over them."""

    def __init__(self, path):
        self.path = path

    def write(self, **files):
        for name, rows in files.items():
            self.file(name.replace("__", "/") + ".jsonl", as_bytes(rows))

    def file(self, name, content):
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return path

    def cfg(self, train="a.jsonl", evaluate="", texts="", **more):
        spec = lambda names: ",".join(f"{self.path}/{name}" for name in names.split(",") if name)
        data = {"instruct_data": spec(train), "eval_instruct_data": spec(evaluate), "data": spec(texts)}
        return TrainConfig(model_id_or_path="m", run_dir=str(self.path / "run"), data=data, **{"seq_len": 512, **more})

    def report(self, train="a.jsonl", evaluate="", texts="", speed=None, **more):
        return validate(self.cfg(train, evaluate, texts, **more), v3, world=1, progress=False, tokens_per_second=speed)

    def snapshot(self):
        """All files but tokens, with what is in them."""
        tokens = self.path / "cache"
        files = [p for p in self.path.rglob("*") if p.is_file() and tokens not in p.parents]
        return {p: p.read_bytes() for p in sorted(files)}


@pytest.fixture
def at(tmp_path, monkeypatch):
    monkeypatch.setenv("MISTRAL_NB_CACHE", str(tmp_path / "cache"))
    return Folder(tmp_path)


@pytest.fixture
def fresh(tmp_path_factory, monkeypatch):
    """Makes a folder for each example; tokens are kept in one."""
    monkeypatch.setenv("MISTRAL_NB_CACHE", str(tmp_path_factory.mktemp("cache")))
    return lambda: Folder(tmp_path_factory.mktemp("example"))


def found(report, *codes):
    """Name of the file, line, code and message of the problems of some codes."""
    return [(Path(p.file).name, p.line, p.code, p.message) for p in report.problems if p.code in codes]


# Rows that come twice

def test_duplicates_within_and_across_files(at):
    at.write(a=[essay(1), essay(2), essay(1), essay(1)], d__b=[essay(3), essay(2)], d__c=[essay(3)])
    report = at.report("a.jsonl,d")
    a, b = at.path / "a.jsonl", at.path / "d" / "b.jsonl"
    assert found(report, "duplicate", "near_duplicate") == [
        ("a.jsonl", 3, "duplicate", f"equals {a}:1"), ("a.jsonl", 4, "duplicate", f"equals {a}:1"),
        ("b.jsonl", 2, "duplicate", f"equals {a}:2"), ("c.jsonl", 1, "duplicate", f"equals {b}:1")]
    assert report.ok and report.counts == {"duplicate": 4} and {p.mend for p in report.problems} == {"drop"}


def test_equal_is_what_is_equal_to_the_model(at):
    same = [essay(1), {**essay(1), "tools": [], "system_prompt": None}, {**essay(1), "id": 7, "source": "x"}]
    listed = essay(1)["messages"]
    same.append({"messages": [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in listed]})
    at.write(a=same)
    assert at.report().counts == {"duplicate": 3}


def test_near_duplicates(at):
    at.write(a=[essay(1), essay(2), changed(essay(1)), essay(3)])
    [(file, line, code, said)] = found(at.report(), "duplicate", "near_duplicate")
    assert (file, line, code) == ("a.jsonl", 3, "near_duplicate")
    assert said.startswith("about ") and said.endswith(f"% the same as {at.path}/a.jsonl:1")
    assert 80 <= int(said.split()[1][:-1]) <= 99


def test_different_rows_are_no_twins(at):
    at.write(a=[essay(i, 40) for i in range(200)] + [chat(f"{a} {b}?", "yes") for a in WORDS for b in WORDS])
    assert not at.report().counts


def test_leakage(at):
    at.write(a=[essay(1), essay(2), essay(3)], e=[essay(4), essay(2), changed(essay(3)), essay(4), changed(essay(4))])
    report, a, e = at.report(evaluate="e.jsonl"), at.path / "a.jsonl", at.path / "e.jsonl"
    all_ = found(report, "leaked", "nearly_leaked", "duplicate", "near_duplicate")
    assert [p[:3] for p in all_] == [("e.jsonl", 2, "leaked"), ("e.jsonl", 3, "nearly_leaked"),
                                     ("e.jsonl", 4, "duplicate"), ("e.jsonl", 5, "near_duplicate")]
    assert [p[3].split(" ")[-1] for p in all_] == [f"{a}:2", f"{a}:3", f"{e}:1", f"{e}:1"]
    assert all_[0][3] == f"equals {a}:2" and {p.use for p in report.problems} == {"eval"}
    assert report.ok and {p.level for p in report.problems} == {"warning"}


def test_bad_rows_have_no_twins(at):
    bad = {"messages": [{"role": "bird", "content": "x " * 90}]}
    at.write(a=[bad, bad, essay(1)], e=[bad, essay(2)])
    assert at.report(evaluate="e.jsonl").counts == {"unknown_role": 3}


# Ends that are lost

def lost_tokens(row, seq_len):
    """Length and loss of the samples of a row that are cut, or left out since nothing trained is before the cut."""
    samples = [(len(s.ids) - 1, s.mask[1:]) for s in encode_all(row, v3) if s.mask[1:].any()]
    return [(n, n - seq_len if mask[:seq_len].any() else n) for n, mask in samples if n > seq_len]


@pytest.mark.parametrize("seq_len", [64, 150, 300])
def test_one_warning_for_each_long_row(at, seq_len):
    rows = [essay(1, 20), essay(2, 400), tool_chat(6), tool_chat(2), chat("a", "b", "c", "d " * 200),
            essay(3, 90), {"system_prompt": "s " * 70, **chat("a", "b", "c", "d")}]
    at.write(a=rows)
    want = {i: lost_tokens(row, seq_len) for i, row in enumerate(rows, 1)}
    assert any(len(lost) > 2 for lost in want.values()) or seq_len == 300
    report = at.report(seq_len=seq_len)
    [figures] = report.stats["datasets"].values()
    assert figures["lost_tokens"] == sum(n for lost in want.values() for _, n in lost)
    said = {line: message for _, line, _, message in found(report, "too_long")}
    assert said == {line: f"{max(lost)[0]:,} tokens long, seq_len is {seq_len}: {sum(n for _, n in lost):,} tokens are "
                    "lost; raise seq_len or shorten the row" for line, lost in want.items() if lost}


def test_texts_are_split_and_nothing_of_them_is_lost(at):
    at.write(t=[{"text": "la " * 2000}])
    assert not at.report("", texts="t.jsonl", seq_len=64).counts


# Counts

PIECES = st.one_of(
    st.integers(0, 5).map(essay), st.integers(0, 5).map(lambda i: changed(essay(i))),
    st.integers(1, 3).map(tool_chat), st.just(essay(9, 700)), st.just(chat("a", "")), st.just(chat("a", "b", "c")),
    st.just(b"{broken"), st.just(b""), st.just([1]), st.just(chat("[INST]", "</s>")), st.just(chat("q", "  ")),
    st.just({"messages": [{"role": "human", "content": "hi"}, {"role": "gpt", "content": "there"}]}),
    st.just({"messages": None}), st.just(chat("x", "y", id="é")))
ROWS = st.lists(PIECES, max_size=14)


def agree(report):
    """All the ways in which a report counts say the same."""
    rows = {level: Counter(table.code) for level, table in (("error", report.errors), ("warning", report.warnings))}
    assert report.levels == rows and report.counts == dict(rows["error"] + rows["warning"])
    levels = [p.level for p in report.problems]
    assert levels == sorted(levels) and set(levels) <= {"error", "warning"}  # errors first
    assert report.ok == (len(report.errors) == 0) and len(levels) == len(report.errors) + len(report.warnings)
    for name, figures in report.stats["datasets"].items():
        mine = [p for p in report.problems if p.level == "error" and p.line and name.startswith(str(Path(p.file)))]
        assert figures["bad_rows"] == len({(p.file, p.line) for p in mine})
    for p in report.problems: assert report.explain(p.code) and p.message and (p.line or p.level == "error")


@MANY
@given(train=ROWS, more=ROWS, held_out=ROWS)
def test_counts_are_the_rows_of_the_tables(fresh, train, more, held_out):
    at = fresh()
    at.write(a=train, b=more, e=held_out)
    agree(at.report("a.jsonl,b.jsonl:2", "e.jsonl"))


# Files with the good rows only

def test_corrected_is_byte_for_byte(at):
    good = [json.dumps(essay(i, 5)).encode() for i in range(4)] + ['{"text": 1, "x": "é\u2028"}'.encode()]
    odd  = '{ "messages" :[{"role":"user","content":"é…\u2028日本"},{"role":"assistant","content":"ü"}]}'.encode()
    bad  = b'{"messages": 3}'
    cases = {
        "crlf":    ([good[0] + b"\r\n", odd + b"\r\n"], [bad + b"\r\n", b"\r\n"]),
        "mark":    ([b"\xef\xbb\xbf" + good[1] + b"\n", odd + b"\n"], [bad + b"\n"]),
        "no_end":  ([good[0] + b"\n", odd], [bad + b"\n", b"\n", b"   \n"]),
        "lone_cr": ([good[2] + b"\r", odd + b"\r", good[0] + b"\r"], [bad + b"\r", b"\r"]),
        "mixed":   ([b"  " + good[3] + b"  \r\n", odd + b"\r", good[1] + b"\n"], [b"\xff\xfe\n", b"\t\n", bad + b"\r"]),
        "spaced":  ([good[0] + b" \n", b"\t" + odd + b"\n"], [good[4] + b"\n", b"[]\n"]),
    }
    for name, (kept, lost) in cases.items():
        whole = [kept[0], *lost, *kept[1:]]
        at.file(f"{name}.jsonl", b"".join(whole))
    before = at.snapshot()
    new = at.report(",".join(f"{name}.jsonl" for name in cases)).write_corrected()
    assert [p.name for p in new] == [f"{name}.jsonl.corrected" for name in cases]
    for path, (kept, _) in zip(new, cases.values()): assert path.read_bytes() == b"".join(kept), path.name
    assert {p: text for p, text in at.snapshot().items() if p in before} == before
    assert len(at.snapshot()) == len(before) + len(new)


def test_a_first_row_that_goes_takes_its_mark_along(at):
    at.file("a.jsonl", b"\xef\xbb\xbf{}\n" + as_bytes([essay(1)]))
    [new] = at.report().write_corrected()
    assert new.read_bytes() == as_bytes([essay(1)])


@pytest.mark.parametrize("name", ["a.parquet", "a.csv", "a.tsv", "a.json"])
def test_corrected_rows_of_a_table(at, name):
    rows = [essay(1, 5), {"messages": [{"role": "bird", "content": "é"}]}, chat("é", "ü"), essay(2, 5)]
    table = pd.DataFrame({"messages": [row["messages"] for row in rows]})
    cells = table.assign(messages=[json.dumps(m, ensure_ascii=False) for m in table.messages])
    write = {".parquet": table.to_parquet, ".csv": lambda p: cells.to_csv(p, index=False),
             ".tsv": lambda p: cells.to_csv(p, index=False, sep="\t"),
             ".json": lambda p: p.write_text(json.dumps(rows))}
    write[Path(name).suffix](at.path / name)
    report = at.report(name)
    assert [(p.code, p.line) for p in report.problems] == [("unknown_role", 2)]
    [new] = report.write_corrected()
    assert new.name == f"{name}.corrected.jsonl"
    assert [row.value for row in read_rows(new)] == [rows[0], *rows[2:]] and at.report(new.name).ok


# Mended files

def test_mending_leaves_the_old_files_and_keeps_folders(at):
    at.write(d__a=[essay(1), chat("a", "b", "c")], d__deep__b=[essay(2), essay(1)], e=[essay(3), b"{"], a=[essay(4)])
    at.file("d/.hidden/x.jsonl", b"no")
    at.file("d/notes.txt", b"no")
    before = at.snapshot()
    report = at.report("d:2.5,a.jsonl:0.3333333", "e.jsonl")
    assert not report.ok
    result, p = report.mend(), at.path
    after = at.snapshot()
    assert {path: text for path, text in after.items() if path in before} == before
    new = ["a.mended.jsonl", "d.mended/a.jsonl", "d.mended/deep/b.jsonl", "e.mended.jsonl"]
    assert sorted(str(path.relative_to(p)) for path in after if path not in before) == new
    assert sorted(str(f.path.relative_to(p)) for f in result.files) == new
    assert result.cfg.data.instruct_data == f"{p}/d.mended:2.5,{p}/a.mended.jsonl:0.3333333"
    assert result.cfg.data.eval_instruct_data == f"{p}/e.mended.jsonl:1" and result.cfg.seq_len == report.cfg.seq_len
    assert report.cfg.data.instruct_data == f"{p}/d:2.5,{p}/a.jsonl:0.3333333"
    read = lambda name: [row.value for row in read_rows(p / name)]
    assert read("d.mended/a.jsonl") == [essay(1), chat("a", "b")] and read("d.mended/deep/b.jsonl") == [essay(2)]
    assert read("e.mended.jsonl") == [essay(3)] and result.report.ok and not result.report.counts
    assert result.changed == {"last_turns": 1} and result.left_out == {"duplicate": 1}
    [(file, line, code, reason)] = result.dropped
    assert (Path(file).name, line, code) == ("e.mended.jsonl", 2, "not_json") and reason


def test_an_earlier_result_is_not_written_over_unasked(at):
    at.write(a=[essay(1)], b=[essay(2), chat("a", "b", "c")])
    report = at.report("a.jsonl,b.jsonl")
    (at.path / "b.mended.jsonl").write_text("mine")
    with pytest.raises(ValueError, match="b.mended.jsonl exists already.*overwrite=True"): report.mend()
    assert (at.path / "b.mended.jsonl").read_text() == "mine" and not (at.path / "a.mended.jsonl").exists()
    assert report.mend(overwrite=True).report.ok and (at.path / "b.mended.jsonl").read_text() != "mine"
    with pytest.raises(ValueError, match="exists already"): report.mend()


def test_two_sources_do_not_share_a_new_file(at):
    at.write(x__rows=[essay(1)], y__rows=[essay(2), chat("a", "b", "c")], e__rows=[essay(3)])
    before = at.snapshot()
    report = at.report("x/rows.jsonl,y/rows.jsonl", "e/rows.jsonl")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="rows.mended.jsonl"): report.mend(to=at.path / "new", overwrite=overwrite)
    assert at.snapshot() == before
    assert report.mend().report.ok


def test_leave_out(at):
    rows, held = [essay(1), essay(2), essay(1), essay(3), changed(essay(2))], [essay(3), changed(essay(1)), essay(8)]
    at.write(a=rows, e=held)
    report = at.report(evaluate="e.jsonl")
    assert report.counts == {"duplicate": 1, "near_duplicate": 1, "leaked": 1, "nearly_leaked": 1}
    kept = {(): (rows, held), ("duplicate",): (rows[:2] + rows[3:], held), ("leaked",): (rows[:3] + rows[4:], held),
            ("near_duplicate",): (rows[:4], held), ("duplicate", "nearly_leaked"): (rows[1:2] + rows[3:], held),
            ("duplicate", "leaked"): (rows[:2] + rows[4:], held)}
    for codes, (train, evaluate) in kept.items():
        result = report.mend(leave_out=codes, to=at.path / "_".join(("new", *codes)))
        for file, want in zip(result.files, (train, evaluate)):
            assert [row.value for row in read_rows(file.path)] == want, codes
            assert file.rows == len(want)
        assert result.left_out == dict.fromkeys(codes, 1) and not set(result.report.counts) & set(codes)


def test_only_some_mends(at):
    gpt = {"messages": [{"role": "human", "content": "hi"}, {"role": "gpt", "content": "there"}]}
    at.write(a=[essay(1), gpt, chat("a", "b", "c")])
    result = at.report().mend(only=["roles"])
    assert [row.value for row in read_rows(result.files[0].path)] == [essay(1), chat("hi", "there")]
    assert [(line, code) for _, line, code, _ in result.dropped] == [(3, "ends_wrong")] and result.report.ok
    with pytest.raises(ValueError, match="no mend is called 'heal'"): at.report().mend(only=["heal"], overwrite=True)


def test_a_file_that_changed_is_not_mended(at):
    at.write(a=[essay(1), chat("a", "b", "c")], b=[essay(2)])
    report = at.report("a.jsonl,b.jsonl")
    at.write(b=[essay(3)])
    before = at.snapshot()
    with pytest.raises(ValueError, match="b.jsonl changed after it was validated; validate again"): report.mend()
    assert at.snapshot() == before


def test_the_new_files_are_tokenised_already(at, monkeypatch):
    at.write(a=[essay(1), chat("a", "b", "c"), essay(1), tool_chat(2)], e=[essay(2)])
    result = at.report(evaluate="e.jsonl").mend()
    monkeypatch.setattr("mistral_nb.data.store.write_store", lambda job: pytest.fail(f"{job.name} is read again"))
    again = validate(result.cfg, v3, world=1, progress=False)
    assert again.stats["datasets"] == result.report.stats["datasets"] and again.ok


def test_what_becomes_equal_by_mending_is_left_out_too(at):
    at.write(a=[chat("a", "b", "c"), chat("a", "b"), essay(1)], e=[chat("a", "b", "d"), chat("a", "b", "e"), essay(2)])
    result = at.report(evaluate="e.jsonl").mend()
    assert result.report.ok and not result.report.counts
    rows = [[row.value for row in read_rows(f.path)] for f in result.files]
    assert rows == [[essay(1)], [chat("a", "b"), essay(2)]]
    assert [f.rows for f in result.files] == [1, 2]


@MANY
@given(train=ROWS, more=ROWS, held_out=ROWS)
def test_mended_is_good_and_mending_twice_changes_nothing(fresh, train, more, held_out):
    at = fresh()
    at.write(d__a=[essay(100), *train], d__b=more, e=[essay(101), *held_out])
    before = at.snapshot()
    once = at.report("d", "e.jsonl").mend(to=at.path / "once")
    assert {p: text for p, text in at.snapshot().items() if p in before} == before
    agree(once.report)
    assert once.report.ok and not set(once.report.counts) & {"duplicate", "leaked"}
    for f in once.files: assert f.rows == len([*read_rows(f.path)])
    figures = once.report.stats["datasets"].values()
    assert sum(f["rows"] for f in figures) == sum(f.rows for f in once.files)
    twice = once.report.mend(to=at.path / "twice")
    assert not twice.changed and not twice.dropped and not any(twice.left_out.values())
    for a, b in zip(once.files, twice.files): assert a.path.read_bytes() == b.path.read_bytes()


# How long it trains

def train_tokens(report, steps):
    """Tokens that so many steps read."""
    names, loader = loader_of(report)
    return sum(round(epochs * stream.tokens) for epochs, stream in zip(loader.epochs(steps), loader.streams))


@pytest.mark.parametrize("seed", range(6))
def test_steps_for_epochs_against_counting(at, seed):
    rng = random.Random(seed)
    at.write(a=[essay(i, rng.randint(3, 300)) for i in range(rng.randint(5, 80))],
             b=[essay(i, rng.randint(3, 60)) for i in range(200, 200 + rng.randint(5, 120))])
    at.write(t=[{"text": "la " * rng.randint(5, 900)} for _ in range(rng.randint(1, 9))])
    more = {"batch_size": rng.randint(1, 2), "num_microbatches": rng.randint(1, 2)}
    train = f"a.jsonl,b.jsonl:{rng.choice([0.5, 1, 2])}"
    for max_steps in (1, 7, 100):
        report = at.report(train, texts="t.jsonl:0.3", max_steps=max_steps, **more)
        e = expected(report)
        assert e["train_tokens"] == train_tokens(report, max_steps)
        for n, steps in e["steps_for_epochs"].items():
            least = next(s for s in range(1, 100_000) if train_tokens(report, s) >= n * e["data_tokens"])
            assert abs(steps - least) <= 1, (max_steps, n, steps, least)


def test_speed_of_a_run(at):
    run = at.path / "run"
    assert measured_speed(run) is None
    for text, speed in [("", None), ('{"step": 1}\n', None), ('{"avg_wps": 100.5}\n', 100.5), ("{broken", None),
                        ('{"avg_wps": 1}\n{"avg_wps": 250}\n', 250), ("[]\n", None), ('{"avg_wps": null}\n', None),
                        ('{"avg_wps": 7}\n{"avg_w', 7), ('{"avg_wps": NaN}\n', None), ('{"avg_wps": 0}\n', None)]:
        at.file("run/metrics.train.jsonl", text.encode())
        assert measured_speed(run) == speed, text
    at.write(a=[essay(i) for i in range(9)])
    at.file("run/metrics.train.jsonl", b'{"avg_wps": 50}\n')
    report = at.report(max_steps=40)
    e = report.stats["expected"]
    seconds = round(e["train_tokens"] / 50) + 300
    assert report.tokens_per_second == 50 and report.speed_from == f"measured by the run in {run}"
    assert e["eta"] == f"{seconds // 3600:02}:{seconds % 3600 // 60:02}:{seconds % 60:02}"
    assert "measured by the run" in str(report)
    after = report.mend().report
    assert (after.tokens_per_second, after.speed_from) == (50, report.speed_from)
    assert at.report(speed=99.0).speed_from == "given" and at.report(speed=99.0).tokens_per_second == 99


def test_speeds_that_are_published(at, monkeypatch):
    at.file("params.json", json.dumps({"dim": 4096, "n_layers": 32}).encode())
    cfg = at.cfg().model_copy(update={"model_id_or_path": str(at.path)})
    for gpu, speed in [("NVIDIA A100", None), ("CPU, 2 threads", None), ("NVIDIA H100 80GB HBM3", 5720)]:
        monkeypatch.setattr("mistral_nb.device.device_name", lambda device, gpu=gpu: gpu)
        assert published_speed(at.path) == speed
        assert known_speed(cfg) == (speed, "published for an H100" if speed else "")
    for (dim, layers, experts), speed in H100.items():
        moe = {"moe": {"num_experts": experts, "num_experts_per_tok": 2}} if experts > 1 else {}
        at.file("params.json", json.dumps({"dim": dim, "n_layers": layers, **moe}).encode())
        assert published_speed(at.path) == speed
    at.file("params.json", b'{"dim": 64, "n_layers": 2}')
    assert published_speed(at.path) is None and published_speed(at.path / "nowhere") is None
