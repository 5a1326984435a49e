"""Other people's rows, as published and as broken, become rows that encode."""

import json
import os
import subprocess
import sys
import tracemalloc
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from mistral_nb.data.convert import convert
from mistral_nb.data.convert import objects_in
from mistral_nb.data.convert import reformat
from mistral_nb.data.convert import repaired_json
from mistral_nb.data.convert import write_jsonl
from mistral_nb.data.sample import RowError
from mistral_nb.data.sample import parse_row
from mistral_nb.data.sample import review
from mistral_nb.data.tokenize import encode

v3, tekken, v7 = MistralTokenizer.v3(), MistralTokenizer.v3(is_tekken=True), MistralTokenizer.v7()


def failures(result, tokenizer):
    """How many rows do not encode, by code."""
    codes = Counter()
    for row in result:
        try: encode(row, tokenizer, "pretrain" if "text" in row else "instruct")
        except RowError as e: codes[e.code] += 1
    return dict(codes)


REAL = [("llama-factory/glaive_toolcall_en_demo.json", "ShareGPT with tools", 300, {}),
        ("fastchat/dummy_conversation.json", "ShareGPT", 500, {}), ("llama-factory/identity.json", "Alpaca", 91, {}),
        ("llama-factory/v1_sft_demo.jsonl", "OpenAI messages", 500, {}),
        ("llama-factory/c4_demo.jsonl", "plain text", 300, {}), ("llama-factory/wiki_demo.txt", "plain text", 30, {}),
        ("self-instruct/seed_tasks.jsonl", "self-instruct", 175, {}),
        ("tau-bench/gpt-4o-airline.json", "OpenAI messages", 200, {"content_and_calls": 61}),
        ("axolotl/conversation.missingturns.json", "ShareGPT", 1, {})]


@pytest.mark.parametrize("name, shape, rows, fails_v3", REAL, ids=[r[0] for r in REAL])
def test_published_files(shared, name, shape, rows, fails_v3):
    result = convert(shared / "data" / name)
    assert (dict(result.shapes), len(result), result.skipped) == ({shape: rows}, rows, [])
    assert failures(result, v3) == fails_v3 and failures(result, v7) == {}


def test_all_glaive_rows_encode_with_their_calls(shared):
    path = shared / "data" / "llama-factory" / "glaive_toolcall_en_demo.json"
    result, rows = convert(path), json.loads(path.read_text(encoding="utf-8"))
    assert failures(result, tekken) == {}
    for row, old in zip(result, rows):
        calls = [c for m in row["messages"] for c in m.get("tool_calls", [])]
        told = [json.loads(t["value"]) for t in old["conversations"] if t["from"] == "function_call"]
        assert [(c["function"]["name"], json.loads(c["function"]["arguments"])) for c in calls] == \
               [(t["name"], t["arguments"]) for t in told]
        assert [m["tool_call_id"] for m in row["messages"] if m["role"] == "tool"] == [c["id"] for c in calls]
        assert [m["content"] for m in row["messages"] if m["role"] == "user"] == \
               [t["value"].strip() for t in old["conversations"] if t["from"] == "human"]
        assert [t["function"]["name"] for t in row.get("tools", [])] == [t["name"] for t in json.loads(old["tools"])]


def test_bfcl_questions_with_their_answers(shared):
    folder = shared / "data" / "gorilla-bfcl"
    question = folder / "BFCL_v4_simple_python.json"
    result = convert(question, answers=folder / "possible_answer__BFCL_v4_simple_python.json")
    assert dict(result.shapes) == {"BFCL": 400} and len(result) == 400 and failures(result, v3) == {}
    call = result[1]["messages"][-1]["tool_calls"][0]["function"]
    assert call == {"name": "math_factorial", "arguments": '{"number": 5}'}
    assert result[1]["tools"][0]["function"]["parameters"]["type"] == "object"
    alone = convert(question)
    assert len(alone) == 0 and {s.code for s in alone.skipped} == {"ends_wrong"}
    assert "answers=" in alone.skipped[0].reason


