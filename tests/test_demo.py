"""The demo: its tools, its rows, the shipped model, and the road from config to result."""

import hashlib
import json
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch

from mistral_nb import demo
from mistral_nb.config import TrainConfig
from mistral_nb.data.tokenize import encode_all
from mistral_nb.data.tokenize import load_tokenizer
from mistral_nb.data.tokenize import parse_tool_calls
from mistral_nb.weights.checkpoint import check_folder

PACKED = Path(str(files("mistral_nb"))) / "demo_model"
shipped = pytest.mark.skipif(not (PACKED / "weights.safetensors").is_file(),
                             reason="mistral_nb/demo_model is not made yet: python scripts/make_demo_model.py")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "params.json").write_text('{"vocab_size": 32768}')
    with pytest.warns(UserWarning, match="packaged"): return load_tokenizer(folder)


@pytest.mark.parametrize("call, expected", [
    (("convert", {"value": 1, "unit": "miles", "to": "km"}), {"value": 1.609, "unit": "km"}),
    (("calendar", {"date": "2024-02-28", "days": 2}), {"date": "2024-03-01", "weekday": "Friday"}),
    (("calendar", {"date": "2024-03-01", "days": -1}), {"date": "2024-02-29", "weekday": "Thursday"}),
    (("calculate", {"expression": "-3 + 2.5 * 4"}), {"value": 7})])
def test_tools_compute(call, expected):
    assert demo.call_tool(dict(zip(("name", "arguments"), call))) == expected


@pytest.mark.parametrize("name, arguments, said", [
    ("convert", {"value": 1, "unit": "miles", "to": "kg"}, "cannot convert"),
    ("convert", {"value": "x", "unit": "miles", "to": "km"}, ""),
    ("calendar", {"date": "yesterday", "days": 1}, "2027-03-09"),
    ("calendar", {"date": "2024-03-01", "days": 10 ** 12}, ""),
    ("calculate", {"expression": "__import__('os')"}, "expected numbers"),
    ("calculate", {"expression": "9 ** 9 ** 9"}, "expected numbers"),
    ("calculate", {"expression": "1 / 0"}, "expected numbers"),
    ("calculate", {"expression": "1e999"}, ""),
    ("calculate", {}, ""),
    ("shell", {}, "no tool")])
def test_a_wrong_call_is_told_and_never_raised(name, arguments, said):
    assert said in demo.call_tool({"name": name, "arguments": arguments})["error"]


def test_questions_are_the_same_every_time_and_never_in_both_sets():
    training = demo.questions(4000, seed=1)
    held_out = demo.held_out_questions(200)
    assert held_out == demo.held_out_questions(200)
    assert len({q.text for q in training}) == 4000 and len({q.text for q in held_out}) == 200
    assert not {q.text for q in training} & {q.text for q in held_out}


def test_the_data_files_hold_those_questions(tmp_path):
    training, held_out = demo.demo_data(tmp_path, num_train=30, num_eval=9)
    ask = lambda path: [json.loads(line)["messages"][0]["content"] for line in path.open(encoding="utf-8")]
    assert ask(training) == [q.text for q in demo.questions(30, seed=1)]
    assert ask(held_out) == [q.text for q in demo.questions(9, seed=2, without=demo.questions(30, seed=1))]


def test_every_row_trains_its_call_once(tokenizer):
    """In a sample that ends with it, or in one that goes on; of a quarter of the whole rows the call has its own."""
    calls = []
    for i, q in enumerate(demo.questions(60, seed=5)):
        for whole in (True, False):
            samples = encode_all(demo.as_row(q, i, whole), tokenizer)
            assert all(len(sample.ids) < 330 for sample in samples)
            calls.append([parse_tool_calls(s.ids[s.mask], tokenizer) for s in samples])
            if not whole or len(samples) == 2: assert sum(calls[-1], []) == [q.call]
    assert {len(c) for c in calls[1::2]} == {1} and 5 < sum(len(c) == 2 for c in calls[::2]) < 30


def test_answers_are_what_the_tool_says():
    for q in demo.questions(300, seed=6):
        result = demo.call_tool(q.call)
        assert str(result["weekday"] if q.name == "calendar" else result["value"]) in q.answer


def test_filled_rows_are_the_same_on_every_machine():
    used = np.array([3, 4])
    table = demo.filled(used, torch.ones(2, 8, dtype=torch.bfloat16), torch.zeros(8), 0.25, 50)
    assert table[used].eq(1).all() and table.dtype == torch.bfloat16
    digest = hashlib.sha256(table.float().numpy().tobytes()).hexdigest()[:16]
    assert digest == DIGEST


DIGEST = "09dc4e41f6511cc8"


@shipped
def test_the_shipped_model_is_small_and_unpacks_once(tmp_path, monkeypatch):
    assert sum(f.stat().st_size for f in PACKED.iterdir()) <= 12_000_000
    monkeypatch.setenv("MISTRAL_NB_CACHE", str(tmp_path))
    folder = demo.demo_model()
    assert folder.parent == tmp_path and check_folder(folder).tokenizer.name == "tokenizer.model.v3"
    made = (folder / "consolidated.safetensors").stat().st_mtime_ns
    assert demo.demo_model() == folder and (folder / "consolidated.safetensors").stat().st_mtime_ns == made
    assert check_folder(folder).args.n_kv_heads < check_folder(folder).args.n_heads


def test_a_package_without_the_model_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "files", lambda _: tmp_path)
    with pytest.raises(ValueError, match="make_demo_model"): demo.demo_model()


@shipped
def test_a_written_config_is_ready_to_train_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = demo.write_demo_config("some/cfg.yaml", max_steps=3)
    monkeypatch.chdir("/")
    cfg = TrainConfig.load(path)
    cfg.check_ready()
    assert cfg.max_steps == 3
    assert all(Path(p).is_absolute() for p in (cfg.run_dir, cfg.model_id_or_path, cfg.data.instruct_data))
    assert Path(cfg.data.instruct_data).is_file() and Path(cfg.data.eval_instruct_data).is_file()


@shipped
def test_the_demo_runs_and_shows_itself_in_both_forms(tmp_path):
    result = demo.run_demo(tmp_path, max_steps=2, num_questions=6)
    assert result.base.exact == 0 and result.tuned.num == 6
    assert result.plot.read_bytes().startswith(b"\x89PNG") and result.run.adapter.is_file()
    for word in ("exact tool calls", "held-out loss", "before training", str(result.plot), str(result.run.adapter)):
        assert word in str(result)
    result.before[1] = demo.Turn("assistant", "<script>alert(1)</script>")
    assert "<script>" not in result._repr_html_()
