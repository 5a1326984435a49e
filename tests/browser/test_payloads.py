"""Whatever a data set says, none of it runs: every view of ours, in a real JupyterLab, of rows made of payloads."""

import json
import sys
from pathlib import Path

import nbformat
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from lab import Lab
from lab import until
from payloads import PAYLOADS
from payloads import broken
from payloads import rows

pytestmark = pytest.mark.xdist_group("browser")


def notebook(*cells: str) -> nbformat.NotebookNode:
    """A notebook with these code cells."""
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    book.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return book


@pytest.mark.parametrize("start, noticed", [
    ("<script>", "set in: page"), ("<img src=x on", "set in: page"), ("<img src='http", "request: http://payload.inv")])
def test_the_harness_notices(lab: Lab, start: str, noticed: str) -> None:
    """An unescaped payload is noticed, so that silence elsewhere means something."""
    payload = next(p for p in PAYLOADS if p.startswith(start))
    book = lab.open(notebook(f"from IPython.display import HTML\nHTML({payload!r})"), "noticed")
    book.run()
    until(lambda: any(noticed in fault for fault in book.fired()), f"{payload} fires", 10)
    book.close()


TOKENS = """
import json
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from mistral_nb.data.tokenize import PACKAGE
from mistral_nb.ui.tokens import TokenBrowser, TokenView
from IPython.display import display
tokenizer = MistralTokenizer.from_file(PACKAGE / "mistral_instruct_tokenizer_240323.model.v3")
rows = [json.loads(line) for line in open("tokens.jsonl")]
"""


def test_tokens(lab: Lab) -> None:
    """Every payload as tokens, static and in the browser of rows."""
    whole = [t for t in PAYLOADS if t.isprintable() or "\n" in t or "\u202e" in t]
    (lab.work / "tokens.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(whole) + broken(PAYLOADS)))
    book = lab.open(notebook(TOKENS, "for row in rows: display(TokenView(row, tokenizer, seq_len=400))",
                             "browser = TokenBrowser('tokens.jsonl', tokenizer, seq_len=64); browser"), "tokens")
    book.run()
    browser = book.output(2)
    browser.get_by_text("2 samples").or_(browser.get_by_text("1 sample")).first.wait_for()
    box = browser.locator("input[type=number]")
    for number in range(2, len(whole), 7):
        box.fill(str(number)); box.press("Enter")
        browser.get_by_text(f"tokens.jsonl:{number}").wait_for()
    box.fill(str(len(whole) + 1)); box.press("Enter")
    browser.get_by_text("unknown_role").wait_for()
    search = browser.locator("input[type=text]")
    search.fill(PAYLOADS[5]); search.press("Enter")
    browser.get_by_text("of 3").or_(browser.get_by_text("of 2")).first.wait_for()
    assert not book.fired()
    book.shot("tokens", browser)
    book.close()


REPORT = """
import json
from pathlib import Path
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from mistral_nb.config import TrainConfig
from mistral_nb.data.mend import mend
from mistral_nb.data.report import validate
from mistral_nb.data.tokenize import PACKAGE
from mistral_nb.ui import dashboard
from IPython.display import display
tokenizer = MistralTokenizer.from_file(PACKAGE / "mistral_instruct_tokenizer_240323.model.v3")
home = Path("report").resolve()
sources = json.loads((home / "sources.json").read_text())
cfg = TrainConfig.from_dict({"model_id_or_path": str(home), "run_dir": str(home / "run"), "seq_len": 128,
                             "max_steps": 4, "data.instruct_data": ",".join(str(home / s) for s in sources)})
report = validate(cfg, tokenizer, world=1, workers=1, progress=False)
"""
FILES = ["<img src=x onerror=window.__fired=1>.jsonl", "'onfocus=window.__fired=1 autofocus='.jsonl",
         "<script>window.__fired=1</script>.jsonl"]


def test_report(lab: Lab) -> None:
    """A report on files of payloads, with payloads in their names: the page, and every problem opened."""
    home = lab.work / "report"
    for name, lines in zip(FILES, (rows(PAYLOADS), broken(PAYLOADS), broken(PAYLOADS[::-1])[:30])):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    (home / "sources.json").write_text(json.dumps(FILES))
    book = lab.open(notebook(REPORT, "report", "for p in report.problems[::9]: display(report.preview(p.file, p.line))",
                             "report.mend(to=\"elsewhere\")"), "report")
    book.run()
    page, widgets = book.page, book.page.locator(".jp-CodeCell").nth(1)
    page.evaluate("() => document.querySelectorAll('.jp-Notebook details').forEach(d => d.open = true)")
    number = widgets.locator("input[type=number]")
    number.wait_for()
    total = int(number.get_attribute("max") or 0) or 60
    for view in ("tokens", "row", "before and after"):
        widgets.get_by_role("button", name=view).click()
        for at in range(1, total, 5 if view == "tokens" else 3):
            number.fill(str(at)); number.press("Enter")
    widgets.locator("input[type=text]").first.fill("<img"); widgets.locator("input[type=text]").first.press("Enter")
    widgets.get_by_role("button", name="Mend into new files").click()
    book.shot("mending"); widgets.get_by_text("Mended into new files").wait_for(timeout=20_000)
    widgets.get_by_role("button", name="Write .corrected").click()
    widgets.get_by_text("files written").wait_for()
    assert not book.fired()
    book.shot("report-payloads")
    book.close()
