"""Attention: every backend against the dense formula, for shapes, windows and types that a notebook has no room for."""

import math
import sys
import time
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings, strategies as st

from mistral_nb.model import attention
from mistral_nb.model.args import ModelArgs
from mistral_nb.model.attention import KVCache, backends, packed_attention

HERE = ["cpu", *["cuda"] * torch.cuda.is_available()]
ROADS = [(device, backend) for device in HERE for backend in backends(device)]


def visible(seqlens, keylens, window):
    """bool [T, S]: whether a query sees a key."""
    out = torch.zeros(sum(seqlens), sum(keylens), dtype=torch.bool)
    for n, m, i, j in zip(seqlens, keylens, starts(seqlens), starts(keylens)):
        back = torch.arange(m - n, m)[:, None] - torch.arange(m)
        out[i:i + n, j:j + m] = (back >= 0) & (back < (window or m))
    return out


def starts(lens):
    return [sum(lens[:i]) for i in range(len(lens))]


def dense(q, k, v, seen):
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = torch.einsum("thd,shd->hts", q, k) / math.sqrt(q.shape[-1])
    return torch.einsum("hts,shd->thd", scores.masked_fill(~seen.to(q.device), -math.inf).softmax(-1), v)


def draw(seqlens, keylens=None, heads=(6, 2), dim=10, dtype=torch.float32, device="cpu", seed=0):
    g = torch.Generator().manual_seed(seed)
    sizes = [(sum(seqlens), heads[0])] + [(sum(keylens or seqlens), heads[1])] * 2
    return [torch.randn(*s, dim, generator=g).to(device, dtype).requires_grad_() for s in sizes]


def values_and_gradients(run, inputs):
    out = run(*inputs)
    pull = torch.linspace(-1, 1, out.numel(), dtype=torch.float64, device=out.device).view_as(out).to(out.dtype)
    return [out, *torch.autograd.grad(out, inputs, pull)]


@pytest.mark.parametrize("device, backend", ROADS)
@settings(max_examples=25, deadline=None)
@given(seqlens=st.lists(st.integers(1, 150), min_size=1, max_size=5), window=st.none() | st.integers(1, 160),
       heads=st.sampled_from([(1, 1), (3, 3), (6, 2), (8, 1)]), dim=st.sampled_from([2, 10, 64]))
