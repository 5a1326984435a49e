"""Mending: what is repaired, what is left alone, and the promises for any JSON value and any file."""

import copy
import json
import os
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st

from fuzz_rows import OWN
from fuzz_rows import TOOL
from fuzz_rows import call
from fuzz_rows import chat
from fuzz_rows import fuzz
from fuzz_rows import real_rows
from mistral_nb.data.mend import MENDS
from mistral_nb.data.mend import mend
from mistral_nb.data.mend import mend_file
from mistral_nb.data.mend import mendable
from mistral_nb.data.mend import same
from mistral_nb.data.sample import CODES
from mistral_nb.data.sample import WARNINGS
from mistral_nb.data.sample import parse_row
from mistral_nb.data.sample import review
from mistral_nb.data.source import read_rows
from test_sample_fuzz import CHAT
from test_sample_fuzz import spoil
from test_sample_fuzz import spoiled
from test_sample_fuzz import values

USER, BOT = ("user", "q"), ("assistant", "a")
LONG = "call_" + "a" * 24
calling = lambda *calls, **more: ("assistant", {"tool_calls": [*calls], **more})
result = lambda id_, content="3": ("tool", {"content": content, "tool_call_id": id_})
flat = {"name": "get", "arguments": {"a": ["x"]}}

# name of the mends, the row, what the mended row's messages or another key look like
REPAIRED = {
    "a question after the last answer": (chat(USER, BOT, ("user", "thanks")), ["last_turns"]),
    "a result after the last answer": (chat(USER, calling(call()), result("AbC123xyZ")), ["last_turns"]),
    "an answer before the first question": (chat(("assistant", "Welcome"), USER, BOT), ["first_turns"]),
    "an empty answer": (chat(USER, ("assistant", ""), BOT), ["silent_turns"]),
    "an answer of null": (chat(USER, ("assistant", None), BOT), ["silent_turns"]),
    "a question of null": (chat(("user", None), USER, BOT), ["silent_turns"]),
    "a blank answer, which validates": (chat(USER, ("assistant", " \n"), BOT), ["silent_turns"]),
    "half a character": (chat(("user", "\ud800"), BOT), ["characters"]),
    "half a character in arguments": (chat(USER, calling(call(arguments='{"a": "\\ud800"}'))), ["characters"]),
    "messages that are called interactions too": (chat(USER, BOT) | {"interactions": chat(USER, BOT)["messages"]},
                                                  ["spellings"]),
    "content that is called text too": (chat(USER, ("assistant", {"content": "a", "text": "a"})), ["spellings"]),
    "a system prompt that is the system message": (chat(("system", "s"), USER, BOT, system_prompt="s"), ["spellings"]),
    "messages under another name": ({"conversation": chat(USER, BOT)["messages"]}, ["messages_key"]),
    "messages of null beside the real ones": ({"messages": None, "conversations": chat(USER, BOT)["messages"]},
                                              ["messages_key"]),
    "messages in a string": ({"messages": str(chat(USER, BOT)["messages"])}, ["messages_text"]),
    "a ShareGPT row": ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
                       ["messages_key", "message_keys", "roles"]),
    "a bot": (chat(USER, ("bot", "a")), ["roles"]),
    "a developer": (chat(("developer", "s"), USER, BOT), ["roles"]),
    "a role in capitals": (chat(("User ", "q"), BOT), ["roles"]),
    "a turn that is a call": (chat(USER, ("function_call", '{"name": "get"}'), ("observation", "3"), BOT),
                              ["call_turns", "roles", "ids"]),
    "a function_call of 2023": (chat(USER, ("assistant", {"content": None, "function_call": flat}),
                                     ("function", {"name": "get", "content": "3"}), BOT),
                                ["function_call", "roles", "ids"]),
    "a flat call": (chat(USER, calling(flat)), ["calls"]),
    "calls that are one object": (chat(USER, ("assistant", {"tool_calls": call()})), ["calls"]),
    "calls in a string": (chat(USER, ("assistant", {"tool_calls": json.dumps([call()])})), ["calls"]),
    "parameters in place of arguments": (chat(USER, calling({"function": {"name": "get", "parameters": {"a": 1}}})),
                                         ["arguments_key"]),
    "arguments as Python": (chat(USER, calling(call(arguments="{'a': True}"))), ["arguments"]),
    "arguments as JSON in JSON": (chat(USER, calling(call(arguments='"{\\"a\\": 1}"'))), ["arguments"]),
    "no ids": (chat(USER, calling(call(id_=None)), result(None), BOT), ["ids"]),
    "short ids": (chat(USER, calling(call(id_="1")), result("1"), BOT), ["ids"]),
    "one id twice in a message": (chat(USER, calling(call(), call()), result("AbC123xyZ"), result("AbC123xyZ"), BOT),
                                  ["ids"]),
    "one id in two messages": (chat(USER, calling(call()), result("AbC123xyZ"), BOT, USER, calling(call()),
                                    result("AbC123xyZ"), BOT), ["ids"]),
    "a result with a foreign id": (chat(USER, calling(call()), result("xyz123ABC"), BOT), ["ids"]),
    "tools in a string": (chat(USER, BOT, tools=json.dumps([TOOL])), ["tools"]),
    "flat tools": (chat(USER, BOT, tools=[TOOL["function"]]), ["tools"]),
    "a tool twice": (chat(USER, BOT, tools=[TOOL, TOOL]), ["tools"]),
    "tools called functions": (chat(USER, BOT, functions=[TOOL["function"]]), ["tools_key", "tools"]),
    "a name with a blank": (chat(USER, calling(call("get it")), tools=[{"function": {"name": "get it"}}]), ["names"]),
    "parts with value": (chat(("user", [{"type": "text", "value": "q"}, "more"]), BOT), ["parts"]),
    "a result that is an object": (chat(USER, calling(call()), result("AbC123xyZ", {"a": 1}), BOT), ["results"]),
    "a result of null": (chat(USER, calling(call()), result("AbC123xyZ", None), BOT), ["results"]),
    "a weight in words": (chat(USER, ("assistant", {"content": "a", "weight": "false"})), ["weights"]),
    "a loss_weight": (chat(USER, ("assistant", {"content": "a", "loss_weight": 0.0})), ["weight_key"]),
    "a system prompt beside the messages": (chat(USER, BOT, system="s"), ["system_key"]),
    "only_last in words": (chat(USER, BOT, only_last="yes"), ["only_last"]),
    "a system message behind an answer": (chat(USER, BOT, ("system", "s"), USER, BOT), ["mid_system"]),
}


