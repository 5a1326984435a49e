"""The report lists every fault of every file, counts truly, and changes nothing that it did not make."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from mistral_nb.config import TrainConfig
from mistral_nb.data.convert import convert
from mistral_nb.data.convert import write_jsonl
from mistral_nb.data.loader import load_data
from mistral_nb.data.report import validate
from mistral_nb.data.source import SourceError
from mistral_nb.data.source import read_rows
from mistral_nb.data.store import CacheError
from mistral_nb.data.store import DataError
from mistral_nb.data.tokenize import encode_all

v3 = MistralTokenizer.v3()


def chat(question, answer="yes", **more):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer, **more}]}


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Writes files and gives the config over them."""
    monkeypatch.setenv("MISTRAL_NB_CACHE", str(tmp_path / "cache"))

    def config(files, data, **settings):
        for name, rows in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            lines = [r if isinstance(r, bytes) else json.dumps(r, ensure_ascii=False).encode() for r in rows]
            (tmp_path / name).write_bytes(b"".join(line + b"\n" for line in lines))
        data = {k: ",".join(f"{tmp_path}/{part}" for part in v.split(",")) for k, v in data.items()}
        return TrainConfig(model_id_or_path="m", run_dir="r", data=data, **{"seq_len": 64, **settings})
    return config


def checked(cfg, **more):
    return validate(cfg, v3, progress=False, **more)


def test_every_fault_of_every_file(make, tmp_path):
    bad = [b'{"messages": ', {"messages": None}, [1], b"3", b"null", {"messages": [{"role": "bot", "content": "x"}]},
           chat("a", ""), {"messages": [{"role": "user", "content": 5}]}, b'{"messages": "\xff"}', {"text": "a text"},
           chat("a", "b", weight=2)]
    files = {"a.jsonl": [chat("1"), *bad[:4], chat("2"), b"", *bad[4:]], "b.jsonl": [chat("3")],
             "t.jsonl": [{"text": "x"}, {"text": 3}], "e.jsonl": [chat("4"), {"messages": []}]}
    data = {"instruct_data": "a.jsonl,b.jsonl:2", "data": "t.jsonl", "eval_instruct_data": "e.jsonl"}
    report = checked(make(files, data))
    errors = report.errors
    assert list(errors.columns) == ["file", "line", "code", "field", "message", "mend"]
    lines = errors.groupby("file").line.apply(list).to_dict()
    want = {"a": [2, 3, 4, 5, 8, 9, 10, 11, 12, 13, 14], "t": [2], "e": [2]}
    assert lines == {f"{tmp_path}/{name}.jsonl": numbers for name, numbers in want.items()}
    assert not report.ok and errors.code[0] == "not_json" and "unknown_role" in set(errors.code) and all(errors.message)
    shown = str(report)
    assert f"{tmp_path}/a.jsonl:2" in shown and "13 errors" in shown and "× unknown_role" in shown


def test_workers_find_the_same(make):
    rows = [chat(str(i)) if i % 7 else {"messages": i} for i in range(600)]
    cfg = make({"a.jsonl": rows}, {"instruct_data": "a.jsonl"})
    one, two = checked(cfg, workers=1), checked(cfg, workers=2)
    assert one.errors.equals(two.errors) and len(one.errors) == 86 and one.stats == two.stats
    assert one.warnings.equals(two.warnings)