def test_equals_the_formula(device, backend, seqlens, window, heads, dim):
    inputs = draw(seqlens, heads=heads, dim=dim, device=device)
    ours = values_and_gradients(lambda q, k, v: packed_attention(q, k, v, seqlens, window, backend), inputs)
    seen = visible(seqlens, seqlens, window)
    for a, b in zip(ours, values_and_gradients(lambda q, k, v: dense(q, k, v, seen), inputs)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("device, backend", ROADS)
@settings(max_examples=20, deadline=None)
@given(pairs=st.lists(st.tuples(st.integers(1, 90), st.integers(0, 90)), min_size=1, max_size=4),
       window=st.none() | st.integers(1, 100))
def test_queries_behind_earlier_keys(device, backend, pairs, window):
    seqlens, keylens = [n for n, _ in pairs], [n + more for n, more in pairs]
    inputs = draw(seqlens, keylens, device=device)
    out = packed_attention(*inputs, seqlens, window, backend, keylens)
    torch.testing.assert_close(out, dense(*inputs, visible(seqlens, keylens, window)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("device, backend", ROADS)
@pytest.mark.parametrize("window", [None, 50])
def test_company_changes_nothing(device, backend, window):
    seqlens = [37, 130, 1, 64]
    inputs = draw(seqlens, device=device)
    together = packed_attention(*inputs, seqlens, window, backend).split(seqlens)
    for n, part, own in zip(seqlens, together, zip(*(x.split(seqlens) for x in inputs))):
        torch.testing.assert_close(part, packed_attention(*own, [n], window, backend), rtol=1e-5, atol=1e-6)


def relative(a, b):
    return ((a.double() - b).norm() / b.norm()).item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("device, backend", ROADS)
def test_half_precision_stays_near_the_exact_result(device, backend, dtype):
    seqlens = [37, 130, 64]
    inputs = draw(seqlens, dim=64, dtype=dtype, device=device)
    inputs[0].data *= 4  # scores as large as trained models have
    exact = [x.detach().double().requires_grad_() for x in inputs]
    want = values_and_gradients(lambda q, k, v: dense(q, k, v, visible(seqlens, seqlens, None)), exact)
    ours = values_and_gradients(lambda q, k, v: packed_attention(q, k, v, seqlens, backend=backend), inputs)
    bound = 0.01 if dtype == torch.bfloat16 else 0.0015
    assert max(relative(a, b) for a, b in zip(ours, want)) < bound


def test_float32_is_bitwise_reproducible():
    inputs = draw([200, 63, 5], dim=16)
    run = lambda q, k, v: packed_attention(q, k, v, [200, 63, 5], 40)
    for a, b in zip(values_and_gradients(run, inputs), values_and_gradients(run, inputs)): assert torch.equal(a, b)


def test_a_long_segment_with_a_window_takes_linear_time_and_memory():
    q, k, v = draw([60_000], heads=(2, 1), dim=4)
    began = time.process_time()
    packed_attention(q, k, v, [60_000], window=64).sum().backward()  # the whole matrix would hold 29 GB
    assert time.process_time() - began < 60


def test_blocks_shrink_where_keys_are_many(monkeypatch):
    monkeypatch.setattr(attention, "BLOCK_ENTRIES", 6 * 200 * 3)
    rows, real = [], attention.plan_blocks
    def watched(*args):
        rows.append(args[-1])
        return real(*args)
    monkeypatch.setattr(attention, "plan_blocks", watched)
    inputs = draw([200, 7])
    want = dense(*inputs, visible([200, 7], [200, 7], None))
    torch.testing.assert_close(packed_attention(*inputs, [200, 7]), want, rtol=1e-4, atol=1e-5)
    assert rows == [3]


@pytest.mark.parametrize("seqlens, keylens", [([5], None), ([3, 5], None), ([7, 0], None), ([7], [6]), ([7], [3, 4])])
def test_wrong_lengths_are_named(seqlens, keylens):
    with pytest.raises(ValueError, match="received q"):
        packed_attention(*draw([7]), seqlens, keylens=keylens)


# The kernel for packed batches needs a card that is not here: its stand-in has the same signature.

def fake_varlen(monkeypatch, error=0.0, newer=True):
    """Put a module with `varlen_attn` where torch has it."""
    def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size=(-1, -1), enable_gqa=False):
        assert cu_seq_q.dtype == torch.int32 and window_size[1] == 0 and (enable_gqa or not newer)
        lens = cu_seq_q.diff().tolist()
        assert max_q == max_k == max(lens)
        window = None if window_size[0] < 0 else window_size[0] + 1
        return dense(query, key, value, visible(lens, lens, window)) * (1 + error)
    module = ModuleType("torch.nn.attention.varlen")
    module.varlen_attn = varlen_attn
    if not newer: module.varlen_attn = lambda *args, window_size: varlen_attn(*args, window_size=window_size)
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", module)


@pytest.mark.parametrize("newer", [True, False])
@pytest.mark.parametrize("window", [None, 20])
def test_the_packed_kernel_is_called_as_it_wants(monkeypatch, window, newer):
    fake_varlen(monkeypatch, newer=newer)
    inputs = draw([33, 1, 66], dtype=torch.float16)
    out = packed_attention(*inputs, [33, 1, 66], window, "varlen")
    assert relative(out, dense(*(x.double() for x in inputs), visible([33, 1, 66], [33, 1, 66], window))) < 2e-3
    with torch.inference_mode():  # whoever asks first
        assert attention.difference(torch.device("cpu"), torch.float16, window) < 0.02
    full = draw([33, 1, 66])  # float32, for which the kernel is not made
    torch.testing.assert_close(packed_attention(*full, [33, 1, 66], window, "varlen"),
                               packed_attention(*full, [33, 1, 66], window, "segments"))


def test_a_packed_kernel_that_is_off_or_broken_is_found_out(monkeypatch):
    fake_varlen(monkeypatch, error=0.1)
    assert attention.difference(torch.device("cpu"), torch.float16, None) > 0.02
    monkeypatch.setattr(attention, "backends", lambda device: ["segments"])
    assert attention.why("cpu").startswith("attention: segments (varlen needs an NVIDIA card")


@pytest.mark.parametrize("differs, says", [
    (0.003, "agrees with segments to 3e-03"), (0.3, "disagrees with segments"),
    (RuntimeError("no kernel image"), "does not run here: RuntimeError: no kernel image")])
def test_the_verdict_says_why(monkeypatch, differs, says):
    def difference(*_):
        if isinstance(differs, Exception): raise differs
        return differs
    monkeypatch.setattr(attention, "difference", difference)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    attention.varlen_verdict.cache_clear()
    verdict = attention.varlen_verdict(torch.device("cuda", 0))
    assert verdict.startswith(says)
    assert (backends("cuda:0")[0] == "varlen") == says.startswith("agrees")
    attention.varlen_verdict.cache_clear()


def test_a_cache_grows_without_losing_anything():
    args = ModelArgs(dim=4, n_layers=1, head_dim=10, hidden_dim=4, n_heads=6, n_kv_heads=2, vocab_size=9, norm_eps=1e-5)
    q, k, v = draw([300])
    cache, outs, at = KVCache(args), [], 0
    for n in [1, 60, 1, 1, 1, 1, 1, 70, 1, 163]:
        outs.append(cache.attend(0, q[at:at + n], k[at:at + n], v[at:at + n], [n], 33))
        cache.advance([n])
        at += n
    assert at == 300 and cache.lengths == [300]
    torch.testing.assert_close(torch.cat(outs), packed_attention(q, k, v, [300], 33), rtol=1e-4, atol=1e-5)
