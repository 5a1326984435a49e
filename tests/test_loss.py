"""The chunked loss against torch's cross-entropy, over shapes, dtypes and chunks; it never holds all logits."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mistral_nb.model.loss import masked_cross_entropy


def draw(tokens, dim, vocab, dtype=torch.float64, share=0.4, seed=0):
    gen = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randn(n, dim, generator=gen).to(dtype).requires_grad_() for n in (tokens, vocab))
    return hidden, weight, torch.randint(vocab, (tokens,), generator=gen), torch.rand(tokens, generator=gen) < share


def plain(hidden, weight, targets, mask):
    """All logits in float64, cross-entropy summed over the trained rows."""
    return F.cross_entropy((hidden.double() @ weight.double().T)[mask], targets[mask], reduction="sum")


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("chunk", [1, 2, 7, 256, None])
@pytest.mark.parametrize("sizes", [(1, 2, 3), (13, 5, 31), (200, 8, 300)])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.1])
def test_equals_torch(sizes, chunk, share, seed):
    hidden, weight, targets, mask = draw(*sizes, share=share, seed=seed)
    ours, exact = masked_cross_entropy(hidden, weight, targets, mask, chunk), plain(hidden, weight, targets, mask)
    torch.testing.assert_close(ours, exact)
    for a, b in zip(torch.autograd.grad(3 * ours, (hidden, weight)), torch.autograd.grad(3 * exact, (hidden, weight))):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype, loss_error, grad_error", [
    (torch.float32, 1e-6, 2e-6), (torch.bfloat16, 2e-4, 1e-2), (torch.float16, 2e-5, 2e-3)])
@pytest.mark.parametrize("weight_dtype", [None, torch.float32])
def test_precision(dtype, loss_error, grad_error, weight_dtype):
    """Float64 from the same rounded input; a float32 master weight takes part in the dtype of the hidden states."""
    hidden, weight, targets, mask = draw(600, 64, 1001, dtype)
    weight = weight.detach().to(weight_dtype or dtype).requires_grad_()
    scale = 1024.0 / mask.sum()
    ours, exact = (f(hidden, weight, targets, mask) for f in (masked_cross_entropy, plain))
    assert ours.dtype == torch.float32 and abs(ours / exact - 1) < loss_error
    ours, exact = (torch.autograd.grad(loss * scale, (hidden, weight)) for loss in (ours, exact))
    for a, b, dtype_of in zip(ours, exact, (hidden, weight)):
        assert a.dtype == dtype_of.dtype and (a.double() - b.double()).norm() < grad_error * b.double().norm()


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation gives."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor))])
        return out


@pytest.mark.parametrize("chunk", [8, 64])
def test_never_holds_all_logits(chunk):
    tokens, dim, vocab = 1000, 16, 5000
    hidden, weight, targets, mask = draw(tokens, dim, vocab, torch.bfloat16)
    with Largest() as largest: masked_cross_entropy(hidden, weight.detach(), targets, mask, chunk).backward()
    assert largest.numel <= max(chunk * vocab, weight.numel(), hidden.numel())


def test_untrained_rows_have_no_say():
    hidden, weight, targets, mask = draw(50, 6, 40)
    before = masked_cross_entropy(hidden, weight, targets, mask)
    with torch.no_grad(): hidden[~mask], targets[~mask] = float("nan"), -100
    after = masked_cross_entropy(hidden, weight, targets, mask)
    after.backward()
    assert torch.equal(before, after) and hidden.grad.isfinite().all() and weight.grad.isfinite().all()


def test_extreme_logits():
    """A target 2,000 below the best logit has a loss of 2,000, and a gradient of one."""
    hidden, weight = torch.tensor([[1.0]], requires_grad=True), torch.tensor([[1000.0], [-1000.0], [0.0]])
    loss = masked_cross_entropy(hidden, weight, torch.tensor([1]), torch.tensor([True]))
    loss.backward()
    assert loss == 2000 and hidden.grad == 2000


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["hidden", "weight"])
def test_what_is_not_finite_shows(bad, where):
    hidden, weight, targets, mask = (x.detach() for x in draw(50, 6, 40, torch.bfloat16))
    row = mask.nonzero()[3, 0] if where == "hidden" else 7
    (hidden if where == "hidden" else weight)[row, 2] = bad
    assert not masked_cross_entropy(hidden, weight, targets, mask).isfinite()