CONVERTED = {"dummy_conversation.json": 500, "conversation.missingturns.json": 1, "BFCL_v4_simple_python.json": 400,
             "train.jsonl": 7473, "c4_demo.jsonl": 300, "glaive_toolcall_en_demo.json": 300, "identity.json": 91,
             "v1_sft_demo.jsonl": 500, "wiki_demo.txt": 30, "en_100_tree.jsonl": 555, "seed_tasks.jsonl": 175,
             "train__dialogues_001.json": 128, "gpt-4o-airline.json": 200}
REFUSED = {"train__schema.json": "definitions of services", "possible_answer__BFCL_v4_simple_python.json": "`answers=`"}


def test_every_published_file_is_converted_or_refused_for_a_reason(shared):
    files = [path for path in sorted((shared / "data").rglob("*")) if path.suffix in (".json", ".jsonl", ".txt")]
    assert {path.name for path in files} == {*CONVERTED, *REFUSED}
    answers = next(path for path in files if path.name.startswith("possible"))
    for path in files:
        result = convert(path, answers=answers if path.name.startswith("BFCL") else None)
        assert len(result) == CONVERTED.get(path.name, 0), path.name
        if path.name in CONVERTED: assert not result.skipped and len(result.shapes) == 1
        else: assert all(REFUSED[path.name] in s.reason and s.code == "other_format" for s in result.skipped)


def test_dialogues_have_their_calls(shared):
    path = shared / "data" / "sgd" / "train__dialogues_001.json"
    result, rows = convert(path), json.loads(path.read_text(encoding="utf-8"))
    assert dict(result.shapes) == {"SGD dialogue": 128} and failures(result, v3) == failures(result, v7) == {}
    for row, old in zip(result, rows, strict=True):
        frames = [f for t in old["turns"] for f in t["frames"] if "service_call" in f]
        calls = [c["function"] for m in row["messages"] for c in m.get("tool_calls", [])]
        assert [(c["name"], json.loads(c["arguments"])) for c in calls] == \
               [(f["service_call"]["method"], f["service_call"]["parameters"]) for f in frames]
        assert [json.loads(m["content"]) for m in row["messages"] if m["role"] == "tool"] == \
               [f["service_results"] for f in frames]
        assert [m["content"] for m in row["messages"] if m["role"] != "tool" and "content" in m] == \
               [t["utterance"].strip() for t in old["turns"]]
        assert not [w for w in review(parse_row(row, "instruct")) if w.code in ("unknown_function", "off_schema")]


def test_every_answer_of_a_tree_is_trained_once(shared):
    path = shared / "data" / "open-assistant" / "en_100_tree.jsonl"
    result = convert(path)
    answers, waiting = [], [json.loads(line)["prompt"] for line in path.read_text(encoding="utf-8").splitlines()]
    while waiting:
        node = waiting.pop()
        waiting += node["replies"]
        if node["role"] == "assistant": answers.append(node["text"].strip())
    trained = [m["content"] for row in result for m in row["messages"] if m["role"] == "assistant" and m["weight"]]
    assert sorted(trained) == sorted(answers) and failures(result, v3) == failures(result, v7) == {}


def test_question_and_answer_file(shared):
    result = convert(shared / "data" / "grade-school-math" / "train.jsonl")
    assert dict(result.shapes) == {"question and answer": len(result)} and len(result) == 7473


def only(row, **more):
    """The single row that `row` becomes."""
    result = convert([row], **more)
    assert not result.skipped, result.skipped
    return result[0]


def roles(row): return [m["role"] for m in row["messages"]]


SUM = {"name": "sum", "description": "adds", "parameters": {"type": "object", "properties": {"n": {"type": "array"}}}}
TOOL = {"type": "function", "function": SUM}


