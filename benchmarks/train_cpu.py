"""Training on a CPU beside transformers + peft: tokens a second and peak memory of the same steps on the same weights.

    python benchmarks/train_cpu.py --out benchmarks/results/train_cpu.json      # on a quiet machine
    python benchmarks/train_cpu.py --threads 1 --clock cpu                      # on one that is busy with other work
    python benchmarks/train_cpu.py --tiny                                       # does it run? figures without meaning

Each configuration runs in four fresh processes: each library with torch's default precision of float32 products, and
with "medium". All warm up, then take single steps in turn, so that whatever else the machine does falls on all alike.
Tokens a second are medians; a ratio is the median of the ratios within each turn. The losses of all four must agree.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import zlib
from dataclasses import asdict
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BETAS, EPS, LR, DECAY, MAX_NORM, SCALING = (0.9, 0.95), 1e-8, 1e-4, 0.1, 1.0, 2.0


@dataclass(frozen=True)
class Sizes:
    """The model, the adapters and the packed batch."""
    dim: int = 512
    n_layers: int = 8
    head_dim: int = 64
    n_heads: int = 8
    n_kv_heads: int = 2
    hidden_dim: int = 1792
    rank: int = 16
    segments: tuple[int, ...] = (37, 412, 128, 256, 91, 333, 64, 487, 150, 90)
    top_id: int = 32768  # random ids are below it, whatever the vocabulary

    @property
    def tokens(self) -> int: return sum(self.segments)


TINY = Sizes(24, 2, 6, 4, 2, 40, 3, (5, 11, 7), 61)


@dataclass(frozen=True)
class Case:
    """One configuration of the training step."""
    dtype: str
    checkpointing: bool
    vocab: int

    def __str__(self) -> str:
        return f"{self.dtype}{' + checkpointing' * self.checkpointing}, vocabulary {self.vocab}"


CASES = [Case("float32", False, 32768), Case("float32", True, 32768), Case("bfloat16", True, 32768),
         Case("bfloat16", True, 131072)]
TINY_CASES = [Case("float32", False, 61), Case("bfloat16", True, 97)]


# The workload: every process makes the same numbers


def make_batch(sizes: Sizes):
    """Ids, targets and mask [T]: random ids, each followed by the next; the last 40 % of each segment are trained."""
    import numpy as np
    import torch
    ids = torch.from_numpy(np.random.default_rng(1234).integers(3, sizes.top_id, sizes.tokens + 1))
    mask = torch.cat([torch.arange(n) >= round(0.6 * n) for n in sizes.segments])
    return ids[:-1], ids[1:], mask


def make_tensor(name: str, shape: tuple[int, ...]):
    """A float32 tensor seeded by its name in Mistral's layout; small like those of a trained model."""
    import torch
    if "norm" in name: return torch.ones(shape)
    if "lora_B" in name: return torch.zeros(shape)
    gen = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    if "lora_A" in name: return (torch.rand(shape, generator=gen) * 2 - 1) * shape[1] ** -0.5
    std = 0.02 if name in ("tok_embeddings.weight", "output.weight") else shape[1] ** -0.5
    return torch.randn(shape, generator=gen).mul_(std)


# The two libraries: each returns a function that takes one step and gives its loss


def prepare_ours(case: Case, sizes: Sizes):
    """A step of mistral_nb, as its trainer takes it."""
    import torch
    from mistral_nb.config import LoraConfig, OptimConfig
    from mistral_nb.model.args import ModelArgs
    from mistral_nb.model.lora import add_lora
    from mistral_nb.model.loss import masked_cross_entropy
    from mistral_nb.model.transformer import Transformer, checkpoint_blocks
    from mistral_nb.train.optim import Updater, make_optimizer
    names = ("dim", "n_layers", "head_dim", "hidden_dim", "n_heads", "n_kv_heads")
    shape = {name: getattr(sizes, name) for name in names}
    args = ModelArgs(**shape, norm_eps=1e-5, vocab_size=case.vocab, rope_theta=1e6)
    with torch.device("meta"): model = Transformer(args, getattr(torch, case.dtype))
    model.to_empty(device="cpu")
    add_lora(model, LoraConfig(rank=sizes.rank, scaling=SCALING)).train()
    with torch.no_grad():
        for name, p in model.named_parameters(): p.copy_(make_tensor(name, tuple(p.shape)))
    checkpoint_blocks(model, case.checkpointing)
    ids, targets, mask = make_batch(sizes)
    updater = Updater(make_optimizer(model.parameters(), OptimConfig(lr=LR, weight_decay=DECAY)), MAX_NORM)

    def step() -> float:
        hidden = model(ids, list(sizes.segments), wanted=mask)
        loss = masked_cross_entropy(hidden, model.output_weight, targets, mask) / mask.sum()
        updater.backward(loss)
        updater.step(updater.norm().item())
        return loss.item()
    return step


