"""Generation against Hugging Face's, against a full forward pass, and text pieces against whole decoding."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from mistral_nb.data.tokenize import decode, parse_tool_calls
from mistral_nb.generate import generate, generate_batch, generate_ids, next_logits, text_pieces
from mistral_nb.model.args import ModelArgs
from mistral_nb.model.transformer import KVCache, Transformer

TINY = dict(dim=48, n_layers=3, head_dim=12, hidden_dim=80, n_heads=6, n_kv_heads=2, vocab_size=101, norm_eps=1e-5,
            rope_theta=1e4)
SHAPES = {
    "dense": {}, "tied": {"tied_embeddings": True}, "window": {"sliding_window": 4},
    "windows": {"sliding_window": [None, 5]},
    "experts": {"moe": {"num_experts": 4, "num_experts_per_tok": 2}},
    "yarn": {"yarn": {"factor": 4, "original_max_position_embeddings": 8},
             "llama_4_scaling": {"original_max_position_embeddings": 6, "beta": 0.3}},
}
TOKENIZERS = [MistralTokenizer.v1(), MistralTokenizer.v3(), MistralTokenizer.v3(is_tekken=True), MistralTokenizer.v7()]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Small products are faster on one thread, by far when other tests run beside."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny(**changes):
    torch.manual_seed(2)
    return Transformer(ModelArgs.from_dict({**TINY, **changes})).eval()


@pytest.mark.parametrize("shape", SHAPES)
def test_the_cache_changes_no_logits(shape):
    """Prompts of all lengths together, then token by token, some sequences leaving on the way."""
    model, lengths = tiny(**SHAPES[shape]), [3, 17, 9, 1]
    seqs = [torch.randint(101, (n + 12,)).tolist() for n in lengths]
    with torch.inference_mode():
        full = [model.logits(model(torch.tensor(s), [len(s)])) for s in seqs]
        cache, rows, at = KVCache(model.args, len(seqs)), [0, 1, 2, 3], list(lengths)
        new = [s[:n] for s, n in zip(seqs, lengths)]
        for step in range(12):
            for row, got in zip(rows, next_logits(model, new, cache)):
                torch.testing.assert_close(got, full[row][at[row] - 1], rtol=1e-4, atol=1e-5)
            if step in (4, 8):
                cache.keep([0, 2] if step == 4 else [1])
                rows = [rows[0], rows[2]] if step == 4 else rows[1:]
            new, at = [seqs[r][at[r]:at[r] + 1] for r in rows], [n + (r in rows) for r, n in enumerate(at)]


def test_greedy_tokens_equal_hugging_face():
    hf = pytest.importorskip("transformers")
    from test_model_hf import config, renamed
    model = tiny()
    other = hf.MistralForCausalLM(config("Mistral")).eval()
    other.load_state_dict(renamed(model))
    prompts = [torch.randint(1, 101, (n,)).tolist() for n in (7, 1, 23)]
    greedy = dict(max_new_tokens=30, do_sample=False, eos_token_id=None)
    want = [other.generate(torch.tensor([p]), **greedy)[0, len(p):].tolist() for p in prompts]
    assert generate_ids(model, prompts, 30) == want
    assert len({t for row in want for t in row}) > 10


def test_stop_seeds_and_width():
    model = tiny()
    prompts = [[5, 6, 7], [8]]
    draw, again, other = (generate_ids(model, prompts, 40, temperature=1.5, seed=seed) for seed in (4, 4, None))
    assert draw == again != other
    stopped = generate_ids(model, prompts, 40, stop=draw[0][9], temperature=1.5, seed=4)
    assert stopped[0] == draw[0][:draw[0].index(draw[0][9])]
    narrow = generate_ids(model, prompts, 40, temperature=3.0, num_words=10, seed=0)
    assert max(map(max, narrow)) < 10 and generate_ids(model, [], 5) == []


def test_training_mode_and_random_state_are_left_alone():
    model, before = tiny().train(), torch.get_rng_state()
    generate_ids(model, [[1, 2]], 4, temperature=1.0)
    assert model.training and torch.equal(before, torch.get_rng_state())


def test_context_is_said(caplog):
    model = tiny(max_seq_len=20)
    with pytest.raises(ValueError, match=r"20 tokens, the model's context is 20"): generate_ids(model, [[1] * 20], 1)
    assert len(generate_ids(model, [[1] * 15], 50)[0]) == 5 and "context of 20" in caplog.text


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=["v1", "v3", "tekken", "v7"])
def test_pieces_make_the_whole_text(tokenizer):
    base = tokenizer.instruct_tokenizer.tokenizer

    @settings(max_examples=80, deadline=None)
    @given(st.text(max_size=40))
    def of_text(text):
        ids = base.encode(text, bos=False, eos=False)
        assert "".join(text_pieces(ids, tokenizer)) == decode(ids, tokenizer, control=True)

    @settings(max_examples=80, deadline=None)
    @given(st.lists(st.integers(0, 400) | st.integers(0, base.n_words - 1), max_size=20))
    def of_ids(ids):
        pieces = list(text_pieces(ids, tokenizer))
        assert "".join(pieces) == decode(ids, tokenizer, control=True) and "" not in pieces

    of_text(), of_ids()


def test_pieces_never_end_inside_a_letter():
    for tokenizer in TOKENIZERS:
        ids = tokenizer.instruct_tokenizer.tokenizer.encode("a 🦙𓀀 é 日本 ᚠ", bos=False, eos=False)
        assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in text_pieces(ids, tokenizer))


def test_a_batch_answers_like_one_at_a_time():
    tokenizer, model = TOKENIZERS[1], tiny(vocab_size=32768)
    tool = {"type": "function", "function": {"name": "add", "description": "", "parameters": {"type": "object"}}}
    chats = [[{"role": "user", "content": "x" * n}] for n in (9, 40, 2, 70, 11)]
    tools = [None, [tool], None, [tool], [tool]]
    want = [generate(model, tokenizer, c, 12, tools=t) for c, t in zip(chats, tools)]
    assert generate_batch(model, tokenizer, chats, 12, tools=tools, batch_size=2) == want
    assert generate_batch(model, tokenizer, chats[1:2] + chats[3:], 12, tools=[tool]) == [want[1], want[3], want[4]]


def test_calls_stay_readable():
    """What a model that calls a tool writes comes out so that `parse_tool_calls` reads it."""
    for tokenizer in TOKENIZERS[1:]:
        base = tokenizer.instruct_tokenizer.tokenizer
        call = '[{"name": "add", "arguments": {"a": 1}}]'
        ids = [base.get_special_token("[TOOL_CALLS]"), *base.encode(call, bos=False, eos=False)]
        text = "".join(text_pieces(ids, tokenizer))
        assert parse_tool_calls(text, tokenizer) == [{"name": "add", "arguments": {"a": 1}}]
