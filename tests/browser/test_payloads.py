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


def test_the_harness_notices(lab: Lab) -> None:
    """Unescaped payloads are noticed, so that silence elsewhere means something."""
    loud = [next(p for p in PAYLOADS if p.startswith(start)) for start in ("<img src=x on", "<img src='http")]
    book = lab.open(notebook(*(f"from IPython.display import HTML\nHTML({p!r})" for p in loud)), "noticed")
    book.run()
    for sign in ("set in: page", "request: http://payload.invalid"):
        until(lambda sign=sign: any(fault.startswith(sign) for fault in book.fired()), sign, 10)
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
    book = lab.open(notebook(TOKENS, "for row in rows[::2]: display(TokenView(row, tokenizer, seq_len=200, most=300))",
                             "browser = TokenBrowser('tokens.jsonl', tokenizer, seq_len=64); browser"), "tokens")
    book.run()
    browser = book.output(2)
    browser.get_by_text("2 samples").or_(browser.get_by_text("1 sample")).first.wait_for()
    box = browser.locator("input[type=number]")
    for number in range(2, len(whole), 15):
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
from mistral_nb.data.convert import convert
from mistral_nb.data.report import validate
from mistral_nb.data.tokenize import PACKAGE
from mistral_nb.ui import dashboard
from IPython.display import display
tokenizer = MistralTokenizer.from_file(PACKAGE / "mistral_instruct_tokenizer_240323.model.v3")
home = Path("report").resolve()
sources = json.loads((home / "sources.json").read_text())
cfg = TrainConfig.from_dict({"model_id_or_path": str(home), "run_dir": str(home / "run"), "seq_len": 400,
                             "max_steps": 4, "data.instruct_data": ",".join(str(home / s) for s in sources)})
report = validate(cfg, tokenizer, world=1, workers=1, progress=False)
"""
OTHERS = """
for p in report.problems[::9]: display(report.preview(p.file, p.line))
(home / "places.json").write_text(json.dumps([dashboard.place(p) for p in report.dashboard.problems.all]))
display(report.mend(to="elsewhere"), convert(home / sources[0]), convert(home / sources[1]), report.errors)
"""
FILES = ["<img src=x onerror=window.__fired=1>.jsonl", "'onfocus=window.__fired=1 autofocus='.jsonl",
         "<script>window.__fired=1</script>.jsonl"]


def test_report(lab: Lab) -> None:
    """A report on files of payloads, with payloads in their names: the page, and every problem opened."""
    home = lab.work / "report"
    for name, lines in zip(FILES, (rows(PAYLOADS), broken(PAYLOADS), broken(PAYLOADS[::-1])[:12])):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    (home / "sources.json").write_text(json.dumps(FILES))
    book = lab.open(notebook(REPORT, "report", OTHERS), "report")
    book.run()
    page, widgets = book.page, book.page.locator(".jp-CodeCell").nth(1)
    unfold = "open => document.querySelectorAll('.jp-Notebook details').forEach(d => d.open = open)"
    page.evaluate(unfold, True)
    page.screenshot()  # all of it has been drawn once
    page.evaluate(unfold, False)
    number = widgets.locator("input[type=number]")
    number.wait_for()
    places = json.loads((home / "places.json").read_text())
    for view, step in (("tokens", 25), ("row", 25), ("before and after", 1)):
        widgets.get_by_role("button", name=view).click()
        for at in range(1, len(places) + 1, step):
            number.fill(str(at)); number.press("Enter")
            widgets.locator(".widget-html b", has_text=places[at - 1]).first.wait_for()
    widgets.locator("input[type=text]").first.fill("<img"); widgets.locator("input[type=text]").first.press("Enter")
    widgets.get_by_role("button", name="Mend into new files").click()
    widgets.get_by_text("Mended into new files").wait_for(timeout=20_000)
    widgets.get_by_role("button", name="Write .corrected").click()
    widgets.get_by_text("files written").wait_for()
    assert not book.fired()
    book.shot("report-payloads")
    book.command("docmanager:save")
    book.close()
    for name in ("report", "elsewhere"):  # saved and opened again; and as a notebook that someone else made
        saved = nbformat.read(lab.work / "report.ipynb", 4)
        if name == "elsewhere": saved.cells.append(nbformat.v4.new_markdown_cell("changed"))
        again = lab.open(saved, name)
        again.page.get_by_role("heading", name="What is in the data").wait_for()
        again.page.evaluate(unfold, True)
        assert [fault for fault in again.fired() if "widget model not found" not in fault] == []
        again.close()
