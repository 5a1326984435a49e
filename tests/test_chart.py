"""Figures as HTML: whatever the text, it stays text; whatever the numbers, they are counted right and stay small."""

import json
import re

import numpy as np
import pytest
from hypothesis import example
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
from payloads import PAYLOADS
from payloads import strange

from mistral_nb import chart


def everything(words: str) -> str:
    """A page that uses all there is, with `words` wherever words go."""
    return chart.page(words, chart.heading(words), chart.note(words), chart.details(words, words),
                      chart.table([words, "n"], [[words, 1], [words, 2]]), chart.tiles({words: words}),
                      chart.bars({words: 3, "b": 1}), chart.shares({words: 2, "c": 1}, unit=words),
                      chart.histogram([1, 5, 9], words, 4, words, words))


@pytest.mark.parametrize("payload", PAYLOADS)
def test_no_payload_becomes_markup(payload: str) -> None:
    page = everything(payload)
    assert strange(page) == []
    page.encode()
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\ud800-\udfff]", page)


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet=st.characters(codec=None), max_size=60))
def test_any_text_stays_text(words: str) -> None:
    page = everything(words)
    assert strange(page) == []
    json.dumps(page).encode()


@pytest.mark.parametrize("payload", ["<b>", "<img src=x onerror=1>", "<td onclick=1>", "<!-- -->"])
def test_the_check_of_pages_notices(payload: str) -> None:
    assert strange(chart.page(chart.Html(payload))) or payload == "<b>"


@settings(max_examples=200, deadline=None)
@example([469, 834], 469)
@given(st.lists(st.integers(0, 10**7), max_size=60), st.none() | st.integers(1, 10**6))
def test_a_histogram_counts_every_value_once_and_splits_at_its_mark(values: list[int], mark: int | None) -> None:
    values = np.array(values, np.int64)
    edges = chart.edges_of(values, mark)
    counts = chart.counted(values, edges)
    assert counts.sum() == len(values) and len(counts) <= 80 and (np.diff(edges) > 0).all() and edges[0] == 0
    if mark and mark < values.max(initial=0) and mark <= edges[-1]:
        assert counts[edges[1:] > mark].sum() == (values > mark).sum()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 10**5), min_size=1, max_size=300), st.integers(1, 10**5))
def test_the_table_under_a_histogram_adds_up(values: list[int], mark: int) -> None:
    page = chart.histogram(values, "t", mark, "m", "u")
    table = page[page.index("the same as a table"):]
    counts = [int(n.replace(",", "")) for n in re.findall(r"<td class=n>([\d,]+)</td></tr>", table)]
    assert sum(counts) == len(values)


def test_pages_stay_small() -> None:
    many = {f"name {i} " * 50: i + 1 for i in range(5000)}
    assert len(chart.bars(many)) < 10_000
    assert len(chart.table(["a"], ([k] for k in many))) < 100_000
    assert len(chart.text("<" * 10**6)) < 10_000


@pytest.mark.parametrize("part, whole, words", [
    (0, 0, "0 %"), (1, 1, "100 %"), (999_999, 10**6, "> 99.9 %"), (1, 10**6, "< 0.1 %"), (1, 3, "33.3 %")])
def test_percent(part: int, whole: int, words: str) -> None:
    assert chart.percent(part, whole) == words