def test_ultrachat_with_function_calls():
    row = only({"functions": [SUM], "messages": [
        {"role": "user", "content": "1 + 2?"},
        {"role": "assistant", "content": "", "function_call": {"name": "sum", "arguments": '{"n": [1, 2]}'}},
        {"role": "function", "name": "sum", "content": "3"}, {"role": "assistant", "content": "3"},
        {"role": "assistant", "content": " "}, {"role": "user", "content": "Thanks!"}]})
    assert roles(row) == ["user", "assistant", "tool", "assistant"] and row["tools"] == [TOOL]
    assert row["messages"][2]["tool_call_id"] == row["messages"][1]["tool_calls"][0]["id"]
    assert failures([row], v3) == {}


def test_openai_parallel_calls_are_relinked_by_their_ids():
    sum_of = lambda n: {"name": "sum", "arguments": json.dumps({"n": n})}
    call = lambda id_, n: {"id": id_, "type": "function", "function": sum_of(n)}
    long = "call_" + "a" * 24
    row = only({"tools": [TOOL], "messages": [
        {"role": "user", "content": "both"},
        {"role": "assistant", "content": None, "tool_calls": [call(long, [1]), call("x", [2])]},
        {"role": "tool", "tool_call_id": "x", "content": "two"},
        {"role": "tool", "tool_call_id": long, "content": "one"},
        {"role": "assistant", "content": "done", "refusal": None}]})
    first, second = (c["id"] for c in row["messages"][1]["tool_calls"])
    assert {m["tool_call_id"]: m["content"] for m in row["messages"][2:4]} == {second: "two", first: "one"}
    assert all(len(i) == 9 and i.isalnum() for i in (first, second)) and first != second
    assert failures([row], v3) == failures([row], v7) == {}


def test_one_observation_for_two_calls():
    calls = json.dumps([{"name": "sum", "arguments": {"n": [k]}} for k in (1, 2)])
    row = only({"tools": json.dumps([SUM]), "conversations": [
        {"from": "human", "value": "both"}, {"from": "function_call", "value": calls},
        {"from": "observation", "value": '[{"r": 1}, {"r": 2}]'}, {"from": "gpt", "value": "done"}]})
    assert [m["content"] for m in row["messages"] if m["role"] == "tool"] == ['{"r": 1}', '{"r": 2}']
    assert failures([row], v3) == {}


def test_good_ids_stay_and_rows_of_ours_are_untouched():
    row = {"tools": [TOOL], "only_last": True, "extra": 1, "messages": [
        {"role": "user", "content": " spaced "}, {"role": "assistant", "tool_calls": [
            {"id": "abcDEF123", "type": "function", "function": {"name": "sum", "arguments": "{}"}}]}]}
    result = convert([row])
    assert dict(result.shapes) == {"instruct": 1} and result[0] == row


def test_glaive_with_a_function_description():
    functions = json.dumps(SUM) + "\n\n" + json.dumps({**SUM, "name": "other"})
    row = only({"function_description": functions, "conversations": [
        {"from": "system", "value": "You are helpful.\n"}, {"from": "human", "value": "\n\n1 + 2?\n"},
        {"from": "function-call", "value": '{"name": "sum", "arguments": \'{"n": [1, 2]}\'}'},
        {"from": "function-response", "value": '{"sum": 3}'}, {"from": "gpt", "value": "3 <|endoftext|>"}]})
    assert roles(row) == ["system", "user", "assistant", "tool", "assistant"]
    assert [t["function"]["name"] for t in row["tools"]] == ["sum", "other"]
    assert row["messages"][1]["content"] == "1 + 2?" and row["messages"][-1]["content"] == "3"
    assert json.loads(row["messages"][2]["tool_calls"][0]["function"]["arguments"]) == {"n": [1, 2]}


