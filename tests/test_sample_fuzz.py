"""Any JSON value becomes samples or a `RowError` with a code, never another exception."""

import copy
import json
import pickle

import pytest
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from mistral_nb.data.sample import CODES
from mistral_nb.data.sample import WARNINGS
from mistral_nb.data.sample import Conversation
from mistral_nb.data.sample import RowError
from mistral_nb.data.sample import Text
from mistral_nb.data.sample import as_row
from mistral_nb.data.sample import parse_row
from mistral_nb.data.sample import review
from mistral_nb.data.source import read_rows
from mistral_nb.data.tokenize import TokenSample
from mistral_nb.data.tokenize import encode_all
from mistral_nb.data.tokenize import encode_prompt
from tekken_variants import write_tekken

VERSIONS = [None, "v1", "v2", "v3", "v7", "v11", "v13", "v15"]
KEYS = ["messages", "interactions", "content", "text", "role", "tools", "available_tools", "system_prompt", "only_last",
        "weight", "tool_calls", "tool_call_id", "id", "type", "function", "name", "arguments", "parameters",
        "description", "properties"]
WORDS = ["system", "user", "assistant", "tool", "function", "text", "object", "dict", "AbC123xyZ", "call_1", "null", "",
         " ", "\ud800", "\u2028", "NaN", "1" * 5000, "[" * 3000, '{"a": 1}',
         '{"a": 1e999}', '{"a": ' + "9" * 5000 + "}",
         '{"\\ud800": 1}']
texts = st.one_of(st.sampled_from(WORDS), st.text(st.characters(exclude_categories=()), max_size=20))
values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), texts, st.just(10**4000)),
    lambda inner: st.one_of(st.lists(inner, max_size=4),
                            st.dictionaries(st.one_of(st.sampled_from(KEYS), texts), inner, max_size=5)), max_leaves=25)

CALL = {"id": "AbC123xyZ", "type": "function", "function": {"name": "get", "arguments": '{"a": [1, "é"]}'}}
TOOL = {"type": "function", "function": {"name": "get", "description": "It gets.", "parameters": {
    "type": "object", "properties": {"a": {"type": "array", "items": {"type": "string"}}}}}}