HF_NAMES = {
    "self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo", "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2", "mlp.up_proj": "feed_forward.w3",
    "model.embed_tokens": "tok_embeddings", "model.norm": "norm", "model.layers": "layers", "lm_head": "output"}


def mistral_name(name: str) -> str:
    """The Mistral name of a parameter of transformers or peft."""
    for word in ("base_model.model.", "base_layer.", "default."): name = name.replace(word, "")
    for theirs, native in HF_NAMES.items(): name = name.replace(theirs, native)
    return name


def half_split(w, heads: int):
    """Rows of wq or wk from interleaved pairs to the two halves that transformers turns."""
    return w.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def prepare_peer(case: Case, sizes: Sizes):
    """A step of transformers + peft: packed by position ids, its own loss, torch's AdamW."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import MistralConfig, MistralForCausalLM
    config = MistralConfig(
        hidden_size=sizes.dim, num_hidden_layers=sizes.n_layers, head_dim=sizes.head_dim, vocab_size=case.vocab,
        intermediate_size=sizes.hidden_dim, num_attention_heads=sizes.n_heads, num_key_value_heads=sizes.n_kv_heads,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6}, rms_norm_eps=1e-5, sliding_window=None,
        tie_word_embeddings=False, use_cache=False, attn_implementation="sdpa")
    with torch.device("meta"): model = MistralForCausalLM(config).to(getattr(torch, case.dtype))
    model.to_empty(device="cpu")
    model.model.rotary_emb.__init__(config)
    names = [theirs.split(".")[1] for theirs in HF_NAMES if "_proj" in theirs]
    model = get_peft_model(model, LoraConfig(r=sizes.rank, lora_alpha=SCALING * sizes.rank, target_modules=names))
    turned = {"wq.weight": sizes.n_heads, "wk.weight": sizes.n_kv_heads}
    with torch.no_grad():
        for theirs, p in model.named_parameters():
            name = mistral_name(theirs)
            value, heads = make_tensor(name, tuple(p.shape)), turned.get(name.split(".", 3)[-1])
            p.copy_(half_split(value, heads) if heads else value)
    if case.checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    model.train()
    ids, targets, mask = make_batch(sizes)
    positions = torch.cat([torch.arange(n) for n in sizes.segments])[None]
    labels = torch.where(mask, targets, -100)[None]
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY)

    def step() -> float:
        loss = model(input_ids=ids[None], position_ids=positions, labels=labels, shift_labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()
    return step


# A worker process: prepares a step, then takes one for each line it is sent


def peak_mb() -> float | None:
    """The most memory this process has had, in MB."""
    status = Path("/proc/self/status")
    if not status.exists(): return None
    return next(int(line.split()[1]) / 1000 for line in status.read_text().splitlines() if line.startswith("VmHWM"))


def work(job: dict) -> None:
    """Say `ready`, then one line of JSON for each line of input: loss, seconds, peak memory."""
    import torch
    torch.set_num_threads(job["threads"])
    if job["precision"] != "default": torch.set_float32_matmul_precision(job["precision"])
    clock = time.process_time if job["clock"] == "cpu" else time.perf_counter
    prepare = prepare_ours if job["library"] == "mistral_nb" else prepare_peer
    step = prepare(Case(**job["case"]), Sizes(**job["sizes"]))
    print("ready", flush=True)
    for _ in sys.stdin:
        start = clock()
        loss = step()
        print(json.dumps({"loss": loss, "seconds": clock() - start, "peak_mb": peak_mb()}), flush=True)


class Worker:
    """The handle on a worker process."""

    def __init__(self, **job):
        env = {**os.environ, "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}
        command = [sys.executable, "-W", "ignore", __file__, "--worker", json.dumps(job)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
        self.steps: list[dict] = []
        self.read_until("ready")

    def read_until(self, start: str) -> str:
        """The next line of output that begins with `start`; libraries may print others before it."""
        for line in self.process.stdout:
            if line.startswith(start): return line
        raise RuntimeError(f"a worker ended with code {self.process.wait()}; its message is above")

    def step(self) -> None:
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self.steps.append(json.loads(self.read_until('{"loss"')))

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


# The parent: rounds, ratios, a report


LIBRARIES = ("mistral_nb", "transformers+peft")


def measure(case: Case, sizes: Sizes, args: argparse.Namespace) -> dict:
    """All four variants of `case`, in turn."""
    workers = {}
    try:
        for precision in args.precisions:
            for library in LIBRARIES:
                workers[library, precision] = Worker(library=library, precision=precision, case=asdict(case),
                                                     sizes=asdict(sizes), threads=args.threads, clock=args.clock)
        for _ in range(args.warmups + args.rounds):
            for worker in workers.values(): worker.step()
    finally:
        for worker in workers.values(): worker.close()
    check_losses(case, {key: [s["loss"] for s in worker.steps] for key, worker in workers.items()})
    seconds = {key: [s["seconds"] for s in worker.steps[args.warmups:]] for key, worker in workers.items()}
    peaks = {key: worker.steps[-1]["peak_mb"] for key, worker in workers.items()}
    variants = [{"library": library, "precision": precision, "peak_mb": peaks[library, precision],
                 "tokens_per_s": sizes.tokens / statistics.median(seconds[library, precision]),
                 "losses": [s["loss"] for s in worker.steps[:6]], "seconds": seconds[library, precision]}
                for (library, precision), worker in workers.items()]
    return {**asdict(case), "variants": variants, "ratios": [ratio(seconds, peaks, p) for p in args.precisions]}


def ratio(seconds: dict, peaks: dict, precision: str) -> dict:
    """How many times the peer's speed, and what share of its memory, at one precision of float32 products."""
    ours, theirs = ((library, precision) for library in LIBRARIES)
    speed = statistics.median(b / a for a, b in zip(seconds[ours], seconds[theirs]))
    return {"precision": precision, "speed": speed, "memory": peaks[ours] and peaks[ours] / peaks[theirs]}