def test_figures_by_hand(make, tmp_path):
    rows = [chat(f"{i}?", "no " * (i % 5)) for i in range(1, 30) if i % 5]
    rows += [chat("none", weight=0), chat("long", "la " * 200)]
    files, sizes = {"a.jsonl": rows, "t.jsonl": [{"text": "word " * 300}]}, {"batch_size": 2, "num_microbatches": 3}
    cfg = make(files, {"instruct_data": "a.jsonl:2", "data": "t.jsonl:1"}, max_steps=50, **sizes)
    report = checked(cfg, world=2, tokens_per_second=100)
    samples = [s for row in rows for s in encode_all(row, v3)]
    [text] = encode_all({"text": "word " * 300}, v3, "pretrain")
    a, t = report.stats["datasets"].values()
    assert a == {"use": "train", "kind": "instruct", "rows": len(rows), "bad_rows": 0, "samples": len(rows),
                 "tokens": sum(len(s.ids) - 1 for s in samples),
                 "trained_tokens": sum(int(s.mask.sum()) for s in samples),
                 "longest": max(len(s.ids) for s in samples) - 1,
                 "cut_samples": 1, "lost_tokens": len(samples[-1].ids) - 1 - 64,
                 "dropped_samples": 0, "untrained_samples": 1, "packs": a["packs"],
                 "fill": round(a["used_tokens"] / a["packs"] / 64, 4),
                 "used_tokens": sum(min(64, len(s.ids) - 1) for s in samples if s.mask.any())}
    assert t["tokens"] == t["used_tokens"] == t["trained_tokens"] == len(text.ids) - 1 and t["cut_samples"] == 0
    e, names = report.stats["expected"], [f"{tmp_path}/a.jsonl", f"{tmp_path}/t.jsonl"]
    with pytest.warns(UserWarning): loader, _ = load_data(cfg, v3, world=2)
    read = {n: 0 for n in names}
    for step in range(50):
        for rank in range(2):
            for m in range(3):
                batch = loader.batch(step, rank, m)
                for row, length in zip(batch.rows, batch.seqlens): read[row.rpartition(":")[0]] += length
    assert e["max_steps"] == 50 and e["data_tokens"] == a["used_tokens"] + t["used_tokens"]
    for name in names: assert e["train_tokens_per_dataset"][name] == pytest.approx(read[name], abs=64)
    assert read[names[0]] / sum(read.values()) == pytest.approx(2 / 3, abs=0.01)
    assert e["epochs_per_dataset"][names[1]] == pytest.approx(read[names[1]] / t["used_tokens"], abs=0.1)
    seconds = e["train_tokens"] / 2 / 100 + 300
    assert e["eta"] == f"{int(seconds // 3600):02}:{int(seconds // 60 % 60):02}:{round(seconds) % 60:02}"
    said = report.warnings.set_index("code")
    lost = len(samples[-1].ids) - 1 - 64
    assert said.message["too_long"].startswith(f"{lost + 64} tokens long, seq_len is 64: {lost} tokens are lost")
    assert said.line["nothing_trained"] == len(rows) - 1 and "have nothing to train on" in str(report)


def test_the_figures_are_of_the_good_rows(make):
    good = [chat(str(i)) for i in range(20)]
    clean, dirty = {"a.jsonl": good}, {"a.jsonl": [{"messages": 1}, *good[:7], b"x", *good[7:]]}
    one, two = (checked(make(files, {"instruct_data": "a.jsonl"})).stats for files in (clean, dirty))
    a, b = (next(iter(s["datasets"].values())) for s in (one, two))
    assert one["expected"] == two["expected"] and {**a, "rows": 22, "bad_rows": 2} == b


def test_nothing_is_read_twice(make, tmp_path, monkeypatch):
    cfg = make({"a.jsonl": [chat("1")], "b.jsonl": [chat("2"), {}]}, {"instruct_data": "a.jsonl,b.jsonl"})
    first = checked(cfg)
    monkeypatch.setattr("mistral_nb.data.store.write_store", lambda job: pytest.fail("read again"))
    again = checked(cfg)
    assert again.errors.equals(first.errors) and again.stats == first.stats and again.counts == first.counts
    with pytest.raises(DataError, match="b.jsonl:2"): load_data(cfg, v3)
    cfg.data.instruct_data = str(tmp_path / "a.jsonl")
    assert len(load_data(cfg, v3)[0].streams) == 1


@pytest.mark.parametrize("rows, code", [
    ([], "no_samples"), ([b"", b"  "], "no_samples"),
    ([chat("1", weight=0)], "nothing_trained"), ([chat("la " * 90)], "nothing_trained")])
def test_data_that_cannot_be_trained_on_is_an_error(make, rows, code):
    report = checked(make({"a.jsonl": rows}, {"instruct_data": "a.jsonl"}))
    assert not report.ok and [(p.code, p.line) for p in report.problems if p.level == "error"] == [(code, 0)]
    assert report.stats["expected"] == {"max_steps": 100}
    assert "1 errors" in str(report) and "<table" in report._repr_html_()


def test_sources_that_are_not_there(make):
    with pytest.raises(SourceError): checked(make({}, {"instruct_data": "a.jsonl"}))
    with pytest.raises(ValueError, match="no training data"): checked(make({}, {}))


