"""The road from rows to batches: processor time, memory, packing and waiting, beside raw tokenizer calls.

    python benchmarks/data.py --chats chat50k.jsonl --tools tools2k.jsonl --out benchmarks/results/data.json
    python benchmarks/data.py --tiny                       # does it run? rows made up, figures without meaning

`--chats` is a file of plain chats and `--tools` one of function-calling chats. Every figure comes from fresh processes.
Processor time counts the process and its children, without imports; the raw calls encode the same strings with
mistral-common's own tokenizer. Peaks are the highest sum of proportional set sizes (PSS) of all processes of a case,
looked at from outside every 50 ms.
"""

import argparse
import json
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOKENIZERS = {"SentencePiece v3": "mistral_instruct_tokenizer_240323.model.v3", "tekken": "tekken_240911.json"}


def read_tokenizer(name: str):
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    from mistral_nb.data.tokenize import PACKAGE
    return MistralTokenizer.from_file(PACKAGE / TOKENIZERS[name])


def processor_time() -> float:
    """Seconds of this process and of its children that have ended."""
    used = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(u.ru_utime + u.ru_stime for u in used)


def config(file: str, **settings):
    from mistral_nb.config import TrainConfig
    return TrainConfig.from_dict({"model_id_or_path": "m", "run_dir": "r", "data.instruct_data": file,
                                  "seq_len": 2048, **settings})


# The cases: each runs in a process of its own and prints a dict ------------------------------------------------------

def raw(file: str, tokenizer: str) -> dict:
    """Encode every content with mistral-common's tokenizer, and nothing else."""
    base = read_tokenizer(tokenizer).instruct_tokenizer.tokenizer
    rows = [json.loads(line) for line in open(file, encoding="utf-8")]
    texts = [m["content"] for row in rows for m in row["messages"] if m.get("content")]
    begin, tokens = processor_time(), 0
    for text in texts: tokens += len(base.encode(text, bos=False, eos=False))
    return {"cpu_s": processor_time() - begin, "strings": len(texts), "tokens": tokens}


def validate(file: str, tokenizer: str, workers: str = "1") -> dict:
    """Validate a file and keep its store."""
    from mistral_nb.data.report import validate as read
    made = read_tokenizer(tokenizer)
    begin, clock = processor_time(), time.perf_counter()
    report = read(config(file), made, world=1, workers=int(workers), progress=False)
    out = {"cpu_s": processor_time() - begin, "wall_s": time.perf_counter() - clock}
    return {**out, "rows": report.parts[0].rows, "errors": len(report.errors), "counts": report.counts,
            "tokens": report.stats["datasets"][file]["tokens"]}


def first_batch(file: str) -> dict:
    """From `train()` to its first batch, the store being there."""
    from mistral_nb.data.loader import TrainLoader
    from mistral_nb.demo import demo_config
    from mistral_nb.run import train

    class Reached(BaseException): pass

    def batch(self, *where):
        real(self, *where)
        raise Reached
    real, TrainLoader.batch = TrainLoader.batch, batch
    folder, seconds = tempfile.mkdtemp(), []
    for i in range(3):  # the first makes the store; the others find it
        cfg = demo_config(f"{folder}/{i}")
        cfg.data.instruct_data, cfg.seq_len, cfg.no_eval = file, 2048, True
        begin = time.perf_counter()
        try: train(cfg)
        except Reached: seconds.append(time.perf_counter() - begin)
    return {"cold_s": seconds[0], "warm_s": seconds[1:]}


def packing(file: str, seq_len: str) -> dict:
    """Pack a file's samples, then a million made-up lengths."""
    import numpy as np

    from mistral_nb.data.loader import pieces_of
    from mistral_nb.data.pack import plan_packs
    from mistral_nb.data.source import Source
    from mistral_nb.data.store import build_store
    store, seq_len = build_store(Source(Path(file)), read_tokenizer("SentencePiece v3"), progress=False), int(seq_len)
    pieces = pieces_of(store, seq_len)
    plan = plan_packs(pieces.length, seq_len)
    fits = (store.lengths - 1 <= seq_len) & (store.trained > 0)
    whole = set(pieces.sample[(pieces.start == 0) & (pieces.length == store.lengths[pieces.sample] - 1)].tolist())
    many = np.random.default_rng(0).choice(pieces.length, 1_000_000)
    begin = time.perf_counter()
    plan_packs(many, seq_len).epoch(np.random.default_rng(0))
    return {"fill": float(pieces.length.sum() / plan.num_packs / seq_len), "cut": pieces.cut,
            "cut_that_fit": len(set(np.flatnonzero(fits).tolist()) - whole), "million_s": time.perf_counter() - begin}


def context(file: str) -> dict:
    """The tokens of a file's samples in exact context, and as the reference chunks them."""
    from mistral_nb.data.tokenize import encode_all
    made = read_tokenizer("SentencePiece v3")
    rows = [json.loads(line) for line in open(file, encoding="utf-8")]
    exact, chunked = ([s for row in rows for s in encode_all(row, made, exact_context=e)] for e in (True, False))
    tokens = [sum(len(s.ids) for s in samples) for samples in (exact, chunked)]
    trained = [sum(s.num_trained for s in samples) for samples in (exact, chunked)]
    return {"rows": len(rows), "samples": [len(exact), len(chunked)], "tokens": tokens, "trained": trained,
            "ratio": tokens[0] / tokens[1]}


