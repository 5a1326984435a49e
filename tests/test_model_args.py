"""params.json: whatever it holds, either arguments come out or an error that says what is wrong."""

import json

import pytest
from hypothesis import given, settings, strategies as st

from mistral_nb.model.args import ArgsError, ModelArgs, UnsupportedModel

TINY = dict(dim=48, n_layers=3, head_dim=12, hidden_dim=80, n_heads=6, n_kv_heads=2, vocab_size=101, norm_eps=1e-5)
MORE = {"rope_theta": 1e6, "moe": {"num_experts": 4, "num_experts_per_tok": 2}, "tied_embeddings": True,
        "sliding_window": [None, 64], "_sliding_window": 5, "activation": "silu", "model_type": "transformer",
        "yarn": {"factor": 16, "original_max_position_embeddings": 64, "beta": 32, "alpha": 1, "apply_scale": False},
        "llama_4_scaling": {"original_max_position_embeddings": 64, "beta": 0.1}, "max_seq_len": 512,
        "quantization": None, "vision_encoder": None, "num_shared_experts": 0, "qk_nope_head_dim": None}

ANYTHING = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
                        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
                            st.sampled_from(["num_experts", "factor", "beta", "x"]), inner, max_size=3), max_leaves=6)


@settings(max_examples=400, deadline=None)
@given(st.dictionaries(st.sampled_from([*TINY, *MORE]), ANYTHING, max_size=3))
def test_any_value_is_read_or_refused_in_words(changes):
    try: args = ModelArgs.from_dict({**TINY, **MORE, **changes})
    except ArgsError as e: assert "params.json" in str(e)
    else: assert ModelArgs.from_dict(json.loads(json.dumps(args.to_dict()))) == args


def test_everything_known_survives_a_round_trip():
    args = ModelArgs.from_dict({**TINY, **MORE})
    again = ModelArgs.from_dict(json.loads(json.dumps(args.to_dict())))
    assert again == args and again.to_dict() == args.to_dict()
    assert [args.window(i) for i in range(3)] == [None, 64, None] and args.to_dict()["max_seq_len"] == 512


@pytest.mark.parametrize("key, value, word", [
    ("model_type", "mamba", "mamba"), ("qk_nope_head_dim", 64, "MLA"), ("num_shared_experts", 1, "share"),
    ("activation", "gelu", "gelu"), ("quantization", {"qformat_weight": "fp8_e4m3"}, "BF16")])
def test_other_designs_are_refused_by_name(key, value, word):
    with pytest.raises(UnsupportedModel, match=word) as e: ModelArgs.from_dict({**TINY, key: value})
    assert f"`{key}`" in str(e.value)


def test_folders(tmp_path):
    with pytest.raises(ArgsError, match="Mistral's format"): ModelArgs.load(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ArgsError, match="Hugging Face"): ModelArgs.load(tmp_path)
    for content, word in (("{", "no valid"), ("\xff", "no valid"), ("[]", "one JSON object"), ("{}", "lacks dim")):
        (tmp_path / "params.json").write_bytes(content.encode("latin-1"))
        with pytest.raises(ArgsError, match=word): ModelArgs.load(tmp_path)
    (tmp_path / "params.json").write_text(json.dumps({**TINY, "vision_encoder": {"hidden_size": 7}}))
    args = ModelArgs.load(tmp_path)
    assert args.left_out == ("vision_encoder",) and "vision_encoder" not in args.to_dict()
