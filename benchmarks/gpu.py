"""LoRA on a model of the size of Mistral 7B, on a graphics card: tokens a second, peak memory, use of the card.

    python benchmarks/gpu.py --out benchmarks/results/gpu.json    # 7B shape, rank 64, 8,192 and 32,768 tokens a step
    python benchmarks/gpu.py --tiny --device cpu                  # does it run? figures without meaning

Needs torch >= 2.11 and the modules `mistral_nb.model.*`, nothing else: no tokenizer, no download. The weights are
random and made on the card. The use of the card is told as a share of what it reaches on a plain bfloat16 product.
"""

import argparse
import json
import platform
import random
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch

from mistral_nb.model.args import ModelArgs
from mistral_nb.model.attention import why
from mistral_nb.model.lora import add_lora
from mistral_nb.model.loss import masked_cross_entropy
from mistral_nb.model.transformer import Transformer
from mistral_nb.model.transformer import checkpoint_blocks

SEVEN_B = dict(dim=4096, n_layers=32, head_dim=128, hidden_dim=14336, n_heads=32, n_kv_heads=8, norm_eps=1e-5,
               vocab_size=32768, rope_theta=1e6)
TINY = dict(dim=48, n_layers=3, head_dim=8, hidden_dim=80, n_heads=6, n_kv_heads=2, norm_eps=1e-5, vocab_size=301,
            rope_theta=1e6)


def make_model(sizes: dict, rank: int, device: torch.device, dtype: torch.dtype) -> Transformer:
    """A model of `sizes` with random weights made on `device`, frozen, with adapters and activation checkpointing."""
    with torch.device("meta"): model = Transformer(ModelArgs(**sizes), dtype)
    model.to_empty(device=device)
    gen = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1: p.fill_(1.0)
            else: p.normal_(std=p.shape[1] ** -0.5, generator=gen)
    add_lora(model, SimpleNamespace(rank=rank, scaling=2.0, dropout=0.0))
    return checkpoint_blocks(model).train()