CASES = {f.__name__: f for f in (raw, validate, first_batch, packing, context)}

# Running them from outside -------------------------------------------------------------------------------------------


def family(pid: int) -> list[int]:
    """A process and all below it."""
    try: children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError: return [pid]
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try: children += [c for c in task.read_text().split() if c not in children]
        except OSError: continue
    return [pid, *(p for child in children for p in family(int(child)))]


def proportional(pid: int) -> int:
    """The proportional set size of a process in bytes."""
    try: lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError: return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)


def run(case: str, *args: str, cache: str | None = None) -> dict:
    """One case in a fresh process: what it prints, and its peak memory in MB."""
    with tempfile.TemporaryDirectory() as fresh:
        env = {**os.environ, "MISTRAL_NB_CACHE": cache or fresh, "OMP_NUM_THREADS": "1",
               "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
        child = subprocess.Popen([sys.executable, __file__, "--case", case, *map(str, args)], env=env, cwd=fresh,
                                 stdout=subprocess.PIPE, text=True)
        peak, over = 0, threading.Event()

        def watch():
            nonlocal peak
            while not over.wait(0.05): peak = max(peak, sum(map(proportional, family(child.pid))))
        watcher = threading.Thread(target=watch)
        watcher.start()
        text = child.communicate()[0]
        over.set(), watcher.join()
    if child.returncode: raise SystemExit(f"{case} {' '.join(map(str, args))} ended with {child.returncode}")
    return {**json.loads(text.splitlines()[-1]), "peak_mb": peak / 1e6}


def tenfold(file: Path, out: Path) -> Path:
    """Ten times the rows of `file`, each with a number edited in."""
    lines, rng = file.read_bytes().splitlines(keepends=True), random.Random(0)
    with open(out, "wb") as f:
        for _ in range(10):
            for line in lines:
                f.write(line.replace(b'"content": "', b'"content": "(no. %d) ' % rng.randrange(10**7), 1))
    return out


def made_up(folder: Path) -> tuple[Path, Path]:
    """Small files to try the script on."""
    rng, words = random.Random(0), "to be or not that is the question whether nobler in mind suffer".split()
    say = lambda role: {"role": role, "content": " ".join(rng.choices(words, k=rng.randint(3, 60)))}
    chats = [{"messages": [say("user"), say("assistant")]} for _ in range(300)]
    tool = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}
    call = {"id": "AbCdEfGh1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    turn = lambda: [say("user"), {"role": "assistant", "tool_calls": [call]},
                    {"role": "tool", "tool_call_id": "AbCdEfGh1", "content": "ok"}, say("assistant")]
    tools = [{"messages": turn() + turn(), "tools": [tool]} for _ in range(30)]
    for name, rows in (("chats", chats), ("tools", tools)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder / "chats.jsonl", folder / "tools.jsonl"


def machine() -> dict:
    names = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
    return {"cpu": names[0] if names else "", "cores": len(names), "load_at_start": os.getloadavg()[0],
            "python": platform.python_version()}


def measure(chats: Path, tools: Path, rounds: int, ten: bool) -> dict:
    """All figures."""
    out = {"machine": machine(), "tokenizers": {}}
    for name in TOKENIZERS:
        turns = [(run("raw", chats, name), run("validate", chats, name)) for _ in range(rounds)]
        ratios = sorted(v["cpu_s"] / r["cpu_s"] for r, v in turns)
        out["tokenizers"][name] = {"raw": [r for r, _ in turns], "validate": [v for _, v in turns],
                                   "ratio": ratios[len(ratios) // 2]}
    out["two workers"] = run("validate", chats, "SentencePiece v3", 2)
    out["tools"] = {case: run(case, tools, "SentencePiece v3") for case in ("raw", "validate")}
    out["first batch"], out["context"] = run("first_batch", chats), run("context", tools)
    out["packing"] = {n: run("packing", chats, n) for n in (2048, 32768)}
    if ten:
        with tempfile.TemporaryDirectory() as folder:
            big = tenfold(chats, Path(folder) / "ten.jsonl")
            out["tenfold"] = {w: run("validate", big, "SentencePiece v3", w) for w in (1, 2)}
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--chats", type=Path)
    parser.add_argument("--tools", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-tenfold", action="store_true", help="leave out the runs on ten times the chats")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    if args.case: return print(json.dumps(CASES[args.case[0]](*args.case[1:])))
    if not args.tiny and not (args.chats and args.tools): parser.error("name the files: --chats and --tools, or --tiny")
    with tempfile.TemporaryDirectory() as folder:
        chats, tools = made_up(Path(folder)) if args.tiny else (args.chats.resolve(), args.tools.resolve())
        figures = measure(chats, tools, 1 if args.tiny else args.rounds, not args.no_tenfold)
    text = json.dumps(figures, indent=1)
    if args.out: args.out.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__": main()
