"""The commands on data, as a shell sees them: output, files, exit codes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mistral_nb.cli import main
from mistral_nb.config import TrainConfig


def chat(question, answer="yes", role="assistant"):
    return {"messages": [{"role": "user", "content": question}, {"role": role, "content": answer}]}


@pytest.fixture
def file(tmp_path, monkeypatch):
    """Three good rows, one that can be mended, one that cannot, and one that comes twice."""
    monkeypatch.setenv("MISTRAL_NB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    rows = [chat("1"), chat("2", role="gpt"), chat("3"), "oops", chat("4"), chat("1")]
    (tmp_path / "a.jsonl").write_text("".join((r if r == "oops" else json.dumps(r)) + "\n" for r in rows))
    return Path("a.jsonl")


def test_validate_ends_with_1_while_errors_remain(file, capsys):
    assert main(["validate", "--data", "a.jsonl"]) == 1
    out = capsys.readouterr()
    assert "1 × unknown_role" in out.out and "a.jsonl:4" in out.out and "2 errors, 1 warnings." in out.out
    assert "counted with the tokenizer of Mistral 7B v0.3" in out.err
    assert main(["validate", "--data", "a.jsonl", "--create-corrected"]) == 1
    assert main(["validate", "--data", "a.jsonl.corrected"]) == 0


def test_validate_as_json(file, capsys):
    assert main(["validate", "--data", "a.jsonl:2", "--json", "--seq-len", "64"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["ok"] is False and told["error_counts"] == {"unknown_role": 1, "not_json": 1}
    assert [(e["line"], e["mend"]) for e in told["errors"]] == [(2, "roles"), (4, "")]
    assert told["warnings"][0]["code"] == "duplicate" and told["stats"]["datasets"]["a.jsonl"]["rows"] == 6


def test_validate_saves_reports_with_errors_and_with_held_out_data(file, capsys):
    args = ["validate", "--data", "a.jsonl", "--eval-data", "a.jsonl.corrected", "--save_reports", "out"]
    main(["validate", "--data", "a.jsonl", "--create_corrected"])
    assert main(args) == 1
    files = sorted(p.name for p in Path("out").iterdir())
    assert files == ["problems.jsonl", "report.html", "report.json", "report.txt"]
    problems = [json.loads(line) for line in Path("out/problems.jsonl").read_text().splitlines()]
    assert {"leaked", "not_json", "unknown_role"} <= {p["code"] for p in problems}
    assert Path("out/report.html").read_text().startswith("<!doctype html>")
    assert json.loads(Path("out/report.json").read_text())["warning_counts"]["leaked"] == 4


def test_mend_writes_new_files_and_their_config(file, capsys):
    before = file.read_bytes()
    assert main(["mend", "--data", "a.jsonl:0.5", "--to", "clean", "--write-config", "c.yaml"]) == 0
    assert file.read_bytes() == before and "left out: 1 × duplicate" in capsys.readouterr().out
    assert TrainConfig.load("c.yaml").data.instruct_data == "clean/a.mended.jsonl:0.5"
    rows = [json.loads(line) for line in Path("clean/a.mended.jsonl").read_text().splitlines()]
    assert rows == [chat("1"), chat("2"), chat("3"), chat("4")]
    assert main(["mend", "--data", "a.jsonl", "--to", "clean"]) == 1
    assert "exists already" in capsys.readouterr().err
    assert main(["mend", "--data", "a.jsonl", "--to", "clean", "--overwrite", "--only", "nonsense"]) == 1
    assert "no mend is called 'nonsense'" in capsys.readouterr().err
    assert main(["mend", "--list"]) == 0 and "rename roles" in capsys.readouterr().out


def test_reformat_writes_a_new_file(file, capsys):
    Path("b.json").write_text(json.dumps([{"instruction": "Say hi", "input": "", "output": "hi"}]))
    assert main(["reformat", "b.json"]) == 0 and "1 taken for Alpaca" in capsys.readouterr().out
    assert json.loads(Path("b.mistral.jsonl").read_text()) == chat("Say hi", "hi")
    assert main(["reformat", "b.json"]) == 1 and "exists already" in capsys.readouterr().err
    assert main(["reformat", "b.json", "--overwrite"]) == 0


@pytest.mark.parametrize("words", [["validate"], ["validate", "c.yaml", "--data", "a.jsonl"], ["mend"]])
def test_a_config_or_data(file, capsys, words):
    assert main(words) == 1 and "either a config or --data" in capsys.readouterr().err


def test_whoever_reads_may_stop(file):
    code = "from mistral_nb.cli import main; import sys; sys.exit(main(['validate', '--data', 'a.jsonl', '--json']))"
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    child.stdout.close()
    assert child.wait(60) == 1 and "Traceback" not in child.stderr.read()
    child.stderr.close()
