"""What becomes of rows that people have: errors with a code and a field, mended rows, warnings."""

import copy
import json

import pytest

from mistral_nb.data.sample import CODES
from mistral_nb.data.sample import KindError
from mistral_nb.data.sample import RowError
from mistral_nb.data.sample import Text
from mistral_nb.data.sample import as_row
from mistral_nb.data.sample import parse_row
from mistral_nb.data.sample import review

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
CALL = {"id": "AbC123xyZ", "type": "function", "function": {"name": "get", "arguments": '{"a": 1}'}}
RESULT = {"role": "tool", "content": "1", "tool_call_id": "AbC123xyZ"}
TOOL = {"type": "function", "function": {"name": "get", "description": "It gets.", "parameters": {"type": "object"}}}


def call(**change) -> dict: return {**CALL, **change}
def function(**change) -> dict: return call(function={**CALL["function"], **change})
def asks(*calls, **more) -> dict: return {"role": "assistant", "tool_calls": list(calls), **more}
def chat(*messages, **more) -> dict: return {"messages": list(messages), **more}
def tool(**change) -> dict: return {"type": "function", "function": {**TOOL["function"], **change}}


IN_CALL = "messages[1].tool_calls[0]"
BAD = [  # row, code, field
    *[(value, "not_an_object", "") for value in ([1, 2], "text", 3, 0.5, True, None)],
    *[(row, "no_messages", "messages") for row in ({}, {"messages": None}, {"messages": []}, {"messages": "hello"})],
    ({"interactions": {}}, "no_messages", "interactions"),
    (chat(USER, ANSWER, interactions=[USER, ANSWER]), "two_spellings", ""),
    (chat(USER, {**ANSWER, "text": "a"}), "two_spellings", "messages[1]"),
    (chat(USER, ANSWER, tools=[TOOL], available_tools=[TOOL]), "two_spellings", ""),
    (chat({"role": "system", "content": "s"}, USER, ANSWER, system_prompt="s"), "two_spellings", "system_prompt"),
    ({"text": "x"}, "wrong_kind", "messages"), ({"conversations": []}, "other_format", "conversations"),
    ({"instruction": "x", "output": "y"}, "other_format", "instruction"),
    (chat(USER, {"role": "assistant", "content": None, "function_call": {"name": "f"}}), "other_format",
     "messages[1].function_call"),
    (chat(USER, "hello"), "not_an_object", "messages[1]"),
    (chat(USER, {"content": "x"}), "unknown_role", "messages[1].role"),
    (chat({"role": "developer", "content": "x"}, USER, ANSWER), "unknown_role", "messages[0].role"),
    (chat(USER, {"role": "bot", "content": "x"}), "unknown_role", "messages[1].role"),
    (chat(USER, {"role": ["user"], "content": "x"}), "unknown_role", "messages[1].role"),
    (chat({"role": "user"}, ANSWER), "not_text", "messages[0].content"),
    (chat({"role": "user", "content": 7}, ANSWER), "not_text", "messages[0].content"),
    (chat({"role": "user", "text": {}}, ANSWER), "not_text", "messages[0].text"),
    (chat(USER, {"role": "assistant", "content": "a\ud800"}), "bad_unicode", "messages[1].content"),
    (chat(USER, ANSWER, system_prompt=["s"]), "not_text", "system_prompt"),
    (chat({"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "image_url"}]}, ANSWER), "unsupported",
     "messages[0].content[1]"),
    (chat(USER, {"role": "assistant", "content": [{"type": "reasoning", "text": "x"}]}), "unsupported",
     "messages[1].content[0]"),
    (chat(USER, {**ANSWER, "reasoning_content": "hmm"}), "unsupported", "messages[1].reasoning_content"),
    (chat(USER, {"role": "assistant", "content": ""}), "empty_answer", "messages[1]"),
    (chat(USER, {"role": "assistant", "content": None, "tool_calls": []}), "empty_answer", "messages[1]"),
    (chat(USER, {**ANSWER, "weight": 0.5}), "bad_weight", "messages[1].weight"),
    (chat(USER, {**ANSWER, "weight": "1"}), "bad_weight", "messages[1].weight"),
    (chat(USER, {**ANSWER, "weight": 0}, ANSWER), "mixed_weights", "messages[2].weight"),
    (chat(USER, ANSWER, only_last="yes"), "bad_flag", "only_last"),
    (chat(ANSWER), "starts_wrong", "messages[0]"), (chat(ANSWER, USER, ANSWER), "starts_wrong", "messages[0]"),
    (chat(USER), "ends_wrong", "messages[0]"), (chat(USER, ANSWER, USER), "ends_wrong", "messages[2]"),
    (chat(USER, asks(CALL), RESULT), "ends_wrong", "messages[2]"),
    (chat(USER, ANSWER, {"role": "system", "content": "s"}, USER, ANSWER), "bad_structure", "messages[2]"),
    (chat(USER, ANSWER, tools="none"), "bad_tool", "tools"),
    (chat(USER, ANSWER, tools=["get"]), "not_an_object", "tools[0]"),
    (chat(USER, ANSWER, available_tools=[{"type": "retrieval"}]), "bad_tool", "available_tools[0].type"),
    (chat(USER, ANSWER, tools=[tool(name=None)]), "not_text", "tools[0].function.name"),
    (chat(USER, ANSWER, tools=[tool(name="two words")]), "bad_tool", "tools[0].function"),
    (chat(USER, ANSWER, tools=[TOOL, tool(parameters=[1])]), "not_an_object", "tools[1].function.parameters"),
    (chat(USER, ANSWER, tools=[tool(parameters={"type": "thing"})]), "bad_tool", "tools[0].function"),
    (chat(USER, ANSWER, tools=[tool(parameters={"maximum": float("nan")})]), "bad_tool", "tools"),
    (chat(USER, ANSWER, tools=[tool(description="\udfff")]), "bad_unicode", "tools"),
    (chat(USER, ANSWER, tools=[TOOL, TOOL]), "bad_tool", "tools"),
    (chat({**USER, "tool_calls": [CALL]}, ANSWER), "bad_call", "messages[0].tool_calls"),
    (chat(USER, {"role": "assistant", "tool_calls": "f()"}), "bad_call", "messages[1].tool_calls"),
    (chat(USER, asks(call(type="code"))), "bad_call", IN_CALL + ".type"),
    (chat(USER, asks(call(function=None))), "not_an_object", IN_CALL + ".function"),
    (chat(USER, asks(function(name=None))), "not_text", IN_CALL + ".function.name"),
    (chat(USER, asks(function(name="two words"))), "bad_message", "messages[1]"),
    (chat(USER, asks(call(id="short"))), "bad_call_id", IN_CALL + ".id"),
    (chat(USER, asks(call(id="AbC123xyZQ"))), "bad_call_id", IN_CALL + ".id"),
    (chat(USER, asks(call(id="AbC-23xyZ"))), "bad_call_id", IN_CALL + ".id"),
    (chat(USER, asks(call(id=123456789))), "bad_call_id", IN_CALL + ".id"),
    (chat(USER, asks(call(id=None)), RESULT, ANSWER), "bad_call_id", IN_CALL + ".id"),
    (chat(USER, asks(CALL), {**RESULT, "tool_call_id": "x"}, ANSWER), "bad_call_id", "messages[2].tool_call_id"),
    (chat(USER, asks(CALL), {**RESULT, "tool_call_id": None}, ANSWER), "bad_call_id", "messages[2].tool_call_id"),
    (chat(USER, asks(CALL, CALL), RESULT, RESULT, ANSWER), "duplicate_id", "messages[1].tool_calls"),
    (chat(USER, asks(CALL), RESULT, RESULT, ANSWER), "duplicate_id", "messages[3].tool_call_id"),
    (chat(USER, asks(CALL), {**RESULT, "tool_call_id": "ZZZ999zzz"}, ANSWER), "unmatched_result",
     "messages[2].tool_call_id"),
    (chat(USER, ANSWER, RESULT, ANSWER), "unmatched_result", "messages[2].tool_call_id"),
    (chat(USER, asks(CALL), ANSWER), "unanswered_call", "messages[2]"),
    (chat(USER, asks(CALL), USER, ANSWER), "unanswered_call", "messages[3]"),
] + [(chat(USER, asks(function(arguments=a))), "bad_arguments", IN_CALL + ".function.arguments")
     for a in ("{'a': 1}", "a=1", '{"a": 1', "[1]", "3", '"x"', "null", '{"a": NaN}', '{"a": Infinity}', '{"a": 1e999}',
               '{"a": ' + "9" * 5000 + "}", "[" * 5000)]


@pytest.mark.parametrize("row, code, field", BAD)
def test_bad_rows(row, code, field):
    with pytest.raises(RowError) as error: parse_row(row, "instruct")
    assert (error.value.code, error.value.field) == (code, field)
    assert len(error.value.message) > 20


@pytest.mark.parametrize("row, code, field", [
    ({"text": 7}, "not_text", "text"), ({"text": None}, "not_text", "text"), ({}, "not_text", "text"),
    ({"text": "x", "content": "x"}, "two_spellings", ""), ({"content": ""}, "empty_text", "content"),
    ([], "not_an_object", ""),
    ({"text": "a\ud83d"}, "bad_unicode", "text"), (chat(USER, ANSWER), "wrong_kind", "text"),
    ({"conversations": []}, "other_format", "conversations")])
def test_bad_texts(row, code, field):
    with pytest.raises(RowError) as error: parse_row(row, "pretrain")
    assert (error.value.code, error.value.field) == (code, field)


def test_every_code_is_met_somewhere():
    elsewhere = {"not_json", "too_deep", "no_tools_here", "system_mid_chat", "content_and_calls", "tokenizer_refuses",
                 "empty_text"}
    assert {code for _, code, _ in BAD} | elsewhere == set(CODES)


def test_messages_say_what_was_expected_received_and_the_fix():
    with pytest.raises(RowError) as error: parse_row(chat(USER, {"role": "developer", "content": "x"}), "instruct")
    assert str(error.value) == ("messages[1].role: role must be one of system, user, assistant, tool, received "
                                "'developer'; rename it to 'system'")
    with pytest.raises(RowError, match="v3 template.*remove the content.*v7 or later"):
        parse_row(chat(USER, {**asks(CALL), "content": "I look."}), "instruct", "v3")
    with pytest.raises(RowError, match="v2 template.*put it first"):
        parse_row(chat(USER, {"role": "system", "content": "s"}, ANSWER), "instruct", "v2")
    with pytest.raises(RowError, match="v1 template has no tools"):
        parse_row(chat(USER, ANSWER, tools=[TOOL]), "instruct", "v1")
    with pytest.raises(KindError, match="received 'chat'"):
        parse_row(chat(USER, ANSWER), "chat")


def test_null_beside_the_real_key_is_nothing():
    nothing = dict.fromkeys(["text", "tool_calls", "weight", "function_call", "reasoning_content"])
    row = chat({**USER, "text": None}, {**ANSWER, **nothing},
               interactions=None, tools=None, available_tools=None, system_prompt=None, only_last=None)
    assert as_row(parse_row(row, "instruct")) == chat(USER, ANSWER)
    assert parse_row({"text": None, "content": "x"}, "pretrain") == Text("x")


def test_what_is_mended():
    messy = {"interactions": [
        {"role": "user", "content": [{"type": "text", "text": "q"}]},
        asks({"id": "call_wK2mFbdD5sXr8cPqTnY3hLzA", "function": {"name": "math.add", "arguments": {"a": "é"}}},
             content=""),
        {"role": "tool", "text": "1", "tool_call_id": "call_wK2mFbdD5sXr8cPqTnY3hLzA", "name": "math.add"},
        asks({"function": {"name": "math.add"}})],
        "available_tools": [{"function": {"name": "math.add", "parameters": {"type": "dict", "properties": {
            "a": {"type": "float"}, "type": {"type": "any"}, "b": {"type": "tuple", "items": {"type": "str"}}}}}}]}
    before = copy.deepcopy(messy)
    clean = as_row(parse_row(messy, "instruct", "v3"))
    assert messy == before
    user, asked, result, asked_again = clean["messages"]
    first, last = asked["tool_calls"][0], asked_again["tool_calls"][0]
    assert first["id"] == result["tool_call_id"] == "aL0s4UUgV" and len(last["id"]) == 9
    assert first["function"] == {"name": "math_add", "arguments": '{"a": "é"}'}
    assert last["function"] == {"name": "math_add", "arguments": "{}"}
    assert result["name"] == "math_add" and user["content"] == "q" and "content" not in asked
    schema = {"type": "object", "properties": {"a": {"type": "number"}, "type": {},
                                               "b": {"type": "array", "items": {"type": "string"}}}}
    assert clean["tools"] == [tool(name="math_add", description="", parameters=schema)]
    assert as_row(parse_row(json.loads(json.dumps(clean)), "instruct", "v3")) == clean


def test_only_last_and_tools():
    assert not parse_row(chat(USER, ANSWER), "instruct").only_last
    assert not parse_row(chat(USER, ANSWER, tools=[]), "instruct").only_last
    assert not parse_row(chat(USER, ANSWER, available_tools=[]), "instruct").only_last
    assert parse_row(chat(USER, ANSWER, only_last=True), "instruct").only_last
    assert parse_row(chat(USER, ANSWER, tools=[TOOL], only_last=False), "instruct").only_last


def found(*messages, **more) -> set:
    return {(w.code, w.field) for w in review(parse_row(chat(*messages, **more), "instruct"))}


def test_warnings():
    strict = tool(parameters={"type": "object", "required": ["b"], "properties": {"a": {"type": "integer"}}})
    other = tool(name="other")
    assert found(USER, asks(CALL), RESULT, ANSWER, tools=[TOOL]) == set()
    assert found(USER, asks(CALL), RESULT, ANSWER) == set()
    in_function = IN_CALL + ".function"
    assert found(USER, asks(CALL), tools=[strict], system_prompt="s") == {("off_schema", in_function + ".arguments")}
    assert found(USER, asks(CALL), tools=[other]) == {("unknown_function", in_function + ".name")}
    assert found(USER, asks(CALL), RESULT, ANSWER, USER, asks(CALL)) == {("reused_id", IN_CALL.replace("1", "5"))}
    assert found(USER, {"role": "assistant", "content": " \n"}) == {("blank_answer", "messages[1]")}
    assert found(USER, {**ANSWER, "weight": 0}) == {("nothing_trained", "messages")}
    looped = tool(parameters={"type": "object", "properties": {"a": {"$ref": "#/nowhere"}}})
    assert found(USER, asks(CALL), tools=[looped]) == {("off_schema", in_function + ".arguments")}


def test_real_tool_lists_are_accepted_or_mended(shared):
    with open(shared / "data" / "gorilla-bfcl" / "BFCL_v4_simple_python.json", "rb") as lines:
        functions = [json.loads(line)["function"] for line in lines]
    assert len(functions) > 300
    for some in functions:
        parse_row(chat(USER, ANSWER, tools=[{"type": "function", "function": f} for f in some]), "instruct")


def test_a_text_that_spells_a_control_token():
    from mistral_common.tokens.tokenizers.base import SpecialTokens
    for token in SpecialTokens:
        assert found({**USER, "content": f"so: {token.value}."}, ANSWER) == {("control_text", "messages[0].content")}
        [warning] = review(parse_row({"text": token.value}, "pretrain"))
        assert (warning.code, warning.field) == ("control_text", "text") and token.value in warning.message
    for harmless in ("[INST", "INST]", "[inst]", "<S>", "<b>", "[TOOL]", "a < s > b", "[ INST ]", "["):
        assert found({**USER, "content": harmless}, ANSWER) == set()
    result = {**RESULT, "content": "[TOOL_RESULTS]"}
    assert found(USER, asks(CALL), result, ANSWER) == {("control_text", "messages[2].content")}
    assert found(USER, ANSWER, system_prompt="</s>") == {("control_text", "system_prompt")}
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "[IMG]"}]
    assert found({**USER, "content": parts}, ANSWER) == {("control_text", "messages[0].content")}