def check_losses(case: Case, losses: dict) -> None:
    """End the run if the variants do not compute the same."""
    limit = 1e-3 if case.dtype == "float32" else 2e-2
    worst = max(max(at) - min(at) for at in zip(*losses.values()))
    if worst > limit: raise RuntimeError(f"{case}: losses differ by {worst:.4f}, more than {limit}: {losses}")


def machine(args: argparse.Namespace) -> dict:
    """What the figures were measured on and with."""
    from importlib.metadata import version
    import torch
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    words = {"cpu family": "", "model": "", "model name": platform.processor()}
    for line in reversed(lines):
        key, _, value = line.partition(":")
        if key.strip() in words: words[key.strip()] = value.strip()
    return {"cpu": words["model name"], "family_model": f"{words['cpu family']}/{words['model']}",
            "cores": os.cpu_count(), "threads": args.threads, "clock": args.clock,
            "load_at_start": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
            "vector_units": torch.backends.cpu.get_cpu_capability(), "system": platform.platform(),
            "python": platform.python_version(), **{name: version(name) for name in ("torch", "transformers", "peft")}}


def show(result: dict) -> None:
    """A table for people."""
    print(f"\n{Case(result['dtype'], result['checkpointing'], result['vocab'])}")
    for v in result["variants"]:
        losses = " ".join(f"{x:.4f}" for x in v["losses"][:3])
        speed, peak = f"{v['tokens_per_s']:8.0f} tokens/s", f"{v['peak_mb'] or 0:8.0f} MB peak"
        print(f"  {v['library']:18} {v['precision']:8} {speed} {peak}   losses {losses}")
    for r in result["ratios"]:
        print(f"  at {r['precision']}: {r['speed']:.2f} × its speed, {r['memory'] or 0:.2f} × its memory", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, cases = parser.add_argument, "; ".join(f"{i}: {case}" for i, case in enumerate(CASES))
    add("--out", type=Path, help="write the figures there, as JSON")
    add("--rounds", type=int, default=9, help="measured steps of each process")
    add("--warmups", type=int, default=3, help="steps before them")
    add("--threads", type=int, default=os.cpu_count(), help="threads of torch in each process")
    add("--clock", choices=["wall", "cpu"], default="wall", help="cpu: processor time, for a busy machine")
    add("--only", type=int, nargs="*", help=f"which configurations ({cases})")
    add("--precisions", nargs="+", choices=["default", "medium"], default=["default", "medium"])
    add("--tiny", action="store_true", help="a model of a few thousand numbers, for tests")
    add("--worker", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker: return work(args.worker)
    sizes, cases = (TINY, TINY_CASES) if args.tiny else (Sizes(), CASES)
    report = {"what": "LoRA training step on a CPU", "machine": machine(args), "sizes": asdict(sizes),
              "warmups": args.warmups, "rounds": args.rounds, "cases": []}
    for case in cases if args.only is None else [cases[i] for i in args.only]:
        report["cases"].append(measure(case, sizes, args))
        show(report["cases"][-1])
        if args.out: args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__": main()