@pytest.mark.parametrize("row, applied", REPAIRED.values(), ids=REPAIRED)
def test_repaired(row, applied):
    before = copy.deepcopy(row)
    done = mend(row)
    assert done.error is None and sorted(done.applied) == sorted(applied) and done.changed
    assert same(row, before)
    assert parse_row(done.row, "instruct") and not mend(done.row).changed
    json.dumps(done.row, ensure_ascii=False).encode()


LEFT = {
    "reasoning": (chat(USER, ("assistant", {"content": "a", "reasoning": "hm"})), "unsupported"),
    "an image": (chat(("user", [{"type": "image_url", "image_url": "x"}]), BOT), "unsupported"),
    "an unanswered call": (chat(USER, calling(call()), BOT), "unanswered_call"),
    "more calls than results": (chat(USER, calling(call(), call(id_="aBc123XYz")), result("xyz123ABC"), BOT),
                                "unmatched_result"),
    "two contents": (chat(USER, ("assistant", {"content": "a", "text": "b"})), "two_spellings"),
    "two weights": (chat(USER, BOT, ("assistant", {"content": "b", "weight": 0})), "mixed_weights"),
    "half a weight": (chat(USER, ("assistant", {"content": "a", "weight": 0.5})), "bad_weight"),
    "arguments that are a word": (chat(USER, calling(call(arguments="Paris"))), "bad_arguments"),
    "an unknown role": (chat(("narrator", "once"), BOT), "unknown_role"),
    "no question": (chat(("user", None), ("assistant", "")), "not_text"),
    "a turn that says something under an unknown name": (chat(("user", {"body": "hello"}), BOT), "not_text"),
    "a number as content": (chat(("user", 5), BOT), "not_text"),
    "two tools of one name": (chat(USER, BOT, tools=[TOOL, {"function": {"name": "get"}}]), "bad_tool"),
    "a text": ({"text": "x"}, "wrong_kind"), "a list": ([1], "not_an_object"), "null": (None, "not_an_object"),
}


