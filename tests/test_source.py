"""Sources and the files behind them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from mistral_nb.data.sample import RowError
from mistral_nb.data.sample import parse_row
from mistral_nb.data.source import Source
from mistral_nb.data.source import SourceError
from mistral_nb.data.source import frame_rows
from mistral_nb.data.source import parse_sources
from mistral_nb.data.source import read_rows
from mistral_nb.data.source import split_weight

CHAT = {"messages": [{"role": "user", "content": "q é 🙂"}, {"role": "assistant", "content": "a"}]}


def lines_file(path: Path, content: bytes = b'{"text": "Hi"}\n') -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("part, path, weight", [
    (r"C:\data\x.jsonl:0.5", r"C:\data\x.jsonl", 0.5), (r"C:\data\x.jsonl", r"C:\data\x.jsonl", 1),
    ("C:/x.jsonl:2", "C:/x.jsonl", 2), ("v1:final.jsonl", "v1:final.jsonl", 1), ("v1:x.jsonl:3", "v1:x.jsonl", 3),
    ("x.jsonl:6.e-1", "x.jsonl", 0.6), ("x.jsonl:.5", "x.jsonl", 0.5), ("x.jsonl:1e-4", "x.jsonl", 1e-4),
    ("x.jsonl: 2", "x.jsonl", 2), (" x.jsonl ", "x.jsonl", 1), ("https://x/y.jsonl", "https://x/y.jsonl", 1),
    ("x.jsonl:", "x.jsonl:", 1), (":3", ":3", 1)])
def test_weights(part, path, weight):
    assert split_weight(part) == (path, weight)


@pytest.mark.parametrize("weight", ["0", "-1", "0.0", "nan", "inf", "-inf", "1e999"])
def test_weights_must_be_above_zero(weight):
    with pytest.raises(SourceError, match="above 0"): split_weight(f"x.jsonl:{weight}")


def test_a_file_with_a_number_behind_a_colon_in_its_name(tmp_path, monkeypatch):
    lines_file(tmp_path / "run:2")
    monkeypatch.chdir(tmp_path)
    assert parse_sources("run:2", "pretrain") == [Source(Path("run:2"), 1.0, "pretrain")]
    assert parse_sources("run:2:3", "pretrain") == [Source(Path("run:2"), 3.0, "pretrain")]


def test_folders_are_searched_sorted_in_any_case_without_hidden_ones(tmp_path):
    for name in ("z/a.JSONL", "b.jsonl", "a.Jsonl", "notes.notjsonl", "x.jsonl.bak", "y.json", "z/.hidden.jsonl",
                 ".ipynb_checkpoints/b-checkpoint.jsonl"): lines_file(tmp_path / ".data" / name)
    (tmp_path / ".data" / "folder.jsonl").mkdir()
    found = parse_sources(f"{tmp_path}/.data:2", "instruct")[0].files()
    assert [p.relative_to(tmp_path / ".data").as_posix() for p in found] == ["a.Jsonl", "b.jsonl", "z/a.JSONL"]


def test_a_source_named_twice_is_refused_in_every_spelling(tmp_path):
    file = lines_file(tmp_path / "b.jsonl")
    (tmp_path / "x").mkdir()
    os.symlink(file, tmp_path / "link.jsonl")
    for other in (file, tmp_path / "x" / ".." / "b.jsonl", tmp_path, tmp_path / "link.jsonl", f"{file}:0.5"):
        with pytest.raises(SourceError, match="more than once"): parse_sources(f"{file},{other}", "instruct")


def test_what_is_missing_or_empty_is_said(tmp_path):
    assert parse_sources("", "instruct") == parse_sources(" , ", "instruct") == []
    for spec, why in (("no.jsonl", "no file or folder .*no.jsonl"), ("", "no .jsonl file in"), ("x:half", "x:half")):
        with pytest.raises(SourceError, match=why): parse_sources(f"{tmp_path}/{spec}", "instruct")
    assert list(read_rows(lines_file(tmp_path / "empty.jsonl", b""))) == []
    assert list(read_rows(lines_file(tmp_path / "blank.jsonl", b"\xef\xbb\xbf\n \r\n\t\r"))) == []


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_lines_end_in_three_ways_and_in_no_other(tmp_path, end):
    texts = ["one", "two\u2028lines", "three\u2029\x0b\x0c\x1c\x85 still"]
    content = end.join(json.dumps({"text": t}, ensure_ascii=False).encode() for t in texts)
    for tail in (b"", end):
        rows = list(read_rows(lines_file(tmp_path / "x.jsonl", content + tail)))
        # of these U+2028, U+2029 and U+0085 may stand in a JSON string as they are, the others are written as escapes
        assert [(r.line, r.value["text"]) for r in rows] == list(enumerate(texts, 1))
        assert [json.loads(r.raw) for r in rows] == [r.value for r in rows]


def test_marks_blank_lines_and_faults_keep_their_line_numbers(tmp_path):
    lines = [b'\xef\xbb\xbf{"text": "1"}', b"", b'\xef\xbb\xbf{"text": "3"}', b"   ", b'{"text": "5',
             b'{"text": "\xe9"}', b'{"text": "\xed\xa0\x80"}', b"[" * 100_000, b'{"n": ' + b"9" * 5000 + b"}", b"null",
             b'{"score": NaN, "text": "11"}', b'{"text": "\\ud83d"}', b"{} {}", b'{"text": "14"} ']
    rows = {r.line: r for r in read_rows(lines_file(tmp_path / "x.jsonl", b"\n".join(lines)))}
    assert list(rows) == [1, 3, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14]
    assert [n for n, r in rows.items() if r.error] == [5, 6, 7, 8, 9, 13]
    assert {r.error.code for r in rows.values() if r.error} == {"not_json"}
    assert "position 10 is not UTF-8" in rows[6].error.message and rows[6].raw == lines[5] + b"\n"
    assert rows[10].value is None and rows[11].value["text"] == "11" and rows[14].value == {"text": "14"}
    assert rows[1].origin == f"{tmp_path / 'x.jsonl'}:1"
    with pytest.raises(RowError) as error: parse_row(rows[12].value, "pretrain")
    assert (error.value.code, error.value.field) == ("bad_unicode", "text")


def test_utf16_is_named(tmp_path):
    for encoding in ("utf-16", "utf-16-be"):
        text = ("\ufeff" if encoding.endswith("be") else "") + '{"text": "Hi"}\n'
        [row] = read_rows(lines_file(tmp_path / "x.jsonl", text.encode(encoding)))
        assert row.error.code == "not_json" and "UTF-16" in row.error.message


def test_a_list_in_a_jsonl_file_is_hinted_at_and_in_a_json_file_read(tmp_path):
    text = json.dumps([CHAT, CHAT], indent=1).encode()
    assert ".json" in next(read_rows(lines_file(tmp_path / "x.jsonl", text))).error.message
    for content in (text, b"\xef\xbb\xbf \n" + text):
        rows = read_rows(lines_file(tmp_path / "x.json", content))
        assert [(r.line, r.value) for r in rows] == [(1, CHAT), (2, CHAT)]
    assert [r.value for r in read_rows(lines_file(tmp_path / "y.json", b'{"text": "1"}\n{"text": "2"}'))] == [
        {"text": "1"}, {"text": "2"}]
    [row] = read_rows(lines_file(tmp_path / "z.json", text[:-4]))
    assert row.error.code == "not_json"


def test_tables_give_the_rows_they_were_made_of(tmp_path):
    schemas = [{"type": "object", "properties": {n: {"type": "string"}}} for n in ("f", "g")]
    tools = [{"type": "function", "function": {"name": "now", "parameters": schema}} for schema in schemas]
    rows = [{**CHAT, "tools": tools[:1]}, {**CHAT, "tools": tools[1:]}, CHAT]
    frame = pd.DataFrame(rows)
    frame.to_parquet(tmp_path / "x.parquet")
    frame.map(lambda v: json.dumps(v) if isinstance(v, list) else v).to_csv(tmp_path / "x.csv", index=False)
    for made in (frame_rows(frame), read_rows(tmp_path / "x.parquet"), read_rows(tmp_path / "x.csv")):
        made = list(made)
        assert [r.value for r in made] == rows and [r.line for r in made] == [1, 2, 3]
        assert [json.loads(r.raw) for r in made] == rows
        for row in made: parse_row(row.value, "instruct")


def test_csv_of_long_texts(tmp_path):
    text = "long, \"quoted\"\nand\u2028broken " * 20_000
    pd.DataFrame({"text": [text, "x"], "empty": [None, "{not json"]}).to_csv(tmp_path / "x.csv", index=False)
    assert [r.value for r in read_rows(tmp_path / "x.csv")] == [{"text": text}, {"text": "x", "empty": "{not json"}]


def test_rows_are_read_as_utf8_under_any_locale(tmp_path):
    file = lines_file(tmp_path / "x.jsonl", '{"text": "é🙂"}'.encode())
    code = f"from mistral_nb.data.source import read_rows; [r] = read_rows({str(file)!r}); print(ascii(r.value))"
    env = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    assert out.strip() == ascii({"text": "é🙂"})


def test_rows_and_sources_import_without_torch_and_quickly():
    for modules, limit in (("mistral_nb.data.sample, mistral_nb.data.source", 2), ("mistral_nb.data.tokenize", 4)):
        code = f"""import sys, time; start = time.process_time(); import {modules}
print(time.process_time() - start, *[m for m in ('torch', 'pyarrow', 'pandas') if m in sys.modules])"""
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        seconds, *heavy = out.split()
        assert float(seconds) < limit and not heavy