def test_glaive_as_one_text():
    chat = ["USER: 1 + 2?", 'ASSISTANT: <functioncall> {"name": "sum", "arguments": \'{"n": [1, 2]}\'} <|endoftext|>',
            'FUNCTION RESPONSE: {"sum": 3}', "ASSISTANT: It is 3. <|endoftext|>", "USER: Thanks\n"]
    system = "SYSTEM: You are a helper with access to functions. Use them if required -\n" + json.dumps(SUM, indent=4)
    row = only({"system": system, "chat": "\n\n\n".join(chat)})
    assert roles(row) == ["system", "user", "assistant", "tool", "assistant"]
    assert row["tools"][0]["function"]["name"] == "sum"
    assert row["messages"][0]["content"] == "You are a helper with access to functions. Use them if required"
    assert row["messages"][-1]["content"] == "It is 3."


def test_alpaca_history_and_system():
    row = only({"instruction": "And in blue?", "input": "dark", "output": "navy", "system": "Be brief.",
                "history": [["Red?", "wine"]]})
    assert [m["content"] for m in row["messages"]] == ["Be brief.", "Red?", "wine", "And in blue?\n\ndark", "navy"]


def test_weights_and_content_parts():
    parts = [{"type": "text", "value": "a"}, {"type": "text", "text": "b"}]
    row = only({"messages": [
        {"role": "user", "content": parts, "loss_weight": 0.0},
        {"role": "assistant", "content": "x", "loss_weight": 0.0}, {"role": "user", "content": "c"},
        {"role": "assistant", "content": [{"type": "text", "value": "y"}], "loss_weight": 1.0}]})
    assert row["messages"][0] == {"role": "user", "content": "a\n\nb"}
    assert [m["weight"] for m in row["messages"] if m["role"] == "assistant"] == [0, 1]


def said(*turns, **more):
    """A ShareGPT row that begins with a question."""
    turns = [{"from": t[0], "value": t[1]} if isinstance(t, tuple) else t for t in (("human", "Hi"), *turns)]
    return {"conversations": turns, **more}


PICTURE = [{"type": "image_url", "image_url": "x"}]


@pytest.mark.parametrize("row, code", [
    (3, "not_an_object"), (None, "not_an_object"), ([], "not_an_object"), ({}, "other_format"),
    ({"chosen": "a"}, "other_format"),
    (said(), "no_messages"),
    (said(("gpt", " ")), "no_messages"),
    (said(("narrator", "once")), "unknown_role"),
    (said(5), "not_an_object"),
    (said(("observation", "3"), ("gpt", "x")), "unmatched_result"),
    (said(("function_call", '{"name": ')), "bad_call"),
    (said(("function_call", '{"name": "f", "arguments": "what"}')), "bad_arguments"),
    (said(("gpt", "x"), tools="[{"), "bad_tool"),
    (said(("gpt", "x"), tools='["f"]'), "bad_tool"),
    ({"messages": [{"role": "user", "content": PICTURE}, {"role": "assistant", "content": "x"}]}, "unsupported"),
    (said({"from": "gpt", "value": "y", "loss_weight": 0.5}), "bad_weight"),
    ({"text": ""}, "empty_text"), ({"instruction": "a", "instances": []}, "no_messages"),
    ({"ground_truth": []}, "other_format"),
    ({"parent_id": 1, "text": "a"}, "other_format"),
    ({"turns": [{"speaker": "USER"}]}, "malformed"), ({"prompt": {"replies": [3]}}, "malformed"),
    ({"prompt": {"text": "a", "role": "prompter", "replies": []}}, "no_messages"), ({"data": ["a", ""]}, "no_messages"),
])
def test_hopeless_rows_are_skipped_with_a_reason(row, code):
    result = convert([{"text": "fine"}, row])
    assert [s.line for s in result.skipped] == [2] and result.skipped[0].code == code, result.skipped
    assert len(result) == 1 and code in repr(result)