def make_segments(tokens: int, longest: int) -> list[int]:
    """Uneven lengths that sum to `tokens`: a packed batch of conversations."""
    draw, lengths = random.Random(0), []
    while sum(lengths) < tokens: lengths.append(min(draw.randint(longest // 20, longest), tokens - sum(lengths)))
    return lengths


def make_step(model: Transformer, segments: list[int], share: float):
    """A function that takes one training step and gives its loss; the last `share` of each segment is trained."""
    device, vocab = model.output_weight.device, model.args.vocab_size
    ids = torch.randint(3, vocab, (sum(segments) + 1,), generator=torch.Generator().manual_seed(0)).to(device)
    mask = torch.cat([torch.arange(n) >= round((1 - share) * n) for n in segments]).to(device)
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step() -> float:
        hidden = model(ids[:-1], segments, wanted=mask)
        loss = masked_cross_entropy(hidden, model.output_weight, ids[1:], mask) / mask.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()
    return step


def count_flops(model: Transformer, segments: list[int], share: float) -> dict:
    """Floating-point operations of a step: what its result needs, and what computing blocks a second time adds."""
    args, tokens, lora, last = model.args, sum(segments), ".lora_", f"layers.{model.args.n_layers - 1}."
    sizes = {n: p.numel() for n, p in model.named_parameters() if n.startswith("layers.") and p.ndim == 2}
    def work(each, frozen: float, adapter: float) -> float:
        return sum(n * (adapter if lora in name else frozen) * each(name) for name, n in sizes.items())
    def seen(name: str) -> float:  # the last block makes queries and all that follows for trained tokens only
        return share if name.startswith(last) and ".wk." not in name and ".wv." not in name else 1.0
    def repeated(name: str) -> float:  # the last product of a block is not computed again
        return 0.0 if name.endswith(("w2.weight", "w2.lora_B.weight")) else seen(name)
    pairs = sum(n * (n + 1) // 2 for n in segments) * args.n_layers * args.n_heads * args.head_dim
    head = 4 * share * tokens * args.vocab_size * args.dim  # logits of trained tokens, and the gradient of their inputs
    # a frozen map: forward, gradient of its input; an adapter: also its own; attention: 4 forward, 8 backward
    return {"needed": tokens * work(seen, 4, 6) + 12 * pairs + head, "again": tokens * work(repeated, 2, 2) + 4 * pairs}


def wait(device: torch.device) -> None:
    if device.type == "cuda": torch.cuda.synchronize(device)


def seconds_of(run, device: torch.device, times: int) -> list[float]:
    """How long each of `times` calls takes."""
    found = []
    for _ in range(times):
        wait(device)
        start = time.perf_counter()
        run()
        wait(device)
        found.append(time.perf_counter() - start)
    return found


def product_rate(size: int, device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a plain [size, size] product: the median of 20."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds_of(lambda: a @ b, device, 5)
    return 2 * size ** 3 / statistics.median(seconds_of(lambda: a @ b, device, 20))


def measure(model: Transformer, tokens: int, args: argparse.Namespace, device: torch.device, rate: float) -> dict:
    """Figures for steps of `tokens` tokens."""
    segments = make_segments(tokens, args.longest)
    flops, cuda = count_flops(model, segments, args.share), device.type == "cuda"
    if cuda: torch.cuda.reset_peak_memory_stats(device)
    step, losses = make_step(model, segments, args.share), []
    seconds_of(lambda: losses.append(step()), device, args.warmups)
    seconds = seconds_of(lambda: losses.append(step()), device, args.steps)
    typical = statistics.median(seconds)
    gib = torch.cuda.max_memory_allocated(device) / 2 ** 30 if cuda else None
    return {"tokens": tokens, "segments": len(segments), "tokens_per_s": tokens / typical, "seconds": seconds,
            "peak_gib": gib, "peak_reserved_gib": torch.cuda.max_memory_reserved(device) / 2 ** 30 if cuda else None,
            "model_flops_utilisation": flops["needed"] / typical / rate, "flops": flops,
            "with_recomputation": (flops["needed"] + flops["again"]) / typical / rate, "losses": losses}


def attempt(model: Transformer, tokens: int, args: argparse.Namespace, device: torch.device, rate: float) -> dict:
    """`measure`, or the word that memory did not suffice."""
    try: found = measure(model, tokens, args, device, rate)
    except torch.OutOfMemoryError as e: found = {"tokens": tokens, "out_of_memory": str(e).splitlines()[0]}
    model.zero_grad(set_to_none=True)
    if device.type == "cuda": torch.cuda.empty_cache()
    return found


def machine(device: torch.device, dtype: torch.dtype, rate: float) -> dict:
    """What the figures were measured on and with."""
    cuda = device.type == "cuda"
    return {"device": torch.cuda.get_device_name(device) if cuda else platform.processor() or "cpu",
            "memory_gib": torch.cuda.get_device_properties(device).total_memory / 2 ** 30 if cuda else None,
            "product_tflops": rate / 1e12, "dtype": str(dtype).removeprefix("torch."), "torch": torch.__version__,
            "cuda": torch.version.cuda, "python": platform.python_version(), "attention": why(device)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, help="write the figures there, as JSON")
    add("--device", default="cuda")
    add("--tokens", type=int, nargs="+", default=[8192, 32768], help="tokens a step")
    add("--rank", type=int, default=64)
    add("--share", type=float, default=0.4, help="share of the tokens that are trained")
    add("--longest", type=int, default=4096, help="tokens of the longest segment")
    add("--warmups", type=int, default=3)
    add("--steps", type=int, default=10, help="measured steps")
    add("--tiny", action="store_true", help="a model of a few thousand numbers, for tests")
    args = parser.parse_args()
    if args.tiny: args.tokens, args.rank, args.longest, args.warmups, args.steps = [70, 200], 3, 40, 1, 2
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available(): sys.exit("no CUDA device here; try --tiny --device cpu")
    half = device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0)
    dtype = torch.float16 if half else torch.bfloat16
    rate = product_rate(256 if args.tiny else 8192, device, dtype)
    model = make_model(TINY if args.tiny else SEVEN_B, args.rank, device, dtype)
    report = {"what": "LoRA training step, 7B shape", "machine": machine(device, dtype, rate), "rank": args.rank,
              "share_trained": args.share, "checkpointing": True, "results": []}
    for tokens in args.tokens:
        report["results"].append(found := attempt(model, tokens, args, device, rate))
        print({k: v for k, v in found.items() if k not in ("seconds", "losses", "flops")}, flush=True)
        if args.out: args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__": main()