@pytest.mark.parametrize("row, code", LEFT.values(), ids=LEFT)
def test_left_alone(row, code):
    done = mend(row)
    assert done.row is None and done.error.code == code and not done.changed and done.before is row


def roles(row): return [m["role"] for m in row["messages"]]


def test_what_the_repairs_write():
    row = mend(REPAIRED["a function_call of 2023"][0]).row
    [made] = row["messages"][1]["tool_calls"]
    assert made["function"] == {"name": "get", "arguments": {"a": ["x"]}} and made["type"] == "function"
    assert row["messages"][2] == {"role": "tool", "name": "get", "content": "3", "tool_call_id": made["id"]}
    assert mend(chat(("assistant", "hi"), ("user", ""), USER, BOT, USER)).row == chat(("user", ""), USER, BOT)
    row = mend(chat(USER, calling(call(id_="x"), call(id_="y")), result("y", "two"), result("x", "one"), BOT)).row
    first, second = (c["id"] for c in row["messages"][1]["tool_calls"])
    assert {m["tool_call_id"]: m["content"] for m in row["messages"][2:4]} == {first: "one", second: "two"}
    row = mend(chat(USER, calling(call(arguments="{'a': None, 'b': (1, 2)}")))).row
    assert row["messages"][1]["tool_calls"][0]["function"]["arguments"] == '{"a": null, "b": [1, 2]}'
    row = mend(chat(("user", "\ud83d\ude00 \udc00"), BOT)).row
    assert row["messages"][0]["content"] == "\U0001f600 \ufffd"
    row = mend(chat(USER, BOT, ("system", "s"), ("user", [{"type": "text", "text": "t"}]), BOT)).row
    assert roles(row) == ["user", "assistant", "user", "assistant"] and row["messages"][2]["content"] == "s\n\nt"


def test_foreign_ids_are_rewritten_as_the_tokeniser_rewrites_them():
    row = chat(USER, calling(call(id_=LONG)), result(LONG), BOT)
    assert mend(row).row is row
    broken = mend(chat(USER, calling(call(id_=LONG), call(id_="1")), result(LONG), result("1"), BOT)).row
    assert broken["messages"][1]["tool_calls"][0]["id"] == parse_row(row, "instruct").messages[1].tool_calls[0].id


def test_the_rules_are_those_of_the_version():
    mid = chat(USER, ("system", "s"), USER, BOT)
    assert not mend(mid, version="v7").changed and mend(mid, version="v3").row == chat(USER, ("user", "s\n\nq"), BOT)
    both = chat(USER, calling(call(), content="So."))
    assert not mend(both, version="v7").changed and mend(both, version="v3").error.code == "content_and_calls"
    done = mend(both, version="v3", only=["content_beside_calls"])
    assert done.row == chat(USER, calling(call())) and done.applied == ["content_beside_calls"]
    turns = chat(USER, ("assistant", "So."), calling(call()))
    assert mend(turns, version="v3", only=["content_beside_calls"]).row == chat(USER, calling(call()))


