"""The short ways of tokenising give what mistral-common gives: words, arrays, plain chats, and ends of calls."""

import copy
import json
import os
import random
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from mistral_nb.data import tokenize
from mistral_nb.data.sample import RowError
from mistral_nb.data.tokenize import PACKAGE
from mistral_nb.data.tokenize import PROBES
from mistral_nb.data.tokenize import EncodedRow
from mistral_nb.data.tokenize import Remembering
from mistral_nb.data.tokenize import TekkenWords
from mistral_nb.data.tokenize import Words
from mistral_nb.data.tokenize import array_ids
from mistral_nb.data.tokenize import decode
from mistral_nb.data.tokenize import encode_all
from mistral_nb.data.tokenize import encode_row
from mistral_nb.data.tokenize import plain_chat
from mistral_nb.data.tokenize import remembering
from mistral_nb.data.tokenize import shape_of
from mistral_nb.data.tokenize import written_chat
from tekken_variants import write_tekken

SPM = {"v1": "tokenizer.model.v1", "v2": "mistral_instruct_tokenizer_240216.model.v2",
       "v3": "mistral_instruct_tokenizer_240323.model.v3", "v7": "mistral_instruct_tokenizer_241114.model.v7"}
TEKKEN = {"tekken 240718": "tekken_240718.json", "tekken 240911": "tekken_240911.json"}
NEWER = ("v7", "v11", "v13", "v15")  # small tekken files of these versions


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tekken")
    made = {name: MistralTokenizer.from_file(PACKAGE / file) for name, file in (SPM | TEKKEN).items()}
    return made | {f"small {v}": MistralTokenizer.from_file(write_tekken(folder / v, v)) for v in NEWER}


NAMES = [*SPM, *TEKKEN, *(f"small {v}" for v in NEWER)]


def mismatches(tokenizer, texts) -> list[str]:
    """The texts that are written otherwise than mistral-common writes them."""
    base, fast = tokenizer.instruct_tokenizer.tokenizer, remembering(tokenizer).tokenizer
    return [text for text in texts if fast.raw(text) != np.array(base.encode(text, False, False), np.int32).tobytes()]


# ---- texts

BLANKS = [chr(i) for i in range(0x110000) if chr(i).isspace()] + list("▁\u200b\u200d\u2060\ufeff\u00ad\x00")
PIECES = [*BLANKS, *" \n" * 20, "\r\n", "  ", "    ", "\n\n", "\n ", " \n", " ▁", "▁ ", "a", "Word", "words", "don't",
          "x=1;", "12345", "٣", "½", "ﬁ", "Ａ", "é", "e\u0301", "你好", "日本語のテキスト", "한국어", "नमस्ते", "ไทย",
          "🙂", "👩\u200d👩\u200d👧", "<s>", "</s>", "[INST]", "[/INST]", "<unk>", "<0x0A>", "[control_8]",
          "https://example.org/a?b=c#d", "a" * 50, "word" * 30, "=" * 40, "\ud7ff", "\uffff",
          "\U0010ffff", ".", ",", "/", "\\n"]


def made_texts(count: int, seed: int = 0) -> Iterator[str]:
    """Texts put together from awkward pieces, with and without words between them."""
    draw = random.Random(seed)
    for _ in range(count):
        pieces = draw.choices(PIECES, k=draw.randint(0, 24))
        yield draw.choice(["", " ", " word "]).join(pieces)


@pytest.mark.parametrize("name", [*SPM, *TEKKEN])
def test_awkward_texts_are_written_as_mistral_common_writes_them(name, tokenizers):
    for blank in BLANKS:
        places = ["{0}", "{0}{0}", "a{0}b", " {0} ", "a {0}b", "a{0} b", "{0}\n{0}", "\n{0}a", "a{0}", "{0}a", "a\n{0}"]
        assert mismatches(tokenizers[name], [place.format(blank) for place in places]) == [], repr(blank)
    assert mismatches(tokenizers[name], made_texts(20_000 if name in ("v3", "tekken 240911") else 3_000)) == []


any_text = st.text(st.one_of(st.sampled_from(" \n\t▁ab."), st.characters(exclude_categories=["Cs"])), max_size=80)


@settings(max_examples=300, deadline=None)
@given(any_text)
def test_any_text_is_written_as_mistral_common_writes_it(tokenizers, text):
    for name in (*SPM, *TEKKEN): assert mismatches(tokenizers[name], [text, f"x\n{text} y"]) == [], name


def strings(value) -> Iterator[str]:
    """Every string in a JSON value."""
    if isinstance(value, str): yield value
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for part in inner: yield from strings(part)