keys = st.sampled_from("messages conversations role from content value tools function name text tool_calls arguments "
                       "question instruction output instances chat system id "
                       "turns speaker utterance frames service_call "
                       "prompt replies data functions from value".split())
json_like = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
                         lambda x: st.lists(x, max_size=3) | st.dictionaries(keys, x, max_size=4), max_leaves=12)


@settings(max_examples=400, deadline=None)
@given(st.lists(json_like, max_size=4))
def test_nothing_makes_it_stumble(rows):
    result = convert(rows)
    assert failures(result, v7) == {}


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(["human", "gpt", "function_call", "observation", "system"]), max_size=8))
def test_any_order_of_turns_encodes_or_is_skipped(speakers):
    value = {"function_call": '{"name": "sum", "arguments": {"n": []}}'}
    result = convert([{"conversations": [{"from": s, "value": value.get(s, "x")} for s in speakers], "tools": [SUM]}])
    assert len(result) + len(result.skipped) == 1 and failures(result, v7) == {}


@pytest.mark.parametrize("text, value", [
    ('{"a": 1}', {"a": 1}), (' [1] ', [1]), ("{'a': None, 'b': [True]}", {"a": None, "b": [True]}),
    ('{"name": "f", "arguments": \'{"a": "it\'s"}\'}', {"name": "f", "arguments": {"a": "it's"}}),
    ('{"name": "f", "arguments": \'plain\'}', {"name": "f", "arguments": "plain"}),
    ('{"a": "line\nbreak"}', {"a": "line\nbreak"}), ('{"a": [1,], }', {"a": [1]})])
def test_repaired_json(text, value):
    assert repaired_json(text) == value


@pytest.mark.parametrize("text", ["", "{", "__import__('os')", "{'a': open('x')}", "[" * 100_000])
def test_what_cannot_be_repaired_is_not_run(text):
    with pytest.raises(ValueError): repaired_json(text)


def test_objects_in_text():
    assert objects_in('[{"a": 1}, 2, {"b": 2}]') == [{"a": 1}, 2, {"b": 2}] and objects_in("") == []
    assert objects_in('x {"a": {"b": 1}}\n{"c": 2} y') == [{"a": {"b": 1}}, {"c": 2}]


CHATS = [{"conversations": [{"from": "human", "value": f"Größe, {n}?\n«x»"}, {"from": "gpt", "value": f"{n}, →"}]}
         for n in range(5)]


def test_every_kind_of_file_gives_the_same(tmp_path):
    want, table = convert(CHATS).rows, pd.DataFrame(CHATS)
    table.to_csv(tmp_path / "a.csv", index=False), table.to_csv(tmp_path / "a.tsv", index=False, sep="\t")
    table.to_parquet(tmp_path / "a.parquet")
    lines = "\ufeff" + "\r\n".join(json.dumps(c, ensure_ascii=False) for c in CHATS)
    texts = {"a.jsonl": lines, "lines.json": lines, "a.json": json.dumps(CHATS), "b.json": json.dumps({"data": CHATS})}
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    for path in tmp_path.iterdir():
        result = convert(path)
        assert result.rows == want and result.source == path, path.name
    assert convert(table).rows == convert(str(tmp_path / "a.csv")).rows == want


def test_parquet_nulls_are_taken_out(tmp_path):
    """Parquet gives every tool the parameters of all others, as nulls."""
    chat = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    tool = lambda n: {"name": n, "parameters": {"type": "object", "properties": {n: {"type": "string"}}}}
    rows = [{"messages": chat, "tools": [{"type": "function", "function": tool(n)}]} for n in ("a", "b")]
    pd.DataFrame(rows).to_parquet(tmp_path / "t.parquet")
    functions = [row["tools"][0]["function"] for row in convert(tmp_path / "t.parquet")]
    assert [list(f["parameters"]["properties"]) for f in functions] == [["a"], ["b"]]


