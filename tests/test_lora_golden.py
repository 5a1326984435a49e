"""LoRA and loss against the reference's figures, computed in float32 on a CPU, and microbatches against one batch."""

import json

import pytest
import torch
from safetensors.torch import load_file

from mistral_nb.config import LoraConfig
from mistral_nb.model.args import ModelArgs
from mistral_nb.model.lora import add_lora
from mistral_nb.model.lora import load_lora_state
from mistral_nb.model.lora import lora_state_dict
from mistral_nb.model.lora import merged_state
from mistral_nb.model.loss import masked_cross_entropy
from mistral_nb.model.transformer import Transformer
from mistral_nb.model.transformer import checkpoint_blocks

CLOSE = dict(rel=1e-5)


class Golden:
    """A golden folder: its model with the adapters it starts from, its batch, and the figures to reach."""

    def __init__(self, folder):
        self.want = json.loads((folder / "golden.json").read_text())
        self.model = Transformer(ModelArgs.load(folder))
        self.model.load_state_dict(load_file(folder / "consolidated.safetensors"))
        add_lora(self.model, LoraConfig(**self.want["lora"]))
        load_lora_state(self.model, load_file(folder / "lora_start.safetensors"))
        self.ids, self.targets = torch.tensor(self.want["input_ids"]), torch.tensor(self.want["targets"])
        self.mask, self.seqlens = torch.tensor(self.want["mask"], dtype=torch.bool), self.want["seqlens"]

    def backward(self, parts=1, rows_in_model=False):
        """Loss of the batch, cut into `parts` microbatches of whole segments; leaves the gradients in place."""
        cuts = [self.seqlens[i::parts] for i in range(parts)]
        spans = list(torch.arange(len(self.ids)).split(self.seqlens))
        total = 0.0
        for i, seqlens in enumerate(cuts):
            at = torch.cat(spans[i::parts])
            ids, targets, mask = self.ids[at], self.targets[at], self.mask[at]
            hidden = self.model(ids, seqlens, wanted=mask) if rows_in_model else self.model(ids, seqlens)
            loss = masked_cross_entropy(hidden, self.model.output_weight, targets, mask, 4) / self.mask.sum()
            loss.backward()
            total += loss.item()
        return total

    def trained(self):
        return [p for p in self.model.parameters() if p.requires_grad]

    def grads(self):
        return {name: p.grad for name, p in self.model.named_parameters() if p.requires_grad}


@pytest.fixture(params=["dense", "moe"])
def golden(request, shared):
    return Golden(shared / "golden" / request.param)


def test_loss_and_gradients(golden):
    assert golden.backward() == pytest.approx(golden.want["loss"], **CLOSE)
    sums = {name: grad.double().abs().sum().item() for name, grad in golden.grads().items()}
    assert sums == pytest.approx(golden.want["grad_abs_sums"], **CLOSE)
    norm = torch.nn.utils.get_total_norm(golden.grads().values()).item()
    assert norm == pytest.approx(golden.want["grad_norm"], **CLOSE)


def merged_sums(golden):
    """Σ|W| of every weight that has an adapter, with the adapter merged in."""
    adapted = {name.replace(".lora_A.", ".") for name in lora_state_dict(golden.model) if ".lora_A." in name}
    return {name: w.double().abs().sum().item() for name, w in merged_state(golden.model) if name in adapted}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("rows_in_model", [False, True])
def test_twelve_steps(golden, checkpointing, rows_in_model):
    """Losses, norms, learning rates and the merged weights at the end, of the reference's recipe, in a loop of ours."""
    want = golden.want["training"]
    optim = want["optim"]
    adamw = torch.optim.AdamW(golden.trained(), lr=optim["lr"], betas=(0.9, 0.95), eps=1e-8,
                              weight_decay=optim["weight_decay"])
    cycle = torch.optim.lr_scheduler.OneCycleLR(adamw, optim["lr"], want["steps"], pct_start=optim["pct_start"])
    checkpoint_blocks(golden.model, checkpointing)
    losses, norms, rates = [], [], []
    for _ in range(want["steps"]):
        rates.append(cycle.get_last_lr()[0])
        losses.append(golden.backward(rows_in_model=rows_in_model))
        norms.append(torch.nn.utils.clip_grad_norm_(golden.trained(), want["max_norm"]).item())
        adamw.step(), cycle.step(), adamw.zero_grad()
    assert losses == pytest.approx(want["losses"], **CLOSE)
    assert norms == pytest.approx(want["grad_norms"], **CLOSE)
    assert rates == pytest.approx(want["lrs"], **CLOSE)
    assert merged_sums(golden) == pytest.approx(golden.want["merged_abs_sums"], **CLOSE)


@pytest.mark.parametrize("parts", [2, 3, 4])
def test_microbatches_are_one_batch(golden, parts):
    whole, grads = golden.backward(), {name: grad.clone() for name, grad in golden.grads().items()}
    golden.model.zero_grad()
    assert golden.backward(parts) == pytest.approx(whole, rel=1e-6)
    for name, grad in golden.grads().items():
        assert (grad - grads[name]).norm() <= 1e-6 * grads[name].norm(), name