def test_only_the_named_ones():
    row = chat(("assistant", "hi"), USER, BOT, ("user", "?"))
    assert mend(row, only=["last_turns"]).error.code == "starts_wrong"
    assert mend(row, only=["last_turns", "first_turns"]).row == chat(USER, BOT)
    plain = chat(USER, USER, BOT, tools=[{"function": {"name": "f", "parameters": {"type": "dict"}}}])
    assert mend(plain).row is plain
    done = mend(plain, only=["join_neighbours", "schema_types"])
    assert done.row["messages"] == chat(("user", "q\n\nq"), BOT)["messages"]
    assert done.row["tools"][0]["function"]["parameters"] == {"type": "object"}
    assert not mend(done.row, only=["join_neighbours", "schema_types"]).changed
    dicts = chat(USER, calling(call(arguments={"a": 1})))
    made = mend(dicts, only="arguments_text").row["messages"][1]["tool_calls"][0]
    assert mend(dicts).row is dicts and made["function"]["arguments"] == '{"a": 1}'
    with pytest.raises(ValueError, match="no mend is called 'last'; there are .*last_turns"): mend(row, only=["last"])


def test_a_mend_that_makes_it_worse_is_not_kept():
    row = chat(USER, ("assistant", " "))  # valid, with a warning; without its answer it would be nothing
    assert mend(row).row is row and review(parse_row(row, "instruct"))[0].code == "blank_answer"
    row = chat(USER, BOT, functions="no JSON at all [")
    assert mend(row).row is row


def test_pretrain_rows():
    assert mend({"text": "a\ud800"}, "pretrain").row == {"text": "a\ufffd"}
    assert mend({"text": "a", "content": "a"}, "pretrain").row == {"text": "a"}
    assert mend({"text": ""}, "pretrain").error.code == "empty_text"


def test_every_mend_is_named_and_says_what_it_cures():
    assert all(name == m.name and m.what and set(m.cures) <= {*CODES, *WARNINGS} for name, m in MENDS.items())
    error = mend(chat(USER, BOT, ("user", "?")), only=[]).error
    assert mendable(error) == mendable("ends_wrong") == ["last_turns"] and mendable("not_json") == []
    tried = {name for _, names in REPAIRED.values() for name in names}
    assert set(MENDS) - tried == {"content_beside_calls", "join_neighbours", "schema_types", "arguments_text"}


def test_nothing_of_a_row_runs_in_a_page():
    evil = "<img src=x onerror=alert(1)>\u202e</pre><script>alert(2)</script>\ud800"
    for row in [chat(("user", evil), ("gpt", evil), ("user", evil)), chat((evil, "x"), BOT), {evil: evil}, evil]:
        page = mend(row)._repr_html_()
        assert "<img" not in page and "<script" not in page and page.count("</pre>") <= 1
        page.encode(), str(mend(row)).encode()


@settings(max_examples=400, deadline=None)
@given(values, st.sampled_from(["instruct", "pretrain"]), st.sampled_from([None, "v1", "v3", "v7", "v13"]))
def test_any_value(row, kind, version):
    promised(row, kind, version)


@settings(max_examples=400, deadline=None)
@given(spoiled, st.sampled_from([None, "v1", "v3", "v7", "v13"]), st.sampled_from([CHAT, *OWN]))
def test_any_spoiled_row(spoils, version, row):
    for path, value, how in spoils: row = spoil(row, path, value, how)
    promised(row, "instruct", version)


@settings(max_examples=200, deadline=None)
@given(spoiled, st.lists(st.sampled_from(sorted(MENDS)), unique=True))
def test_any_choice_of_mends(spoils, only):
    row = CHAT
    for path, value, how in spoils: row = spoil(row, path, value, how)
    promised(row, "instruct", "v3", only)


def promised(row, kind, version, only=None):
    before = copy.deepcopy(row)
    done = mend(row, kind, version, only)
    assert same(row, before) and (done.row is None) == (done.error is not None)
    str(done).encode(), done._repr_html_().encode()
    if done.error: return
    parse_row(done.row, kind, version)
    assert not mend(done.row, kind, version, only).changed


def test_spoiled_rows_of_real_files(shared):
    seen = fuzz(1500, 7, OWN + real_rows(10))
    assert seen.total() == 1500 and any(" mended" in outcome for outcome in seen)