def read_strings(path: Path) -> Iterator[str]:
    """The strings of a data file, without halves of characters; of a file without JSON, the lines."""
    whole = path.read_text(encoding="utf-8", errors="replace")
    try: value = json.loads(whole)
    except ValueError:
        lines = [line for line in whole.split("\n") if line]
        value = [json.loads(line) for line in lines] if path.suffix in (".json", ".jsonl") else lines
    for text in strings(value): yield text.encode("utf-8", "replace").decode()


def real_texts(folder: Path, count: int) -> Iterator[str]:
    """Strings of the data files below `folder`, each once in any order, and then pieces cut out of them anywhere."""
    kinds, draw = (".json", ".jsonl", ".txt", ".md"), random.Random(0)
    found = list({text for path in sorted(folder.rglob("*")) if path.suffix in kinds for text in read_strings(path)})
    found.sort()
    draw.shuffle(found)
    yield from found[:count // 2]
    for _ in range(count - len(found[:count // 2])):
        text = draw.choice(found)
        start = draw.randrange(len(text) + 1)
        yield text[start:start + draw.randint(0, 300)]


@pytest.mark.parametrize("name", [*SPM, *TEKKEN])
def test_real_texts_are_written_as_mistral_common_writes_them(name, tokenizers, shared):
    """MISTRAL_NB_TEXTS=400000 takes as many texts, and minutes."""
    count, done = int(os.environ.get("MISTRAL_NB_TEXTS", 3_000)), 0
    for text in real_texts(shared / "data", count):
        assert mismatches(tokenizers[name], [text]) == [], repr(text[:200])
        done += 1
    print(f"{name}: {done} texts, no mismatch")
    assert done == count


@pytest.mark.parametrize("name", ["v3", "tekken 240911"])
def test_the_memory_of_words_is_bounded(name, tokenizers, monkeypatch):
    monkeypatch.setattr(tokenize, "MOST_WORDS", 50)
    base = tokenizers[name].instruct_tokenizer.tokenizer
    words = Words(base.encode) if name == "v3" else TekkenWords(array_ids(base))
    for i in range(400):
        text = f"word{i} other{i % 7}\n{i} {'long' * 20}"
        assert np.frombuffer(words.ids(text), np.int32).tolist() == base.encode(text, bos=False, eos=False)
        assert max(len(words), len(words.older)) <= 50
        assert all(len(word) <= tokenize.LONGEST_WORD for word in words | words.older)


def test_a_tekken_with_another_pattern_is_not_cut_at_spaces(tmp_path):
    path = write_tekken(tmp_path, "v7")
    data = json.loads(path.read_text(encoding="utf-8"))
    data["config"]["pattern"] = r"\w+ \w+|\s+|."  # joins two words
    path.write_text(json.dumps(data), encoding="utf-8")
    other = MistralTokenizer.from_file(path)
    fast = remembering(other).tokenizer
    assert not fast.by_words and "array_ids" in fast.raw.__qualname__
    assert mismatches(other, ["two words and two", *PROBES, *made_texts(500)]) == []


def test_without_arrays_the_ids_are_those_of_mistral_common(tokenizers):
    class Old:
        """As with a tiktoken that gives no arrays."""
        def __init__(self, base): self.base, self._model = base, object()
        def __getattr__(self, name): return getattr(self.base, name)
    base = tokenizers["tekken 240911"].instruct_tokenizer.tokenizer
    fast = Remembering(Old(base))
    assert not fast.by_words and "plain_ids" in fast.raw.__qualname__
    for text in PROBES: assert fast.encode(text, bos=True, eos=True) == base.encode(text, bos=True, eos=True)


# ---- plain chats

def chat(roles: str, texts: list[str], key: str = "messages") -> dict:
    """A row with the roles of `roles`: s, u, a."""
    names = {"s": "system", "u": "user", "a": "assistant"}
    return {key: [{"role": names[r], "content": texts[i % len(texts)]} for i, r in enumerate(roles)]}


def long_way(row, tokenizer, exact=True, dynamic=True) -> EncodedRow:
    with tokenize.as_row_error(): return written_chat(row, tokenizer, exact, dynamic)


def told(way, *args):
    """What a way of encoding says of a row: all that it gives, or its error."""
    try: row = way(*args)
    except RowError as e: return e.code, e.message, e.field
    assert all(s.ids.dtype == np.int32 and s.mask.dtype == bool and s.ids.flags.writeable for s in row.samples)
    return [(s.ids.tolist(), s.mask.tolist()) for s in row.samples], row.warnings, row.turns, row.calls


def check_ways(row, tokenizer) -> bool:
    """Both ways say the same of `row`; whether it took the short one."""
    before = copy.deepcopy(row)
    for options in ((True, True), (False, True), (False, False)):
        assert told(encode_row, row, tokenizer, "instruct", *options) == told(long_way, row, tokenizer, *options), row
    assert row == before
    return plain_chat(row, tokenizer) is not None


TEXTS = ["Hello.", "x", "a_b", "1", "½", "[INST] no [/INST]", "</s>", "a\n\n  b\tc", "你好", "🙂", "—“q”", "\u200b",
         "/", "]", "two words", "."]


@pytest.mark.parametrize("name", NAMES)
def test_plain_chats_take_the_short_way_and_give_the_same(name, tokenizers):
    t, draw = tokenizers[name], random.Random(0)
    for roles in ("ua", "uaua", "uauaua", "ua" * 9, "ua" * 32):
        for key in ("messages", "interactions"):
            took = [check_ways(chat(roles, draw.choices(TEXTS, k=len(roles)), key), t) for _ in range(8)]
            assert all(took), roles
    for roles in ("sua", "suaua", "s" + "ua" * 20):
        took = [check_ways(chat(roles, draw.choices(TEXTS, k=len(roles))), t) for _ in range(8)]
        assert all(took) == any(took) == (name == "v7" or name.startswith("small"))  # a system prompt is a block there


@pytest.mark.parametrize("name", NAMES)
def test_keys_that_nobody_reads_do_not_matter(name, tokenizers):
    row = chat("uaua", ["a question", "an answer"])
    for more in ({"id": 7}, {"weight": 0}, {"text": "a"}, {"conversations": [], "source": {"a": [None]}}, {"": 1}):
        assert check_ways({**more, **row}, tokenizers[name]) and check_ways({**row, **more}, tokenizers[name])


def outside() -> Iterator[dict]:
    """Rows that are just not plain, good and bad."""
    row = chat("uaua", ["a question", "an answer"])
    for roles in ("", "u", "a", "au", "uu", "aa", "sa", "su", "us", "uua", "uaa", "uau", "usa", "ssua", "auau", "saua",
                  "ua" * 33):
        yield chat(roles, ["one", "two", "three"])
    for text in ("", " ", "\n", " a", "a ", "a\n", "\u3000a", "a\u2028", "▁", "a▁", "▁a", "a▁▁b", "\ud800", "a\udc00b",
                 None, 1, True, ["a"], {}, [], [{"type": "text", "text": "a"}], [{"type": "image_url"}]):
        for i in range(4):
            yield {"messages": [{**m, "content": text} if k == i else m for k, m in enumerate(row["messages"])]}
    for more in ({"weight": 0}, {"weight": 1}, {"name": "x"}, {"tool_calls": []}, {"tool_calls": None}, {"text": "b"}):
        for i in range(4): yield {"messages": [{**m, **more} if k == i else m for k, m in enumerate(row["messages"])]}
    for more in ({"tools": []}, {"tools": None}, {"only_last": True}, {"only_last": False},
                 {"system_prompt": "Be brief."}, {"system_prompt": ""}, {"interactions": row["messages"]}):
        yield {**row, **more}
    for role in ("User", "human", None, 1, [], "tool", "system"):
        yield {"messages": [{**m, "role": role} if k == 2 else m for k, m in enumerate(row["messages"])]}
    yield from ({"messages": tuple(row["messages"])}, {"messages": {}}, {"messages": None}, {}, {"conversations": []},
                {"text": "a"}, {"messages": [*row["messages"][:3], "answer"]}, {"messages": [[], *row["messages"]]})
    for m in ({"role": "user"}, {"content": "a"}, {"role": "user", "text": "a"}, {}):
        yield {"messages": [m, row["messages"][1]]}


@pytest.mark.parametrize("name", NAMES)
def test_rows_that_are_not_plain_take_the_long_way(name, tokenizers):
    for row in outside(): assert not check_ways(row, tokenizers[name]), row
    for value in (None, [], "row", 3): assert not check_ways(value, tokenizers[name])


plain_text = st.one_of(st.sampled_from(TEXTS), st.text(st.characters(), max_size=12))
some_roles = st.sampled_from(["ua", "uaua", "sua", "suaua", "uauaua", "uua"])
some_chat = st.builds(chat, some_roles, st.lists(plain_text, min_size=1, max_size=6))


@settings(max_examples=150, deadline=None)
@given(some_chat)
def test_any_chat_gives_the_same_on_both_ways(tokenizers, row):
    for name in NAMES: check_ways(row, tokenizers[name])


def test_real_chats_give_the_same_on_both_ways(tokenizers, shared):
    with open(shared / "golden" / "tokens.jsonl", "rb") as lines: golden = [json.loads(line) for line in lines]
    for g in golden:
        if g["kind"] != "instruct": continue
        for name in ("v3", "v7", "tekken 240911"): check_ways(g["row"], tokenizers[name])


def test_the_memory_of_shapes_is_bounded(tokenizers):
    row = chat("ua" * 500, ["text"])
    before = shape_of.cache_info().currsize
    for n in range(2, 400): plain_chat({"messages": row["messages"][:n]}, tokenizers["v3"])
    assert shape_of.cache_info().currsize <= min(before + tokenize.MOST_MESSAGES, shape_of.cache_info().maxsize)


# ---- the row's account

CALL = {"id": "AbC123xyZ", "type": "function", "function": {"name": "get.time", "arguments": '{"city": "Lima"}'}}
TOOL = {"type": "function", "function": {"name": "get.time", "description": "", "parameters": {"type": "object"}}}


def asked(city: str, tail: int = 2, **more) -> dict:
    """A chat with a call, its result and an answer, and `tail` more messages."""
    call = {**CALL, "function": {"name": "get.time", "arguments": json.dumps({"city": city})}}
    messages = [{"role": "user", "content": "What time is it?"}, {"role": "assistant", "tool_calls": [call]},
                {"role": "tool", "content": "12:00", "tool_call_id": CALL["id"]},
                {"role": "assistant", "content": "Noon."}, {"role": "user", "content": "Thanks!"},
                {"role": "assistant", "content": "You are welcome."}]
    return {"messages": messages[:4 + tail], **more}


def test_a_row_says_its_turns_its_calls_and_what_is_strange(tokenizers):
    made = encode_row(asked("Lima", tools=[TOOL]), tokenizers["v3"])
    assert (made.turns, made.calls, made.warnings) == (2, ("get_time",), ())
    made = encode_row(chat("uuaua", ["a", "b </s>"]), tokenizers["v3"])
    assert (made.turns, made.calls) == (3, ()) and {w.code for w in made.warnings} == {"control_text"}
    made = encode_row({"text": "It says [/INST]."}, tokenizers["v3"], "pretrain")
    assert (made.turns, made.calls, len(made.samples)) == (0, (), 1) and made.warnings[0].code == "control_text"
    short = encode_row(chat("uaua", ["fine", "[TOOL_CALLS] <s>"], "interactions"), tokenizers["v3"])
    assert [w.field for w in short.warnings] == ["interactions[1].content", "interactions[3].content"]
    assert "<s> and [TOOL_CALLS]" in short.warnings[0].message


# ---- how a call ends

CITIES = ["Lima", "Oslo", "Rome", "Bern", "Cairo", "Delhi", "Quito", "Tunis", "Accra", "Hanoi", "Minsk", "Paris"]


def ends_at_a_call(sample, tokenizer) -> bool:
    """Whether the last answer of a sample is a call."""
    text = decode(sample.ids, tokenizer, control=True)
    return re.split(r"\[/INST\]|\[/TOOL_RESULTS\]", text)[-1].startswith("[TOOL_CALLS]")


@pytest.mark.parametrize("name", NAMES[1:])
def test_some_rows_teach_how_a_call_ends(name, tokenizers):
    t, some = tokenizers[name], 0
    hides = name in ("v3", "v7", "small v7", *TEKKEN)  # their ids stand behind the arguments
    for city in CITIES:
        for row in (asked(city), asked(city, tail=0), asked(city, tools=[TOOL])):
            samples = encode_all(row, t)
            calls = [s for s in samples if ends_at_a_call(s, t)]
            some += len(calls)
            assert len(calls) <= hides
            if not calls: continue
            [call] = calls
            text = decode(call.ids[call.mask], t, control=True)
            assert text.endswith("}}]</s>") and CALL["id"] not in text
            rest = "".join(decode(s.ids[s.mask], t, control=True) for s in samples if s is not call)
            assert "[TOOL_CALLS]" not in rest and rest.count("</s>") == 1 + len(row["messages"]) // 6
            assert len(call.ids) == min(len(s.ids) for s in samples)
    assert (some > 0) == hides


def test_a_row_that_ends_at_a_call_needs_no_more(tokenizers):
    for city in CITIES:
        row = asked(city, tail=0)
        row["messages"] += [{"role": "user", "content": "And in Rome?"}, {"role": "assistant", "tool_calls": [CALL]}]
        assert len(encode_all(row, tokenizers["v3"])) == 1
        assert len(encode_all({**row, "tools": [TOOL]}, tokenizers["v3"])) == 2
        weightless = asked(city)
        weightless["messages"][1]["weight"] = 0
        assert len(encode_all(weightless, tokenizers["v3"])) == 1


def test_which_rows_depends_on_the_row_alone(tokenizers, monkeypatch):
    first = [len(encode_all(asked(city), tokenizers["v3"])) for city in CITIES]
    assert first == [len(encode_all(asked(city), tokenizers["v3"])) for city in CITIES] and set(first) == {1, 2}
    monkeypatch.setattr(tokenize, "ENDS_EVERY", 1)
    assert {len(encode_all(asked(city), tokenizers["v3"])) for city in CITIES} == {2}
