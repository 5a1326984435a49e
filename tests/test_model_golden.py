"""The network against the reference's figures, computed in float32 on a CPU."""

import json

import pytest
import torch
from safetensors.torch import load_file

from mistral_nb.config import LoraConfig
from mistral_nb.model.args import ModelArgs
from mistral_nb.model.lora import add_lora
from mistral_nb.model.transformer import Transformer, checkpoint_blocks


@pytest.fixture(params=["dense", "moe"])
def golden(request, shared):
    folder = shared / "golden" / request.param
    model = Transformer(ModelArgs.load(folder))
    model.load_state_dict(load_file(folder / "consolidated.safetensors"))
    return model, load_file(folder / "lora_start.safetensors"), json.loads((folder / "golden.json").read_text())


def with_adapters(model, adapters, scaling):
    """The model with `adapters` merged into its weights."""
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for name in {name.rsplit(".lora_", 1)[0] for name in adapters}:
            delta = adapters[f"{name}.lora_B.weight"] @ adapters[f"{name}.lora_A.weight"]
            weights[f"{name}.weight"] += scaling * delta
    return model


def test_logits(golden):
    model, adapters, want = golden
    model = with_adapters(model, adapters, want["lora"]["scaling"])
    hidden = model(torch.tensor(want["input_ids"]), want["seqlens"])
    logits = model.logits(hidden).detach().double()
    for row, values in want["logits_rows"].items():
        torch.testing.assert_close(logits[int(row)], torch.tensor(values).double(), rtol=1e-5, atol=2e-6)
    assert logits.sum().item() == pytest.approx(want["logits_sum"], rel=1e-5)
    assert logits.abs().sum().item() == pytest.approx(want["logits_abs_sum"], rel=1e-5)


def test_loss(golden):
    model, adapters, want = golden
    model = with_adapters(model, adapters, want["lora"]["scaling"])
    logits = model.logits(model(torch.tensor(want["input_ids"]), want["seqlens"]))
    mask = torch.tensor(want["mask"], dtype=torch.bool)
    loss = torch.nn.functional.cross_entropy(logits[mask], torch.tensor(want["targets"])[mask])
    assert loss.item() == pytest.approx(want["loss"], rel=1e-6)


def test_checkpointing_repeats_the_same_dropout(golden):
    model, _, want = golden
    add_lora(model, LoraConfig(rank=4, dropout=0.5), seed=3).train()
    for name, p in model.named_parameters():
        if "lora_B" in name: torch.nn.init.normal_(p, generator=torch.Generator().manual_seed(len(name)))
    def gradients(on):
        checkpoint_blocks(model, on).zero_grad()
        torch.manual_seed(7)
        model(torch.tensor(want["input_ids"]), want["seqlens"]).square().sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.requires_grad]
    kept, again, repeated = gradients(False), gradients(True), gradients(True)
    assert all(torch.equal(a, b) and torch.equal(b, c) for a, b, c in zip(kept, again, repeated))