def test_strings_in_turn_and_chatml():
    row = only({"id": 1, "data": ["Hi", "Hello", "Why?", "So.", "Thanks"]})
    assert [m["content"] for m in row["messages"]] == ["Hi", "Hello", "Why?", "So."]
    text = "<|im_start|>system\nA\n\nB<|im_end|>\n<|im_start|>user\nC<|im_end|>\n<|im_start|>assistant\nD"
    assert only({"text": text}) == only(text)
    assert [(m["role"], m["content"]) for m in only(text)["messages"]] == [
        ("system", "A\n\nB"), ("user", "C"), ("assistant", "D")]
    assert only({"text": f"about {text}"}) == {"text": f"about {text}"}


def test_deleted_replies_and_paths_without_a_new_answer_are_left_out():
    node = lambda role, text, *replies, **more: {"role": role, "text": text, "replies": [*replies], **more}
    first = node("assistant", "A", node("prompter", "B"), node("prompter", "C", node("assistant", "D")))
    tree = node("prompter", "Q", first, node("assistant", "X", deleted=True), node("assistant", "E"))
    told = [[(m["content"], m.get("weight")) for m in row["messages"]] for row in convert([{"prompt": tree}])]
    assert told == [[("Q", None), ("A", 1)], [("Q", None), ("A", 0), ("C", None), ("D", 1)], [("Q", None), ("E", 1)]]


def test_what_is_converted_is_mended_as_the_last_step():
    name = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "a\ud800"}]
    result = convert([{"messages": name}, {"text": "\ud83d\ude00"}])
    assert result[0]["messages"][1]["content"] == "a\ufffd" and result[1] == {"text": "\U0001f600"}
    assert dict(result.mended) == {"characters": 2} and not result.skipped


def test_the_table_runs_nothing_of_the_rows():
    evil = "<img src=x onerror=alert(1)>"
    page = convert([{"conversations": [{"from": evil, "value": evil}]}, {evil: evil}, {"text": "x"}])._repr_html_()
    assert "<img" not in page and "&lt;img" in page and "plain text" in page and "unknown_role" in page


def test_datasets(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="Hugging Face's `datasets` is not installed (an extra)")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    want, made = convert(CHATS).rows, datasets.Dataset.from_list(CHATS)
    assert convert(made).rows == convert(made.to_iterable_dataset()).rows == want
    parts = datasets.DatasetDict({"train": made, "test": made.select([1])})
    with pytest.raises(ValueError, match="'train', 'test'.*split='train'"): convert(parts)
    with pytest.raises(ValueError, match="received 'dev'"): convert(parts, split="dev")
    assert convert(parts, split="test").rows == want[1:2]
    assert convert(datasets.DatasetDict({"train": made})).rows == want
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps(c) + "\n" for c in CHATS), encoding="utf-8")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    assert convert(folder).rows == want
    parts.save_to_disk(tmp_path / "disk"), made.save_to_disk(tmp_path / "one")
    assert convert(tmp_path / "disk", split="test").rows == want[1:2] and convert(tmp_path / "one").rows == want
    assert reformat(folder).path == tmp_path / "set.mistral.jsonl"
    tools = [{"name": n, "parameters": {"type": "object", "properties": {n: {"type": "string"}}}} for n in "ab"]
    chat = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    rows = convert(datasets.Dataset.from_list([{"messages": chat, "tools": [t]} for t in tools]))
    assert [[*row["tools"][0]["function"]["parameters"]["properties"]] for row in rows] == [["a"], ["b"]]


