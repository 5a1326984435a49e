"""The benchmarks run, at tiny size, and write what they promise. Their figures mean nothing here."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(script, *args):
    done = subprocess.run([sys.executable, str(ROOT / "benchmarks" / script), "--tiny", *map(str, args)], text=True,
                          capture_output=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(not all(importlib.util.find_spec(name) for name in ("transformers", "peft")),
                    reason="needs transformers and peft to compare with")
def test_train_cpu(tmp_path):
    run("train_cpu.py", "--out", tmp_path / "out.json", "--rounds", 1, "--warmups", 1, "--threads", 1, "--only", 1,
        "--precisions", "medium")
    case, = json.loads((tmp_path / "out.json").read_text())["cases"]
    assert [(v["library"], v["precision"]) for v in case["variants"]] == [("mistral_nb", "medium"),
                                                                          ("transformers+peft", "medium")]
    assert all(v["tokens_per_s"] > 0 and len(v["losses"]) == 2 for v in case["variants"])
    assert [r["precision"] for r in case["ratios"]] == ["medium"]


def test_gpu(tmp_path):
    run("gpu.py", "--device", "cpu", "--out", tmp_path / "out.json")
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["machine"]["product_tflops"] > 0 and [r["tokens"] for r in report["results"]] == [70, 200]
    for result in report["results"]:
        assert result["tokens_per_s"] > 0 and 0 < result["model_flops_utilisation"] < result["with_recomputation"] < 1


def test_gpu_needs_no_more_than_torch_and_the_model():
    """On a borrowed machine with a card there may be nothing but torch: no pydantic, no tokenizer, no tables."""
    code = ("import sys; sys.argv = ['gpu.py', '--help']\n"
            "try: import runpy; runpy.run_path('gpu.py', run_name='__main__')\n"
            "except SystemExit: print(*sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, cwd=ROOT / "benchmarks")
    loaded = set(done.stdout.splitlines()[-1].split())
    assert "torch" in loaded and not loaded & {"pydantic", "mistral_common", "pandas", "pyarrow", "yaml", "safetensors"}


def test_data(tmp_path, monkeypatch):
    """Each case in this process; from outside one, for its peak."""
    spec = importlib.util.spec_from_file_location("bench_data", ROOT / "benchmarks" / "data.py")
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    monkeypatch.setenv("MISTRAL_NB_CACHE", str(tmp_path / "cache"))
    chats, tools = map(str, bench.made_up(tmp_path))
    raw, seen = (bench.CASES[case](chats, "SentencePiece v3") for case in ("raw", "validate"))
    assert raw["strings"] == 600 and (seen["rows"], seen["errors"]) == (300, 0) and seen["tokens"] > raw["tokens"]
    packed, context = bench.packing(chats, "2048"), bench.context(tools)
    assert 0.9 < packed["fill"] <= 1 and packed["cut"] == packed["cut_that_fit"] == 0
    assert context["tokens"][0] < context["tokens"][1] and context["ratio"] < 1
    assert len(bench.tenfold(tmp_path / "chats.jsonl", tmp_path / "ten.jsonl").read_bytes().splitlines()) == 3000
    assert bench.run("raw", chats, "SentencePiece v3")["peak_mb"] > 20
