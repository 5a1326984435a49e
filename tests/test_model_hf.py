"""The network against Hugging Face's, with the same weights in its layout."""

import pytest
import torch

from mistral_nb.model.args import ModelArgs
from mistral_nb.model.transformer import Transformer

hf = pytest.importorskip("transformers")

TINY = dict(dim=48, n_layers=3, head_dim=12, hidden_dim=80, n_heads=6, n_kv_heads=2, vocab_size=101, norm_eps=1e-5,
            rope_theta=1e4)
YARN = dict(factor=16, original_max_position_embeddings=16)
SEQLENS = [37, 5, 20]


def half_split(w, head_dim):
    """Rows of wq or wk from interleaved pairs to Hugging Face's order: first halves, then second halves."""
    return w.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def renamed(model):
    """The weights of `model` under Hugging Face's names and in its layout."""
    words = {"attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj", "attention.wv": "self_attn.v_proj",
             "attention.wo": "self_attn.o_proj", "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj",
             "feed_forward.w3": "mlp.up_proj", "attention_norm": "input_layernorm", "feed_forward.gate": "mlp.gate",
             "ffn_norm": "post_attention_layernorm", "tok_embeddings": "embed_tokens"}
    out = {}
    for name, w in model.state_dict().items():
        if name.split(".")[-2] in ("wq", "wk"): w = half_split(w, model.args.head_dim)
        for ours, theirs in words.items(): name = name.replace(ours, theirs)
        out["lm_head.weight" if name == "output.weight" else f"model.{name}"] = w
    return stacked(out, model.args) if model.args.moe else out


def stacked(out, args):
    """The experts of a layer as the two 3-D tensors that Mixtral has there."""
    own = [[[out.pop(f"model.layers.{i}.feed_forward.experts.{e}.w{j}.weight") for j in (1, 2, 3)]
            for e in range(args.moe.num_experts)] for i in range(args.n_layers)]
    for i, experts in enumerate(own):
        out[f"model.layers.{i}.mlp.experts.gate_up_proj"] = torch.stack([torch.cat((w1, w3)) for w1, _, w3 in experts])
        out[f"model.layers.{i}.mlp.experts.down_proj"] = torch.stack([w2 for _, w2, _ in experts])
    return out


def config(kind, **more):
    return getattr(hf, f"{kind}Config")(
        hidden_size=48, num_hidden_layers=3, head_dim=12, intermediate_size=80, num_attention_heads=6, vocab_size=101,
        num_key_value_heads=2, rms_norm_eps=1e-5, max_position_embeddings=512, pad_token_id=0,
        **{"sliding_window": None, "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}, **more})


def yarn(**more):
    """Hugging Face's words for `YARN`."""
    return {"rope_type": "yarn", "rope_theta": 1e4, "beta_fast": 32.0, "beta_slow": 1.0, "factor": 16.0,
            "original_max_position_embeddings": 16, **more}


FULL = "full_attention"
SCALED = dict(original_max_position_embeddings=16, beta=0.1)
CASES = {
    "dense": ({}, "Mistral", {}),
    "tied": ({"tied_embeddings": True}, "Mistral", {"tie_word_embeddings": True}),
    "experts": ({"moe": {"num_experts": 5, "num_experts_per_tok": 2}}, "Mixtral",
                {"num_local_experts": 5, "num_experts_per_tok": 2}),
    "window": ({"sliding_window": 7}, "Mistral", {"sliding_window": 7}),
    "alternating windows": ({"sliding_window": [None, 7]}, "Ministral",
                            {"sliding_window": 7, "layer_types": [FULL, "sliding_attention", FULL]}),
    "yarn": ({"yarn": YARN}, "Mistral", {"rope_parameters": yarn()}),
    "yarn, its own bounds": ({"yarn": {**YARN, "beta": 4, "alpha": 0.5}}, "Mistral",
                             {"rope_parameters": yarn(beta_fast=4.0, beta_slow=0.5)}),
    "yarn without its scale": ({"yarn": {**YARN, "apply_scale": False}}, "Mistral",
                               {"rope_parameters": yarn(mscale=1.0, mscale_all_dim=1.0)}),
    "ministral 3": ({"yarn": {**YARN, "apply_scale": False}, "llama_4_scaling": SCALED}, "Ministral3",
                    {"rope_parameters": yarn(mscale=1.0, mscale_all_dim=1.0, llama_4_scaling_beta=0.1)}),
}


@pytest.mark.parametrize("case", CASES)
def test_same_logits(case):
    ours, kind, theirs = CASES[case]
    torch.manual_seed(5)
    model = Transformer(ModelArgs.from_dict({**TINY, **ours}))
    with torch.no_grad():
        for p in model.parameters(): p.add_(0.3 * torch.randn_like(p) if p.ndim == 1 else 0)
    other = getattr(hf, f"{kind}ForCausalLM")(config(kind, **theirs)).eval()
    missing, unexpected = other.load_state_dict(renamed(model), strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"} and (not missing or case == "tied")
    ids = torch.randint(101, (sum(SEQLENS),))
    with torch.no_grad():
        logits = model.logits(model(ids, SEQLENS))
        want = torch.cat([other(part[None]).logits[0] for part in ids.split(SEQLENS)])
    torch.testing.assert_close(logits, want, rtol=1e-4, atol=1e-4)
    assert logits.std() > 0.1