def test_spoiled_rows():
    assert fuzz(500, 8, OWN).total() == 500


def test_real_agent_runs_are_mended(shared):
    """tau-bench: 200 runs that end on the user or on a tool."""
    runs = json.loads((shared / "data" / "tau-bench" / "gpt-4o-airline.json").read_text(encoding="utf-8"))
    done = [mend({"messages": run["traj"]}, version="v7") for run in runs]
    assert Counter(tuple(d.applied) for d in done) == {("last_turns",): 151, ("last_turns", "ids"): 49}
    assert not any(d.error for d in done)
    fails = [mend({"messages": run["traj"]}, version="v3").error for run in runs]
    assert {e.code for e in fails if e} == {"content_and_calls"} and sum(e is not None for e in fails) == 61


def lines(path): return path.read_bytes().split(b"\n")


def test_a_file(tmp_path):
    good = '{"messages":  [{"role":"user","content":"\\u00f6\u00df\u2028"},{"role":"assistant","content":"x"}]}'
    good = good.encode()
    rows = [chat(USER, ("bot", "\u00e9")), {"text": "x"}, chat(("assistant", "hi"), USER, BOT, ("user", "?"))]
    raw = [good, *(json.dumps(r).encode() for r in rows), b"{", b"", b"\xff", good]
    (tmp_path / "in.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(raw))
    before = (tmp_path / "in.jsonl").read_bytes()
    done = mend_file(tmp_path / "in.jsonl", tmp_path / "new" / "out.jsonl", progress=False)
    out = lines(done.path)
    assert out[0] == out[3] == good and out[1] == '{"messages": [{"role": "user", "content": "q"}, ' \
        '{"role": "assistant", "content": "\u00e9"}]}'.encode() and out[4:] == [b""]
    assert (done.rows, done.mended, done.num_dropped) == (4, 2, 3)
    assert dict(done.changed) == {"roles": 1, "first_turns": 1, "last_turns": 1}
    assert [(line, code) for line, code, _ in done.dropped] == [(3, "wrong_kind"), (5, "not_json"), (7, "not_json")]
    assert "4 rows, 2 of them mended; 3 dropped" in str(done) and "2 dropped, not_json" in str(done)
    assert "<td>not_json</td>" in done._repr_html_() and "rename roles" in done._repr_html_()
    assert (tmp_path / "in.jsonl").read_bytes() == before
    assert [p.name for p in done.path.parent.iterdir()] == ["out.jsonl"]
    again = mend_file(done.path, tmp_path / "again.jsonl", progress=False)
    assert again.path.read_bytes() == done.path.read_bytes() and not again.changed


def test_a_file_is_never_mended_over_itself_or_another(tmp_path):
    source, other = tmp_path / "in.jsonl", tmp_path / "other.jsonl"
    source.write_text(json.dumps(chat(USER, BOT)) + "\n"), other.write_text("precious")
    (tmp_path / "link.jsonl").symlink_to(source), os.link(source, tmp_path / "hard.jsonl")
    for name in ("in.jsonl", "link.jsonl", "hard.jsonl"):
        with pytest.raises(ValueError, match="another name"):
            mend_file(source, tmp_path / name, progress=False, overwrite=True)
    with pytest.raises(ValueError, match="exists already"): mend_file(source, other, progress=False)
    assert other.read_text() == "precious"
    assert mend_file(source, other, progress=False, overwrite=True).rows == 1 and len(list(read_rows(other))) == 1


def test_a_killed_mending_leaves_nothing(tmp_path, monkeypatch):
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(chat(USER, BOT)) + "\n" for _ in range(5)))
    def stop(*_): raise KeyboardInterrupt
    monkeypatch.setattr("mistral_nb.data.mend.written", stop)
    with pytest.raises(KeyboardInterrupt): mend_file(source, tmp_path / "out.jsonl", progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["in.jsonl"]
