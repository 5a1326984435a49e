"""Spoils real rows in every way and looks whether anything stumbles: `python tests/fuzz_rows.py 100000 [seed]`.

Each spoiled row must become samples or a `RowError` with a known code; mending it must give a valid row or an error,
must not change its argument, and mending twice must change nothing more. Converting it must give valid rows or reasons,
and converting these again must change nothing.
"""

import copy
import json
import random
import sys
import time
from collections import Counter
from pathlib import Path

from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from mistral_nb.data.convert import convert
from mistral_nb.data.mend import MENDS
from mistral_nb.data.mend import mend
from mistral_nb.data.mend import same
from mistral_nb.data.sample import CODES
from mistral_nb.data.sample import RowError
from mistral_nb.data.sample import parse_row
from mistral_nb.data.tokenize import encode_all
from mistral_nb.data.tokenize import version_of

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
KEYS = ["messages", "interactions", "conversations", "role", "from", "content", "value", "text", "tools", "functions",
        "available_tools", "tool_calls", "function_call", "tool_call_id", "id", "type", "function", "name", "arguments",
        "parameters", "weight", "loss_weight", "only_last", "system", "system_prompt", "reasoning", "properties"]
WORDS = ["", " ", "user", "assistant", "tool", "system", "gpt", "human", "function_call", "developer", "AbC123xyZ",
         "call_" + "a" * 24, "\ud800", "\ude00 \ud83d", "</s>[INST]", "{'a': True}", '{"a": 1,}', '"{\\"a\\": 1}"',
         "NaN", "null",
         '{"a": "\\ud800"}', "1" * 5000, "[" * 3000, "[1, 2]", "true", "0", "f.g h", "<script>alert(1)</script>"]
NUMBERS = [0, 1, -1, 2, 0.5, 1e308, float("nan"), float("inf"), 10**30, 10**5000, True, False]


def chat(*turns, **more):
    """A row of turns."""
    as_dict = lambda what: what if isinstance(what, dict) else {"content": what}
    return {"messages": [{"role": who, **as_dict(what)} for who, what in turns], **more}


def call(name="get", id_="AbC123xyZ", arguments='{"a": [1, "é"]}'):
    """A tool call."""
    return {"id": id_, "type": "function", "function": {"name": name, "arguments": arguments}}


TOOL = {"type": "function", "function": {"name": "get", "description": "It gets.", "parameters": {
    "type": "object", "properties": {"a": {"type": "array", "items": {"type": "string"}}}}}}
RESULT = {"content": "3", "tool_call_id": "AbC123xyZ"}
OWN = [
    chat(("system", "Be brief."), ("user", "q"), ("assistant", {"content": None, "tool_calls": [call()]}),
         ("tool", RESULT), ("assistant", {"content": "a", "weight": 1}),
         ("user", [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]), ("assistant", "z"),
         tools=[TOOL]),
    chat(("user", "both"), ("assistant", {"tool_calls": [call(), call(id_="aBc123XYz")]}),
         ("tool", {"content": "1", "tool_call_id": "aBc123XYz"}), ("tool", RESULT),
         ("assistant", "done"), ("system", "Now be brief."), ("user", "again"),
         ("assistant", {"content": "So.", "tool_calls": [call()]}), ("tool", RESULT),
         ("assistant", " "), ("assistant", "end"), ("user", "thanks"), available_tools=[TOOL], only_last=True),
    {"conversations": [{"from": "human", "value": "hi"}, {"from": "function_call", "value": '{"name": "get"}'},
                       {"from": "observation", "value": "3"}, {"from": "gpt", "value": "three"}],
     "functions": [{"name": "get", "parameters": {}}], "system": "Help."},
    {"text": "A text of its own."},
]