def test_a_cache_that_cannot_be_written(make, tmp_path, monkeypatch):
    cfg = make({"a.jsonl": [chat("1")]}, {"instruct_data": "a.jsonl"})
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MISTRAL_NB_CACHE", str(tmp_path / "file"))
    with pytest.raises(CacheError, match="MISTRAL_NB_CACHE"): checked(cfg)


def test_a_folder_and_corrected_files(make, tmp_path):
    files = {"d/a.jsonl": [chat("é"), {}, chat("2")], "d/deep/b.JSONL": [b"\xff", chat("3")],
             "d/c.jsonl": [chat("4")], "d/x.txt": [b"no"]}
    cfg = make(files, {"instruct_data": "d"})
    before = {p: p.read_bytes() for p in (tmp_path / "d").rglob("*") if p.is_file()}
    report = checked(cfg)
    assert [(Path(p.file).name, p.line) for p in report.problems] == [("a.jsonl", 2), ("b.JSONL", 1)]
    new = report.write_corrected()
    assert [p.name for p in new] == ["a.jsonl.corrected", "b.JSONL.corrected"]
    assert [r.value for r in read_rows(new[0])] == [chat("é"), chat("2")] and "é".encode() in new[0].read_bytes()
    assert all(p.read_bytes() == text for p, text in before.items())
    cfg.data.instruct_data = ",".join(map(str, new))
    assert checked(cfg).ok and checked(cfg).write_corrected() == []


def test_a_file_that_changed_is_not_corrected(make, tmp_path):
    cfg = make({"a.jsonl": [chat("1"), {}]}, {"instruct_data": "a.jsonl"})
    report = checked(cfg)
    (tmp_path / "a.jsonl").write_text("{}\n" + json.dumps(chat("1")))
    with pytest.raises(ValueError, match="changed after it was validated"): report.write_corrected()
    assert not (tmp_path / "a.jsonl.corrected").exists()


def test_nothing_in_a_row_reaches_the_page(make):
    evil = "<script>alert(1)</script>"
    rows = [{"messages": [{"role": evil, "content": "x"}]}, {"messages": [{"role": "user", "content": evil}], evil: 1}]
    report = checked(make({"a<b>.jsonl": rows}, {"instruct_data": "a<b>.jsonl"}))
    page = report._repr_html_()
    assert "<script" not in page and "a<b>" not in page and "&lt;script&gt;" in page and len(report.errors) == 2


def test_many_errors_on_a_page(make):
    page = checked(make({"a.jsonl": [{}] * 250}, {"instruct_data": "a.jsonl"}))._repr_html_()
    assert len(page) < 100_000 and "250 errors" in page


def test_one_file_for_training_and_evaluation(make, tmp_path):
    report = checked(make({"a.jsonl": [chat("1")]}, {"instruct_data": "a.jsonl", "eval_instruct_data": "a.jsonl"}))
    name = f"{tmp_path}/a.jsonl"
    assert list(report.stats["datasets"]) == [f"{name} (train, instruct)", f"{name} (eval, instruct)"]


def test_real_rows(make, shared, tmp_path):
    rows = convert(shared / "data" / "llama-factory" / "glaive_toolcall_en_demo.json")
    write_jsonl(rows, tmp_path / "glaive.jsonl")
    report = checked(make({}, {"instruct_data": "glaive.jsonl"}, seq_len=16384))
    [figures] = report.stats["datasets"].values()
    assert report.ok and figures["rows"] == 300 and figures["samples"] >= 300
    assert report.counts["duplicate"] == 35


def test_a_c_locale(make, tmp_path):
    cfg = make({"a.jsonl": [chat("é"), {"messages": [{"role": "böt"}]}]}, {"instruct_data": "a.jsonl"})
    cfg.save(tmp_path / "cfg.yaml")
    code = ("import sys; from mistral_nb.config import TrainConfig; from mistral_nb.data.report import validate\n"
            "from mistral_common.tokens.tokenizers.mistral import MistralTokenizer\n"
            "r = validate(TrainConfig.load(sys.argv[1]), MistralTokenizer.v3(), progress=False)\n"
            "r.write_corrected(); print(ascii(str(r)))")
    env = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0",
           "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    out = subprocess.run([sys.executable, "-c", code, tmp_path / "cfg.yaml"], env=env, capture_output=True, text=True)
    assert ascii("böt")[1:-1] in out.stdout, out.stderr
    assert (tmp_path / "a.jsonl.corrected").read_bytes().count("é".encode()) == 1
