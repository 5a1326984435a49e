"""Twelve steps with the reference's recipe give the reference's losses, learning rates and gradient norms."""

import json

import pytest
import torch
from safetensors.torch import load_file

from mistral_nb.config import LoraConfig
from mistral_nb.config import OptimConfig
from mistral_nb.data.loader import Batch
from mistral_nb.model.lora import load_lora_state
from mistral_nb.model.transformer import checkpoint_blocks
from mistral_nb.train.optim import Updater
from mistral_nb.train.optim import advance
from mistral_nb.train.optim import current_lr
from mistral_nb.train.optim import make_optimizer
from mistral_nb.train.optim import make_schedule
from mistral_nb.train.trainer import train_step
from mistral_nb.weights.checkpoint import load_model


def split(batch: Batch, at: int) -> list[Batch]:
    """A batch as two microbatches, cut between segments."""
    cut = sum(batch.seqlens[:at])
    return [Batch(batch.input_ids[part], batch.targets[part], batch.mask[part], seqlens, [])
            for part, seqlens in [(slice(cut), batch.seqlens[:at]), (slice(cut, None), batch.seqlens[at:])]]


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("microbatches", [1, 2])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_twelve_steps(shared, kind, checkpointing, microbatches):
    folder = shared / "golden" / kind
    golden = json.loads((folder / "golden.json").read_text())
    want = golden["training"]
    model = load_model(folder, LoraConfig(**golden["lora"]), device="cpu", dtype=torch.float32)
    load_lora_state(model, load_file(folder / "lora_start.safetensors"))
    checkpoint_blocks(model.train(), checkpointing)
    whole = Batch(torch.tensor(golden["input_ids"]), torch.tensor(golden["targets"]),
                  torch.tensor(golden["mask"], dtype=torch.bool), golden["seqlens"], [])
    batches = [whole] if microbatches == 1 else split(whole, 2)
    cfg = OptimConfig(**want["optim"])
    updater = Updater(make_optimizer(model.parameters(), cfg), want["max_norm"])
    schedule = make_schedule(updater.optimizer, cfg, want["steps"])
    losses, norms, lrs = [], [], []
    for _ in range(want["steps"]):
        lrs.append(current_lr(updater.optimizer))
        loss, norm = train_step(model, batches, updater)
        advance(schedule)
        losses.append(loss)
        norms.append(norm)
    assert losses == pytest.approx(want["losses"], rel=1e-5)
    assert lrs == pytest.approx(want["lrs"], rel=1e-9)
    assert norms == pytest.approx(want["grad_norms"], rel=1e-5)