def real_rows(most: int = 40) -> list:
    """Rows of every published file, as they are and, more often, as they are converted."""
    rows = []
    for file in sorted(DATA.rglob("*.json*")) if DATA.is_dir() else []:
        if file.name.startswith(("possible", "train__schema")): continue
        text = file.read_text(encoding="utf-8")
        try: values = json.loads(text)
        except ValueError: values = [json.loads(line) for line in text.splitlines()[:most]]
        rows += values[:most // 8] if isinstance(values, list) else [values]
        rows += convert(values[:most]).rows[:most] if isinstance(values, list) else []
    return [row for row in rows if len(json.dumps(row)) < 6000]


def places(value, at=()):
    """Every place in a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at] + [p for k, v in inner for p in places(v, (*at, k))]


def some_value(rnd: random.Random, rows: list):
    """A value that is likely to hurt."""
    pick = rnd.random()
    if pick < .4: return rnd.choice(WORDS)
    if pick < .6: return rnd.choice(NUMBERS)
    if pick < .8: return copy.deepcopy(rnd.choice([None, [], {}, [None], {"a": None}, [[]], [{}], {"type": "text"}]))
    row = rnd.choice(rows)
    place = rnd.choice(places(row))
    for key in place: row = row[key]
    return copy.deepcopy(row)


def as_text(value, write) -> str:
    """`value` as Python or JSON writes it."""
    try: return write(value)
    except ValueError: return "a number of 5,001 digits"


def spoil(row, rnd: random.Random, rows: list):
    """`row` with one thing replaced, removed, doubled, moved, renamed, put in or written as text."""
    found = places(row)[1:]
    deep = [place for place in found if len(place) > 2]
    place = rnd.choice(deep if deep and rnd.random() < .7 else found or [()])
    if not place: return some_value(rnd, rows)
    at, key = row, place[-1]
    for k in place[:-1]: at = at[k]
    how = rnd.choice(["replace", "replace", "remove", "double", "move", "rename", "insert", "text"])
    if how == "replace": at[key] = some_value(rnd, rows)
    elif how == "remove": del at[key]
    elif how == "double" and isinstance(at, list): at.insert(key, copy.deepcopy(at[key]))
    elif how == "move" and isinstance(at, list): at.insert(rnd.randrange(len(at)), at.pop(key))
    elif how == "rename" and isinstance(at, dict): at[rnd.choice(KEYS)] = at.pop(key)
    elif how == "text": at[key] = as_text(at[key], str if rnd.random() < .3 else json.dumps)
    elif isinstance(at, list): at.insert(rnd.randrange(len(at) + 1), some_value(rnd, rows))
    else: at[rnd.choice(KEYS)] = some_value(rnd, rows)
    return row


def check(row, tokenizer, kind: str) -> str:
    """What became of one row; raises AssertionError where a promise is broken."""
    before = copy.deepcopy(row)
    try: first = "good" if encode_all(row, tokenizer, kind) is not None else ""
    except RowError as e:
        assert e.code in CODES, e.code
        first = e.code
    done = mend(row, kind, version_of(tokenizer))
    assert same(row, before), "the argument was changed"
    assert set(done.applied) <= set(MENDS) and (done.row is None) == (done.error is not None)
    if done.error: assert done.error.code in CODES and first != "good"
    else:
        parse_row(done.row, kind, version_of(tokenizer))
        again = mend(done.row, kind, version_of(tokenizer))
        assert not again.changed and again.row is done.row, f"mended twice: {again.applied}"
        if first == "good" and not done.changed: assert done.row is row
    made = convert([row])
    assert same(row, before) and (made.rows or made.skipped)
    assert same(convert(made.rows).rows, made.rows), "converting twice changes something"
    return f"{first:18} {'not mended' if done.error else 'mended' if done.changed else 'as it was'}"


def fuzz(number: int, seed: int = 0, rows: list | None = None) -> Counter:
    """Outcomes of `number` spoiled rows."""
    rnd, rows, seen = random.Random(seed), rows or OWN + real_rows(), Counter()
    tokenizers = [MistralTokenizer.v3(), MistralTokenizer.v3(is_tekken=True), MistralTokenizer.v7()]
    for i in range(number):
        row = copy.deepcopy(rnd.choice(OWN if rnd.random() < .3 else rows))
        for _ in range(rnd.choice([1, 1, 2, 3])): row = spoil(row, rnd, rows)
        kind = "pretrain" if isinstance(row, dict) and "text" in row and rnd.random() < .9 else "instruct"
        tokenizer = rnd.choice(tokenizers)
        try: seen[check(row, tokenizer, kind)] += 1
        except Exception as e:
            e.add_note(f"row {i} of seed {seed}, {kind}, {version_of(tokenizer)}: {ascii(row)[:3000]}")
            raise
    return seen


if __name__ == "__main__":
    number, seed = int(sys.argv[1]) if len(sys.argv) > 1 else 1000, int(sys.argv[2]) if len(sys.argv) > 2 else 0
    start = time.process_time()
    outcomes = fuzz(number, seed)
    for outcome, count in sorted(outcomes.items()): print(f"{count:8,}  {outcome}")
    print(f"{outcomes.total():,} rows, seed {seed}, {time.process_time() - start:.0f} s of CPU; no promise broken")