CHAT = {"tools": [TOOL], "only_last": False, "system_prompt": "Be brief.", "messages": [
    {"role": "user", "content": "q"}, {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": '{"b": 2}', "tool_call_id": "AbC123xyZ"},
    {"role": "assistant", "content": "a", "weight": 1},
    {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
    {"role": "assistant", "content": "z"}]}


def paths(value, at=()):
    """Every place in a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at] + [p for k, v in inner for p in paths(v, (*at, k))]


PATHS = [p for p in paths(CHAT) if p]


def spoil(row, path, value, how):
    """`row` with the value at `path` replaced, removed, doubled or renamed."""
    row = copy.deepcopy(row)
    at = row
    try:
        for key in path[:-1]: at = at[key]
        if how == "replace": at[path[-1]] = value
        if how == "remove": del at[path[-1]]
        if how == "double" and isinstance(at, list): at.insert(path[-1], copy.deepcopy(at[path[-1]]))
        if how == "swap" and isinstance(at, list): at[path[-1]], at[0] = at[0], at[path[-1]]
        if how == "rename" and isinstance(at, dict): at[str(value)] = at.pop(path[-1])
    except (KeyError, IndexError, TypeError): pass  # an earlier spoiling took the place away
    return row


HOW = st.sampled_from(["replace", "remove", "double", "swap", "rename"])
spoiled = st.lists(st.tuples(st.sampled_from(PATHS), values, HOW), min_size=1, max_size=3)
some_line = st.one_of(st.binary(max_size=30), st.just(b"9" * 5000), values.map(lambda v: json.dumps(v).encode()))


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tekken")
    new = [MistralTokenizer.from_file(write_tekken(folder / v, v)) for v in ("v11", "v13", "v15")]
    return [MistralTokenizer.v1(), MistralTokenizer.v2(), MistralTokenizer.v3(), MistralTokenizer.v7(), *new]


def check_error(error: RowError) -> None:
    assert error.code in CODES and error.message and len(str(error)) < 1000
    str(error).encode()  # can be printed
    again = pickle.loads(pickle.dumps(error))
    assert (again.code, again.message, again.field, str(again)) == (error.code, error.message, error.field, str(error))


def parsed(row, kind, version):
    try: return parse_row(row, kind, version)
    except RowError as e: return check_error(e)


@settings(max_examples=400, deadline=None)
@given(values, st.sampled_from(["instruct", "pretrain"]), st.sampled_from(VERSIONS))
def test_any_value(row, kind, version):
    assert isinstance(parsed(row, kind, version), (Conversation, Text, type(None)))


@settings(max_examples=600, deadline=None)
@given(changes=spoiled, version=st.sampled_from(VERSIONS))
def test_a_spoiled_chat(changes, version):
    row = CHAT
    for change in changes: row = spoil(row, *change)
    before = repr(row)
    chat = parsed(row, "instruct", version)
    assert repr(row) == before  # nobody's row is changed
    if chat is None: return
    for warning in review(chat): assert warning.code in WARNINGS and warning.message and warning.field
    again = parse_row(json.loads(json.dumps(as_row(chat))), "instruct", version)
    assert (again.messages, again.tools, again.only_last) == (chat.messages, chat.tools, chat.only_last)


@settings(max_examples=250, deadline=None)
@given(changes=spoiled, exact=st.booleans(), dynamic=st.booleans(), which=st.integers(0, 6))
def test_a_spoiled_chat_is_tokenised_or_refused(tokenizers, changes, exact, dynamic, which):
    row = {k: v for k, v in CHAT.items() if k != "tools" or which}
    for change in changes: row = spoil(row, *change)
    try: samples = encode_all(row, tokenizers[which], "instruct", exact, dynamic)
    except RowError as e: return check_error(e)
    for s in samples:
        assert isinstance(s, TokenSample) and s.ids.dtype == "int32" and s.mask.dtype == bool
        assert s.ids.shape == s.mask.shape == (len(s.ids),) and len(s.ids) and not s.mask[0]
        assert not exact or s.mask[-1]


@settings(max_examples=100, deadline=None)
@given(changes=spoiled, which=st.integers(0, 6), stop=st.integers(1, 6))
def test_a_spoiled_prompt_is_tokenised_or_refused(tokenizers, changes, which, stop):
    row = CHAT
    for change in changes: row = spoil(row, *change)
    try: ids = encode_prompt(row.get("messages")[:stop], tokenizers[which], row.get("tools"))
    except RowError as e: return check_error(e)
    except TypeError: assert not isinstance(row.get("messages"), list); return
    assert ids and all(isinstance(i, int) for i in ids)


@settings(max_examples=150, deadline=None)
@given(st.lists(some_line, max_size=6), st.sampled_from([b"\n", b"\r\n", b"\r"]))
def test_any_file(tmp_path_factory, lines, end):
    file = tmp_path_factory.mktemp("any") / "x.jsonl"
    file.write_bytes(end.join(lines))
    for row in read_rows(file):
        assert row.line >= 1 and (row.error is None or row.error.code == "not_json")
        if row.error is None: parsed(row.value, "instruct", "v3")


def test_numbers_that_python_cannot_write_are_refused():
    arguments = ("messages", 1, "tool_calls", 0, "function", "arguments")
    for path in (("messages",), ("messages", 0, "content"), ("messages", 1, "weight"), ("only_last",),
                 ("system_prompt",), ("tools", 0, "function", "parameters", "type"), (*arguments, "a")):
        row = spoil(CHAT, arguments, {"a": 1}, "replace")
        with pytest.raises(RowError) as error: parse_row(spoil(row, path, 10**5000, "replace"), "instruct")
        check_error(error.value)


def test_deep_values_are_refused():
    deep = inner = []
    for _ in range(50_000): inner.append([]); inner = inner[0]
    for row in ({"messages": deep}, {"tools": deep, **{k: v for k, v in CHAT.items() if k != "tools"}},
                {**CHAT, "tools": [{"type": "function", "function": {"name": "f", "parameters": {"items": deep}}}]},
                spoil(CHAT, ("messages", 1, "tool_calls", 0, "function", "arguments"), {"a": deep}, "replace")):
        with pytest.raises(RowError) as error: parse_row(row, "instruct")
        check_error(error.value)
