"""What the token view shows is what training gets: every token, its mask, its cut; and nothing of it can run."""

import json
import re
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from payloads import PAYLOADS
from payloads import broken
from payloads import rows
from payloads import strange

from mistral_nb.data.loader import TrainLoader
from mistral_nb.data.loader import cut_samples
from mistral_nb.data.source import Source
from mistral_nb.data.store import build_store
from mistral_nb.data.tokenize import PACKAGE
from mistral_nb.data.tokenize import encode_all
from mistral_nb.ui.tokens import TokenBrowser
from mistral_nb.ui.tokens import TokenView
from mistral_nb.ui.tokens import bytes_of

FILES = ["mistral_instruct_tokenizer_240323.model.v3", "tekken_240911.json"]
V3, TEKKEN = (MistralTokenizer.from_file(PACKAGE / name) for name in FILES)


def chat(*texts: str) -> dict:
    """A chat whose turns say `texts`."""
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(texts)]}


def chats(num: int = 12) -> list[dict]:
    """Chats of all-different lengths."""
    return [chat("Say it", " ".join(["kestrel"] * (n + 1)), "again", "ok") for n in range(num)]


TOKEN = re.compile(r"<(/?)(u|span)\b([^>]*)>")


def marks(page: str) -> list[tuple[int, int, bool]]:
    """Position, id, and whether trained, of every token shown in a page, by walking its elements."""
    out, trained = [], False
    for close, tag, attrs in TOKEN.findall(page[page.index("class='edge'"):]):
        if tag == "u": trained = not close
        if found := re.search(r"title='(\d+): id (\d+)'", attrs): out.append((int(found[1]), int(found[2]), trained))
    return out


@pytest.mark.parametrize("tokenizer", [V3, TEKKEN], ids=["v3", "tekken"])
@pytest.mark.parametrize("row", [
    chat("Hi", "Ho"), chat("a", "b", "c  d\n\n", "é🜚你"),
    {"messages": [{"role": "system", "content": "S"}, *chat("q", "r", "s", "t")["messages"]]}])
def test_every_token_is_shown_with_its_mask(tokenizer: MistralTokenizer, row: dict) -> None:
    samples = encode_all(row, tokenizer)
    shown = marks(TokenView(row, tokenizer)._repr_html_())
    want = [(i, int(t), bool(m)) for s in samples for i, (t, m) in enumerate(zip(s.ids, s.mask))]
    assert shown == want and any(trained for _, _, trained in shown)


@pytest.mark.parametrize("seq_len", [1, 2, 5, 9, 30, 500])
def test_the_cut_is_the_cut_of_training(tmp_path: Path, seq_len: int) -> None:
    """Tokens lost, and trained tokens kept, summed over a file, as the loader counts them."""
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in chats()))
    store = build_store(Source(file), V3)
    pieces = cut_samples(store, seq_len)
    views = [TokenView(row, V3, seq_len=seq_len) for row in chats()]
    kept = sum(s.trained for v in views for s in v.shown)
    assert kept == sum(int(store.sample(i).mask[1:seq_len + 1].sum()) for i in range(len(store)))
    lost = sum(s.num - s.kept for v in views for s in v.shown if s.trained)
    whole = sum(s.num - 1 for v in views for s in v.shown if not s.trained)
    assert lost + whole == pieces.lost
    if kept: assert sum(s.kept - 1 for v in views for s in v.shown if s.trained) == pieces.length.sum()
    for v in (v for v in views if any(s.kept < s.num for s in v.shown)):
        for words in (v._repr_html_(), str(v)): assert f"cut at seq_len {seq_len}" in words


def test_a_batch_is_shown_segment_by_segment(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in chats()))
    store = build_store(Source(file), V3)
    batch = TrainLoader([(store, 1.0, True)], seq_len=128, batch_size=2).batch(0)
    view = TokenView.of_batch(batch, V3)
    assert sum(s.trained for s in view.shown) == batch.num_trained
    assert [s.num - 1 for s in view.shown] == batch.seqlens
    for s, origin in zip(view.shown, batch.rows):
        row = chats()[int(origin.rpartition(":")[2]) - 1]
        assert any(np.array_equal(s.sample.ids, t.ids) and np.array_equal(s.sample.mask, t.mask)
                   for t in encode_all(row, V3)) and origin in s.name
    assert strange(view._repr_html_()) == []


@settings(max_examples=100, deadline=None)
@given(st.text(min_size=1, max_size=60))
def test_bytes_of_tokens_are_the_text(words: str) -> None:
    for tokenizer in (V3, TEKKEN):
        base = tokenizer.instruct_tokenizer.tokenizer
        ids = base.encode(words, bos=False, eos=False)
        if any(base.is_special(i) for i in ids): continue  # the unknown token of SentencePiece
        text = b"".join(bytes_of(i, tokenizer) for i in ids).decode()
        assert text == base.decode(ids) or text == " " + base.decode(ids)


@pytest.mark.parametrize("payload", PAYLOADS)
def test_no_payload_becomes_markup(payload: str) -> None:
    for row in (rows([payload])[0], broken([payload])[0], {"text": payload}, payload):
        for kind in ("instruct", "pretrain"):
            view = TokenView(row, V3, seq_len=40, kind=kind)
            page = view._repr_html_()
            assert strange(page) == [] and "\x1b" not in str(view)
            (page + str(view)).encode()


def test_words_are_those_of_the_row() -> None:
    row = chat("<b>bold</b> & 'quoted'", "fine")
    page = TokenView(row, TEKKEN)._repr_html_()
    words = unescape(re.sub(r"<[^>]*>", "", page[page.index("class='tok'"):]))
    assert "<b>bold</b>·&·'quoted'" in words


def test_long_rows_are_bounded() -> None:
    row = chat("word " * 60_000, "end")
    view = TokenView(row, V3, seq_len=30_000)
    page = view._repr_html_()
    assert len(page) < 250_000 and "tokens not shown" in page and "cut at seq_len 30,000" in page
    assert len(str(view)) < 20_000
    assert len(TokenView(row, V3, most=50)._repr_html_()) < 15_000
    many = TokenView(chat(*["a", "b"] * 300), V3)
    assert len(many._repr_html_()) < 900_000


def test_a_row_that_trains_nothing_says_so() -> None:
    row = chat("a", "b")
    row["messages"][1]["weight"] = 0
    for view in (TokenView(row, V3), TokenView(row, V3, exact_context=False)):
        assert "Nothing in this row is trained" in str(view) and "Nothing in this row" in view._repr_html_()


def test_the_browser_of_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("IN_TEST", raising=False)
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in chats(5)) + "{broken\n")
    browser = TokenBrowser(file, V3, seq_len=64)
    assert browser.pager.num == 6
    browser.pager.go(6)
    assert "not_json" in browser.body.value and f"{file.name}:6" in browser.place.value
    bundle = browser._repr_mimebundle_()
    assert set(bundle) == {"text/plain", "text/html", "application/vnd.jupyter.widget-view+json"}
    assert TokenBrowser([], V3)._repr_mimebundle_()["text/plain"] == "0 rows"
    assert len(TokenBrowser(iter(chats(9)), V3, most_rows=4).rows) == 4