def test_what_is_neither_a_file_nor_a_dataset(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    for name in ("someone/a_dataset", tmp_path):
        with pytest.raises(ValueError, match=r"pip install 'mistral_nb\[datasets\]'"): convert(name)
    with pytest.raises(FileNotFoundError): convert("missing.jsonl")


def test_reformat_writes_beside_and_never_over(tmp_path):
    source = tmp_path / "a.json"
    source.write_text(json.dumps([*CHATS, {"rating": 5}, {"text": "plain"}]), encoding="utf-8")
    before = source.read_bytes()
    done = reformat(source)
    assert done.path == tmp_path / "a.mistral.jsonl" and done.rows == 6 and source.read_bytes() == before
    assert "6 rows made; 5 taken for ShareGPT, 1 taken for plain text" in str(done) and "first at 6" in str(done)
    assert "plain text" in done._repr_html_() and convert(done.path).rows == convert(source).rows
    with pytest.raises(ValueError, match="exists already"): reformat(source)
    with pytest.raises(ValueError, match="another name"): reformat(source, source, overwrite=True)
    assert reformat(source, kind="instruct", overwrite=True).rows == 5
    assert dict(reformat(source, tmp_path / "t.jsonl", kind="pretrain").why) == {"wrong_kind": 5, "other_format": 1}
    with pytest.raises(FileNotFoundError): reformat(tmp_path / "none.jsonl")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "a.mistral.jsonl", "t.jsonl"]


def test_a_large_file_is_never_held_whole(tmp_path):
    source, text = tmp_path / "a.jsonl", "word " * 2000
    with open(source, "w") as f:
        for i in range(3000): f.write(json.dumps({"text": f"{i} {text}"}) + "\n")  # 30 MB
    tracemalloc.start()
    assert reformat(source).rows == 3000
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3e6 and source.stat().st_size > 29e6


def test_texts(tmp_path):
    for text, want in [("one\ntwo\n", ["one", "two"]), ("one\nline\n\n \ntwo\n", ["one\nline", "two"]), ("", [])]:
        (tmp_path / "t.txt").write_text(text, encoding="utf-8")
        assert [r["text"] for r in convert(tmp_path / "t.txt")] == want


def test_bad_lines_keep_their_number(tmp_path):
    first, last = (json.dumps(chat).encode() for chat in CHATS[:2])
    (tmp_path / "a.jsonl").write_bytes(first + b'\n\n{"text": \n{"text": "\xff"}\n' + last)
    result = convert(tmp_path / "a.jsonl")
    assert len(result) == 2 and [(s.line, s.code) for s in result.skipped] == [(3, "not_json"), (4, "not_json")]


def test_an_unknown_ending(tmp_path):
    with pytest.raises(ValueError, match=r"\.xlsx.*Expected \.jsonl"): convert(tmp_path / "a.xlsx")


def test_the_input_is_never_overwritten(tmp_path):
    source = tmp_path / "a.json"
    source.write_text(json.dumps(CHATS), encoding="utf-8")
    (tmp_path / "link.json").symlink_to(source), os.link(source, tmp_path / "hard.json")
    before = source.read_bytes()
    for name in ("a.json", "link.json", "hard.json", "x/../a.json"):
        (tmp_path / "x").mkdir(exist_ok=True)
        with pytest.raises(ValueError, match="another name"): write_jsonl(convert(source), tmp_path / name)
    assert source.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "hard.json", "link.json", "x"]
    out = write_jsonl(convert(source), tmp_path / "new" / "out.jsonl")
    assert convert(out).rows == convert(source).rows and dict(convert(out).shapes) == {"instruct": 5}


def test_a_c_locale(tmp_path):
    source = tmp_path / "größe.jsonl"
    source.write_text("".join(json.dumps(c, ensure_ascii=False) + "\n" for c in CHATS), encoding="utf-8")
    code = "import sys; from mistral_nb.data.convert import *; write_jsonl(convert(sys.argv[1]), sys.argv[2])"
    env = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0",
           "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    subprocess.run([sys.executable, "-c", code, source, tmp_path / "out.jsonl"], check=True, env=env)
    assert "Größe" in (tmp_path / "out.jsonl").read_text(encoding="utf-8")
