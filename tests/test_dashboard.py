"""The report's page and its widgets: of bounded size, of hostile data, and saying what went wrong."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import pytest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from payloads import PAYLOADS
from payloads import broken
from payloads import rows
from payloads import strange

from mistral_nb.config import TrainConfig
from mistral_nb.data.report import Report
from mistral_nb.data.report import validate
from mistral_nb.data.tokenize import PACKAGE
from mistral_nb.ui.dashboard import Dashboard
from mistral_nb.ui.dashboard import kinds_of
from mistral_nb.ui.dashboard import report_page
from mistral_nb.ui.tokens import TokenBrowser

V3 = MistralTokenizer.from_file(PACKAGE / "mistral_instruct_tokenizer_240323.model.v3")
HOSTILE = ["<img src=x onerror=window.__fired=1>.jsonl", "' onfocus=window.__fired=1 autofocus='.jsonl"]


def chat(*texts: str) -> dict:
    """A chat whose turns say `texts`."""
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(texts)]}


@pytest.fixture
def report_of(tmp_path: Path) -> Callable[..., Report]:
    """Makes the report on files of rows."""
    def make(files: dict[str, list[Any]], **settings: Any) -> Report:
        for name, values in files.items():
            lines = (v if isinstance(v, str) else json.dumps(v) for v in values)
            (tmp_path / name).write_text("".join(line + "\n" for line in lines))
        paths = ",".join(str(tmp_path / name) for name in files)
        cfg = {"model_id_or_path": str(tmp_path), "run_dir": str(tmp_path / "run"), "seq_len": 64, "max_steps": 10,
               "data.instruct_data": paths}
        return validate(TrainConfig.from_dict(cfg | settings), V3, world=1, workers=1, progress=False)
    return make


def below(widget: widgets.Widget) -> list[widgets.Widget]:
    """A widget and all that are in it."""
    return [widget, *(w for child in getattr(widget, "children", ()) for w in below(child))]


def test_the_page_has_what_a_user_asks(report_of: Callable) -> None:
    good = [chat(f"Question {i}, please?", "Answer " * (i + 1)) for i in range(70)]
    report = report_of({"a.jsonl": [*good, chat("no answer"), "{not json", chat("x", "y", "z")]})
    page = report_page(report)
    assert strange(page) == [] and report._repr_html_() == page
    for words in ("3 errors", "not_json", "ends_wrong", "seq_len 64", "tokens are lost", "max_steps", "3 epochs",
                  "turn", "trained", "packing fill", "&quot;no answer&quot;", "{not json"):
        assert words in page, words
    kinds = kinds_of(report)
    assert {k.code: k.num for k in kinds} == report.counts
    assert [k.level for k in kinds] == sorted((k.level for k in kinds), key="error warning".split().index)


@pytest.mark.parametrize("files", [
    {"a.jsonl": ["{broken"]}, {"a.jsonl": []}, {"a.jsonl": [chat("a", "b")]},
    {"a.jsonl": [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]}]},
], ids=["only broken", "empty", "one row", "nothing trained"])
def test_odd_reports_have_a_page_and_widgets(report_of: Callable, files: dict) -> None:
    report = report_of(files)
    assert strange(report_page(report)) == []
    dashboard = Dashboard(report)
    for view in ("tokens", "row", "mend"): dashboard.problems.view.value = view
    assert not dashboard.problems.status.value
    assert "No errors" in report_page(report) or report.counts


def test_the_page_is_small_whatever_the_data(report_of: Callable) -> None:
    huge = "\"<&'" * 5000
    bad = [row for k in range(4) for row in broken([f"{huge}{k}{i}" for i in range(24)])]
    called = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [
        {"id": "abcdefgh1", "type": "function", "function": {"name": f"{'f' * 60}{i}", "arguments": "{}"}}]},
        {"role": "tool", "tool_call_id": "abcdefgh1", "content": huge}, {"role": "assistant", "content": "b"}]}
        for i in range(60)]
    report = report_of({"a" * 200 + ".jsonl": bad, "b.jsonl": called})
    assert len(report_page(report)) < 300_000
    dashboard = Dashboard(report)
    for view in ("tokens", "row", "mend"):
        dashboard.problems.view.value = view
        assert len(dashboard.problems.body.value) < 600_000


def test_no_payload_becomes_markup(report_of: Callable) -> None:
    report = report_of(dict(zip(HOSTILE, [rows(PAYLOADS), broken(PAYLOADS)])))
    assert strange(report_page(report)) == []
    dashboard = Dashboard(report)
    for view in ("tokens", "row", "mend"):
        dashboard.problems.view.value = view
        for number in range(1, dashboard.problems.pager.num + 1, 5):
            dashboard.problems.pager.go(number)
            assert strange(dashboard.problems.body.value) == [], number
            assert not dashboard.problems.status.value
    dashboard.mending.mend()
    assert strange(dashboard.mending.body.value) == []
    dashboard.mending.correct()
    assert strange(dashboard.mending.body.value) == []
    for payload in PAYLOADS[:20]:
        dashboard.problems.words.value = payload
        assert strange(dashboard.problems.body.value) == []


def test_no_trait_that_is_shown_as_html_carries_data(report_of: Callable) -> None:
    """Version 7.7 shows descriptions as HTML; the text of options it does not."""
    marked = [f"<a>marked {i}</a>" for i in range(12)]
    report = report_of({"<a>marked.jsonl": broken(marked) + rows(marked[:3])})
    dashboard = Dashboard(report)
    browser = TokenBrowser([*rows(marked), *broken(marked)], V3)
    for number in (1, 2, 13): browser.pager.go(number)
    dashboard.mending.mend()
    found = below(dashboard.widget) + below(browser.widget)
    assert len(found) > 40
    for widget in found:
        for name in widget.keys:
            value = getattr(widget, name, None)
            if name in ("children", "_options_labels"): continue
            if isinstance(widget, widgets.HTML) and name == "value": assert strange(value) == []
            elif isinstance(value, (str, list, tuple, dict)): assert "marked" not in str(value), (widget, name)
    for widget in found: json.dumps(widget.get_state(), default=str).encode()


def test_a_failure_is_shown(report_of: Callable) -> None:
    report = report_of({"a.jsonl": [chat("a", "b"), chat("<b>no</b> answer")]})
    dashboard = Dashboard(report)
    mend = next(w for w in below(dashboard.widget) if getattr(w, "description", "") == "Mend into new files")
    mend.click()
    assert "Mended into new files" in dashboard.mending.body.value and dashboard.result.cfg
    mend.click()
    assert "exists already" in dashboard.mending.status.value and not dashboard.mending.body.value
    assert strange(dashboard.mending.status.value) == []
    dashboard.mending.again.value = True
    mend.click()
    assert not dashboard.mending.status.value
    Path(report.problems[0].file).unlink()
    dashboard.problems.view.value = "row"
    assert "Error" in dashboard.problems.status.value


def test_a_report_shows_itself(report_of: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page as an output of its own; then the widgets, with words for where there is no kernel."""
    import IPython.display
    shown = []
    monkeypatch.setattr(IPython.display, "display", lambda data, raw: shown.append(data))
    report = report_of({"a.jsonl": [chat("a", "b"), chat("no answer")]})
    report._ipython_display_()
    assert [set(data) for data in shown] == [{"text/plain", "text/html"}]
    monkeypatch.setattr("mistral_nb.ui.dashboard.in_notebook", lambda: True)
    monkeypatch.delenv("IN_TEST", raising=False)
    report._ipython_display_()
    assert "application/vnd.jupyter.widget-view+json" in shown[2] and "Run this cell" in shown[2]["text/html"]
    assert report.dashboard is report.dashboard and re.search("ends_wrong", shown[1]["text/plain"])
