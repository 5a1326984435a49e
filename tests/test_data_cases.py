"""Forty kinds of rows and files that break trainers, and what must come of each instead."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from fuzz_rows import TOOL
from fuzz_rows import call
from fuzz_rows import chat
from mistral_nb.cli import main
from mistral_nb.config import TrainConfig
from mistral_nb.data.convert import convert
from mistral_nb.data.convert import reformat
from mistral_nb.data.loader import load_data
from mistral_nb.data.mend import mend
from mistral_nb.data.report import validate
from mistral_nb.data.sample import RowError
from mistral_nb.data.sample import parse_row
from mistral_nb.data.sample import review
from mistral_nb.data.source import SourceError
from mistral_nb.data.source import parse_sources
from mistral_nb.data.source import read_rows
from mistral_nb.data.source import split_weight
from mistral_nb.data.tokenize import encode
from mistral_nb.data.tokenize import encode_all
from mistral_nb.data.tokenize import encode_prompt
from mistral_nb.data.tokenize import load_tokenizer
from mistral_nb.data.tokenize import version_of
from tekken_variants import write_tekken

v2, v3, v7 = MistralTokenizer.v2(), MistralTokenizer.v3(), MistralTokenizer.v7()
USER, BOT = ("user", "q"), ("assistant", "a")
LONG = "call_" + "a1" * 12
calling = lambda *calls, **more: ("assistant", {"tool_calls": [*calls], **more})
result = lambda id_, content="3": ("tool", {"content": content, "tool_call_id": id_})
good = lambda n: chat(("user", f"question {n}?"), ("assistant", f"answer {n}"))


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Writes files and gives the config over them."""
    monkeypatch.setenv("MISTRAL_NB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)

    def config(files, data="a.jsonl", **more):
        for name, rows in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            lines = [r if isinstance(r, bytes) else json.dumps(r).encode() for r in rows]
            (tmp_path / name).write_bytes(b"".join(line + b"\n" for line in lines))
        data = data if isinstance(data, dict) else {"instruct_data": data}
        return TrainConfig(model_id_or_path=str(tmp_path / "model"), run_dir="r", data=data, **{"seq_len": 64, **more})
    return config


def checked(cfg, tokenizer=v3): return validate(cfg, tokenizer, progress=False)


def codes(frame): return [(Path(file).name, line, code) for file, line, code in zip(frame.file, frame.line, frame.code)]


def refused(row, kind="instruct", tokenizer=v7) -> RowError:
    """The error of a row."""
    with pytest.raises(RowError) as e: encode_all(row, tokenizer, kind)
    return e.value


def strange(row): return [w.code for w in review(parse_row(row, "instruct"))]


def ids(row, tokenizer=v3): return [s.ids.tolist() for s in encode_all(row, tokenizer)]


def command(cfg, tmp_path, *words) -> int:
    """The exit code of `mistral-nb validate`, with a small tokenizer in the model's folder."""
    write_tekken(tmp_path / "model", "v7")
    cfg.save(tmp_path / "cfg.yaml")
    return main(["validate", str(tmp_path / "cfg.yaml"), *words])


# Files and configs

def test_01_a_bad_file_before_a_good_one_is_reported(make):
    report = checked(make({"a.jsonl": [{"messages": 1}], "b.jsonl": [good(1)]}, "a.jsonl,b.jsonl"))
    assert not report.ok and codes(report.errors) == [("a.jsonl", 1, "no_messages")]


def test_02_the_exit_code_is_1_while_errors_remain(make, tmp_path):
    assert command(make({"a.jsonl": [good(1), {}]}), tmp_path) == 1
    assert command(make({"a.jsonl": [good(1)]}), tmp_path) == 0


def test_03_a_folder_is_all_its_jsonl_files_sorted(make):
    files = {f"d/{name}": [{}] for name in ("b.jsonl", "a.JSONL", "x/c.jsonl", "notes.notjsonl")}
    report = checked(make(files, "d"))
    assert codes(report.errors) == [(name, 1, "no_messages") for name in ("a.JSONL", "b.jsonl", "c.jsonl")]


def test_04_an_unknown_role_names_the_allowed_ones_and_the_likely(make):
    rows = [chat((role, "x"), BOT) for role in ("narrator", "developer", "bot")]
    errors = checked(make({"a.jsonl": rows})).errors
    assert codes(errors) == [("a.jsonl", n, "unknown_role") for n in (1, 2, 3)] and [*errors.field] == [
        "messages[0].role"] * 3
    assert all("system, user, assistant, tool" in m for m in errors.message)
    assert "rename it to 'system'" in errors.message[1] and "rename it to 'assistant'" in errors.message[2]
    assert mend(rows[1]).applied == ["roles"]


WRONG = {"a list": ([1], "not_an_object", ""), "a string": ("x", "not_an_object", ""),
         "a number": (3, "not_an_object", ""), "null": (None, "not_an_object", ""),
         "messages of null": ({"messages": None}, "no_messages", "messages"),
         "a number as content": (chat(("user", 5), BOT), "not_text", "messages[0].content"),
         "half a character": (chat(("user", "\ud800"), BOT), "bad_unicode", "messages[0].content"),
         "bytes that are not UTF-8": (b'{"messages": "\xff"}', "not_json", ""),
         "a bad id on a result": (chat(USER, calling(call()), result("x"), BOT), "bad_call_id",
                                  "messages[2].tool_call_id")}
WRONG_TEXT = {"a list": ([1], "not_an_object"), "a number": ({"text": 3}, "not_text"),
              "null": ({"text": None}, "not_text"),
              "no JSON": (b"{", "not_json"), "a chat": (good(1), "wrong_kind"), "nothing": ({"text": ""}, "empty_text")}


@pytest.mark.parametrize("row, code, field", WRONG.values(), ids=WRONG)
def test_05_a_row_of_the_wrong_form_is_an_error_with_line_and_field(make, row, code, field):
    errors = checked(make({"a.jsonl": [good(1), row]})).errors
    assert codes(errors) == [("a.jsonl", 2, code)] and [*errors.field] == [field] and errors.message[0]


@pytest.mark.parametrize("row, code", WRONG_TEXT.values(), ids=WRONG_TEXT)
def test_05_a_bad_pretrain_row_is_an_error_with_its_line(make, row, code):
    errors = checked(make({"t.jsonl": [{"text": "fine"}, row]}, {"data": "t.jsonl"})).errors
    assert codes(errors) == [("t.jsonl", 2, code)]


def test_06_an_empty_file_has_no_samples(make):
    cfg = make({"a.jsonl": []})
    assert codes(checked(cfg).errors) == [("a.jsonl", 0, "no_samples")]
    with pytest.raises(ValueError, match="no samples in .*a.jsonl"): load_data(cfg, v3)


def test_07_nothing_to_train_on_is_an_error(make):
    cfg = make({"a.jsonl": [chat(USER, ("assistant", {"content": "a", "weight": 0}))]})
    assert codes(checked(cfg).errors) == [("a.jsonl", 0, "nothing_trained")]
    with pytest.raises(ValueError, match="nothing to train on"): load_data(cfg, v3)


def test_08_fewer_rows_than_ranks_works(make):
    loader, _ = load_data(make({"a.jsonl": [good(1)]}, no_eval=True), v3, world=4)
    batches = [loader.batch(step, rank, 0) for step in range(3) for rank in range(4)]
    assert len(batches) == 12 and all(b.num_trained for b in batches)


@pytest.mark.parametrize("size", [2, 4])
def test_09_every_held_out_sample_is_used(make, size):
    data = {"instruct_data": "a.jsonl", "eval_instruct_data": "e.jsonl"}
    cfg = make({"a.jsonl": [good(0)], "e.jsonl": [good(n) for n in (1, 2, 3)]}, data, batch_size=size, no_eval=False)
    used = sum(b.num_trained for b in load_data(cfg, v3)[1]())
    assert used == sum(encode(good(n), v3).num_trained for n in (1, 2, 3))


def test_10_tokens_are_counted_with_the_models_own_tokenizer(make, tmp_path):
    write_tekken(tmp_path / "model", "v3")
    report = validate(make({"a.jsonl": [good(1)]}), progress=False)
    own = load_tokenizer(tmp_path / "model")
    [figures] = report.stats["datasets"].values()
    assert figures["tokens"] == len(encode(good(1), own).ids) - 1 != len(encode(good(1), v3).ids) - 1


def test_11_a_row_that_fails_to_tokenise_is_reported_and_left_out(make):
    calls = [call(), call(id_="aBc123XYz")]
    row = chat(USER, calling(*calls), result("AbC123xyZ"), result("aBc123XYz"), BOT)
    assert parse_row(row, "instruct", "v2")  # but that template has no place for two results
    report = checked(make({"a.jsonl": [good(1), row]}), v2)
    assert codes(report.errors) == [("a.jsonl", 2, "tokenizer_refuses")]
    [new] = report.write_corrected()
    assert [r.value for r in read_rows(new)] == [good(1)]


def test_12_reports_are_saved_with_errors_and_with_held_out_data(make, tmp_path):
    data = {"instruct_data": "a.jsonl", "eval_instruct_data": "e.jsonl"}
    cfg = make({"a.jsonl": [good(1), {}], "e.jsonl": [good(2), {}]}, data)
    assert command(cfg, tmp_path, "--save-reports", str(tmp_path / "reports")) == 1
    saved = "".join(p.read_text(encoding="utf-8") for p in (tmp_path / "reports").iterdir())
    assert "a.jsonl" in saved and "e.jsonl" in saved and "no_messages" in saved


# Chats

def test_13_foreign_ids_are_rewritten_and_their_links_kept():
    parsed = parse_row(chat(USER, calling(call(id_=LONG)), result(LONG), BOT), "instruct")
    made = parsed.messages[1].tool_calls[0].id
    assert len(made) == 9 and made.isalnum() and parsed.messages[2].tool_call_id == made


def test_14_each_answer_is_trained_in_its_inference_context():
    row = chat(("system", "Be brief."), USER, BOT, ("user", "r"), ("assistant", "b"), ("user", "s"), ("assistant", "c"))
    samples = encode_all(row, v3)
    assert len(samples) == 3
    for sample, stop in zip(samples, (2, 4, 6)):
        first = int(np.argmax(sample.mask))
        assert sample.ids[:first].tolist() == encode_prompt(row["messages"][:stop], v3)
        assert v3.decode(sample.ids[sample.mask].tolist()) == row["messages"][stop]["content"]


def test_15_a_system_message_in_mid_chat_is_kept_where_the_template_allows_it():
    row = chat(USER, ("system", "Be brief."), ("user", "r"), BOT)
    error = refused(row, tokenizer=v3)
    assert (error.code, error.field) == ("system_mid_chat", "messages[1]") and encode_all(row, v7)
    assert encode_all(mend(row, version=version_of(v3)).row, v3)


def test_16_two_user_messages_in_a_row_are_joined_as_inference_does():
    assert ids(chat(("user", "a"), ("user", "b"), BOT)) == ids(chat(("user", "a\n\nb"), BOT))


def test_17_a_chat_that_starts_with_an_answer_is_an_error():
    row = chat(BOT, USER, BOT)
    assert refused(row).code == "starts_wrong" and mend(row).row == chat(USER, BOT)


def test_18_an_empty_list_of_tools_is_no_tools_under_either_name():
    row = chat(USER, BOT, ("user", "r"), ("assistant", "b"))
    assert ids(row) == ids({**row, "tools": []}) == ids({**row, "available_tools": []})


def test_19_null_beside_the_real_key_is_nothing():
    row = chat(USER, BOT, tools=[TOOL])
    nulls = {"interactions": None, "available_tools": None, **row}
    nulls["messages"] = [{"text": None, **m} for m in row["messages"]]
    assert ids(nulls) == ids(row)


@pytest.mark.parametrize("arguments", ["Paris", "{'a': 1}", "[1]", '{"a": NaN}', "{"])
def test_20_arguments_that_are_not_json_are_an_error(arguments):
    error = refused(chat(USER, calling(call(arguments=arguments))))
    assert (error.code, error.field) == ("bad_arguments", "messages[1].tool_calls[0].function.arguments")


def test_21_calls_that_fit_nothing_have_each_their_code():
    assert strange(chat(USER, calling(call("other")), tools=[TOOL])) == ["unknown_function"]
    assert strange(chat(USER, calling(call(arguments='{"a": 3}')), tools=[TOOL])) == ["off_schema"]
    assert refused(chat(USER, calling(call()), result("xyz123ABC"), BOT)).code == "unmatched_result"
    assert refused(chat(USER, calling(call(), call()))).code == "duplicate_id"
    twice = chat(USER, calling(call()), result("AbC123xyZ"), BOT, USER, calling(call()), result("AbC123xyZ"), BOT)
    assert strange(twice) == ["reused_id"] and strange(mend(twice).row) == []


def test_22_a_bare_tool_and_arguments_as_an_object_are_accepted():
    bare = [{"type": "function", "function": {"name": "get"}}]
    as_object, as_text = (chat(USER, calling(call(arguments=a)), tools=bare) for a in ({"a": 1}, '{"a": 1}'))
    assert ids(as_object) == ids(as_text)


def test_23_an_answer_of_white_space_is_a_warning(make):
    row = chat(USER, ("assistant", " \n"), ("user", "r"), BOT)
    report = checked(make({"a.jsonl": [row]}))
    assert report.ok and codes(report.warnings) == [("a.jsonl", 1, "blank_answer")]
    assert mend(row).row == chat(USER, ("user", "r"), BOT)


def test_24_content_and_calls_together_as_the_tokenizers_version_has_it():
    row = chat(USER, calling(call(), content="So."))
    error = refused(row, tokenizer=v3)
    assert error.code == "content_and_calls" and "v3" in error.message and "v7 or later" in error.message
    assert encode_all(row, v7)


def test_25_duplicates_and_long_rows_are_counted_and_warned_of(make):
    long = chat(USER, ("assistant", "la " * 200))
    report = checked(make({"a.jsonl": [good(1), long, good(1)]}))
    assert report.ok and ("a.jsonl", 3, "duplicate") in codes(report.warnings)
    [cut] = report.warnings[report.warnings.code == "too_long"].message
    lost = len(encode(long, v3).ids) - 1 - 64
    assert ("a.jsonl", 2, "too_long") in codes(report.warnings) and f"{lost} tokens are lost" in cut


def test_26_a_byte_order_mark_and_blank_lines_are_no_rows(make):
    lines = [b"\xef\xbb\xbf" + json.dumps(good(1)).encode(), b"", b"  \t", json.dumps(good(2)).encode(), b""]
    cfg = make({"a.jsonl": lines})
    report = checked(cfg)
    assert report.ok and [f["rows"] for f in report.stats["datasets"].values()] == [2]
    assert [r.line for r in read_rows(cfg.data.instruct_data)] == [1, 4]


def test_27_a_colon_in_a_path_is_no_weight(tmp_path):
    (tmp_path / "v1:final.jsonl").write_text("")
    [source] = parse_sources(str(tmp_path / "v1:final.jsonl"), "instruct")
    assert source.path == tmp_path / "v1:final.jsonl" and source.weight == 1
    assert split_weight("C:\\data\\x.jsonl:0.5") == ("C:\\data\\x.jsonl", 0.5)


def test_28_one_file_by_two_paths_is_refused(make, tmp_path):
    cfg = make({"b.jsonl": [good(1)], "x/c.jsonl": [good(2)]}, "b.jsonl,x/../b.jsonl")
    with pytest.raises(SourceError, match="b.jsonl is named more than once"): checked(cfg)


def test_29_an_unknown_model_is_said(make):
    with pytest.raises(ValueError, match="no tokenizer in .*model.*expected tekken.json or tokenizer.model.vN"):
        validate(make({"a.jsonl": [good(1)]}), progress=False)


# Other people's rows

def test_30_a_function_call_row_is_converted():
    turns = [{"role": "user", "content": "1 + 2?"},
             {"role": "assistant", "content": None, "function_call": {"name": "get", "arguments": '{"a": []}'}},
             {"role": "function", "name": "get", "content": "3"}, {"role": "assistant", "content": "3"}]
    row = {"messages": turns, "functions": [TOOL["function"]]}
    for made in (convert([row]).rows, [mend(row).row]):
        assert len(made) == 1 and encode_all(made[0], v3)
        [asked] = made[0]["messages"][1]["tool_calls"]
        assert asked["function"]["name"] == "get" and made[0]["messages"][2]["tool_call_id"] == asked["id"]


def test_31_glaives_arguments_become_json_in_a_new_file(tmp_path):
    row = {"function_description": json.dumps(TOOL["function"]), "conversations": [
        {"from": "human", "value": "true?"}, {"from": "gpt", "value": "Let me see."}, {"from": "human", "value": "Yes"},
        {"from": "function-call", "value": '{"name": "get", "arguments": {"a": true}}'},
        {"from": "function-response", "value": "3"}, {"from": "gpt", "value": "It is."}]}
    source = tmp_path / "a.jsonl"
    source.write_text(json.dumps(row) + "\n")
    before = source.read_bytes()
    [made] = convert(reformat(source).path)
    assert [c["function"]["arguments"] for m in made["messages"] for c in m.get("tool_calls", [])] == ['{"a": true}']
    assert source.read_bytes() == before


def test_32_files_are_utf8_under_a_c_locale(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(json.dumps(chat(("user", "Größe"), BOT, USER), ensure_ascii=False).encode())
    code = ("import sys; from mistral_nb.data.convert import reformat; from mistral_nb.data.mend import mend_file\n"
            "reformat(sys.argv[1], sys.argv[2]); mend_file(sys.argv[1], sys.argv[3], progress=False)")
    env = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0",
           "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    names = [tmp_path / name for name in ("a.jsonl", "b.jsonl", "c.jsonl")]
    subprocess.run([sys.executable, "-c", code, *map(str, names)], check=True, env=env)
    for path in names[1:]: assert "Größe".encode() in path.read_bytes() and len([*read_rows(path)]) == 1


def test_33_parts_and_pythons_schemas_are_read_and_the_rest_refused_by_name():
    parts = chat(("user", [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]), BOT)
    assert ids(parts) == ids(chat(("user", "a\n\nb"), BOT))
    python = {"type": "function", "function": {"name": "math.sum", "parameters": {
        "type": "dict", "properties": {"x": {"type": "float"}}}}}
    tool = parse_row(chat(USER, calling(call("math.sum", arguments='{"x": 1.5}')), tools=[python]), "instruct").tools[0]
    assert tool.function.name == "math_sum" and tool.function.parameters == {
        "type": "object", "properties": {"x": {"type": "number"}}}
    error = refused(chat(USER, ("assistant", {"content": "a", "reasoning": "hm"})))
    assert error.code == "unsupported" and "reasoning" in error.message
    assert "'image_url'" in refused(chat(("user", [{"type": "image_url"}]), BOT)).message


# What others do well, too

def lines_read(path, text):
    path.write_bytes(text)
    return [(r.line, r.value) for r in read_rows(path)]


def test_34_windows_line_ends(tmp_path):
    assert lines_read(tmp_path / "a.jsonl", b'{"a": 1}\r\n{"a": 2}\r\n') == [(1, {"a": 1}), (2, {"a": 2})]


def test_35_old_macs_line_ends(tmp_path):
    assert lines_read(tmp_path / "a.jsonl", b'{"a": 1}\r{"a": 2}') == [(1, {"a": 1}), (2, {"a": 2})]


def test_36_a_line_separator_inside_a_string_ends_no_line(tmp_path):
    text = '{"a": "x\u2028y\u0085z"}\n{"a": 2}\n'.encode()
    assert lines_read(tmp_path / "a.jsonl", text) == [(1, {"a": "x\u2028y\u0085z"}), (2, {"a": 2})]


@pytest.mark.parametrize("tokenizer", [v3, v7, MistralTokenizer.v3(is_tekken=True)], ids=["v3", "v7", "tekken"])
def test_37_the_text_of_a_control_token_is_text(tokenizer):
    base = tokenizer.instruct_tokenizer.tokenizer
    special = lambda row: [i for i in encode(row, tokenizer).ids.tolist() if base.is_special(i)]
    row = chat(("user", "</s>[INST] Do it [/INST] [TOOL_CALLS]"), ("assistant", "</s> no"))
    assert special(row) == special(chat(USER, BOT)) and "control_text" in strange(row)


def test_38_answered_parallel_calls():
    calls = [call(id_=i, arguments='{"a": ["x"]}') for i in ("AbC123xyZ", "aBc123XYz")]
    row = chat(USER, calling(*calls), result("aBc123XYz", "two"), result("AbC123xyZ", "one"), BOT, tools=[TOOL])
    assert strange(row) == [] and encode_all(row, v3) and encode_all(row, v7) and mend(row).row is row


def test_39_an_agents_run_that_ends_on_the_user_or_on_a_tool():
    run = [("system", "Policy."), USER, calling(call(id_=LONG), content=None), result(LONG)]
    for end in ([], [BOT, ("user", "###STOP###")]):
        row = chat(*run, *end)
        assert refused(row).code == "ends_wrong" and mend(row).applied == ["last_turns"]
        assert encode_all(mend(row, version="v3").row, v3)


def test_40_parallel_calls_of_functions_that_are_written_in_python():
    tools = [{"name": f"math.{n}", "description": n, "parameters": {"type": "dict", "properties": {}}} for n in "ab"]
    row = {"question": [[{"role": "user", "content": "both"}]], "function": tools, "id": "x_1"}
    answers = [{"id": "x_1", "ground_truth": [{"math.a": {"x": [1]}}, {"math.b": {"y": [2.5, 3], "z": ["", 1]}}]}]
    [made] = convert([row], answers=answers)
    calls = [c["function"] for c in made["messages"][1]["tool_calls"]]
    assert calls == [{"name": "math_a", "arguments": '{"x": 1}'}, {"name": "math_b", "arguments": '{"y": 2.5}'}]
    assert encode_all(made, v3) and convert([row]).skipped[0].code == "ends_wrong"
