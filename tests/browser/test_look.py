"""How the report looks in JupyterLab: readable in light and dark, in a narrow column, saved, and sanitised."""

import nbformat
import pytest
from lab import Lab
from lab import Notebook
from test_payloads import notebook

pytestmark = pytest.mark.xdist_group("browser")

DEMO = """
import json
import tempfile
from pathlib import Path
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from mistral_nb.config import TrainConfig
from mistral_nb.data.report import validate
from mistral_nb.data.tokenize import PACKAGE
from mistral_nb.ui import dashboard
home = Path(tempfile.mkdtemp())
chat = lambda *texts: {"messages": [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(texts)]}
words = "hover glide watch fall turn wait hunt rest rise call nest feed over under grass field wind rain".split()
said = lambda i: " ".join(words[(i * k) % 18] for k in range(i % 97 + 5))
rows = [chat(f"Tell me {i}", said(i), "More?", "No.") for i in range(200)]
rows[20:170:30] = [chat("A", "b", "Thanks!")] * 5
rows[190] = {"messages": [{"role": "bird", "content": "$x$ costs $5"}]}
(home / "chats.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
tokenizer = MistralTokenizer.from_file(PACKAGE / "mistral_instruct_tokenizer_240323.model.v3")
cfg = TrainConfig.from_dict({"model_id_or_path": str(home), "run_dir": str(home / "run"), "seq_len": 96,
                             "max_steps": 30, "data.instruct_data": str(home / "chats.jsonl")})
report = validate(cfg, tokenizer, world=1, workers=1, progress=False, tokens_per_second=1000.0)
"""

# The least contrast of text in our pages with what is behind it, by WCAG 2's formula, and what is a white or black box.
CONTRAST = """() => {
  const rgba = c => { const n = c.match(/[\\d.]+/g).map(Number); return [...n.slice(0, 3), n.length > 3 ? n[3] : 1] };
  const behind = e => {
    const stack = []; for (; e; e = e.parentElement) stack.unshift(rgba(getComputedStyle(e).backgroundColor));
    return stack.reduce((under, c) => under.map((u, i) => u * (1 - c[3]) + c[i] * c[3]), [255, 255, 255]) };
  const light = c => c.slice(0, 3).map(v => (v /= 255) <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
                      .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const opacity = e => { let o = 1; for (; e; e = e.parentElement) o *= +getComputedStyle(e).opacity; return o };
  const seen = [...document.querySelectorAll('.mnb *')].filter(e => !e.closest('style') && e.offsetParent &&
    [...e.childNodes].some(n => n.nodeType == 3 && n.data.trim() && n.data.trim() != '■'));
  return Math.min(...seen.map(e => {
    const back = behind(e), o = opacity(e) * rgba(getComputedStyle(e).color)[3];
    const front = rgba(getComputedStyle(e).color).slice(0, 3).map((c, i) => c * o + back[i] * (1 - o));
    const [a, b] = [light(front), light(back)].sort((x, y) => y - x);
    return (a + .05) / (b + .05) })) }"""
WIDER = """() => [...document.querySelectorAll('.mnb')].filter(
  e => e.offsetParent && e.scrollWidth > e.clientWidth + 2).length"""


def check(book: Notebook, name: str) -> None:
    """Text can be read, and nothing sticks out."""
    assert book.page.evaluate(CONTRAST) >= 4, name
    assert book.page.evaluate(WIDER) == 0, name
    book.shot(name)


def test_a_report_reads_everywhere(lab: Lab) -> None:
    tokens = "from mistral_nb.ui.tokens import TokenView\nTokenView(rows[95], tokenizer, seq_len=40)"
    book = lab.open(notebook(DEMO, "report", tokens), "look", height=2600)
    book.run()
    shown = book.page.locator(".jp-CodeCell").nth(1)
    shown.locator("input[type=number]").wait_for()
    shown.get_by_role("button", name="tokens").click()
    shown.get_by_text("these are the tokens of the mended row").wait_for()
    check(book, "report-light")
    shown.get_by_role("button", name="row").click()
    book.page.evaluate("() => document.querySelectorAll('.mnb details').forEach(d => d.open = true)")
    assert "$x$ costs $5" in shown.inner_text()  # and is no formula
    book.theme(dark=True)
    check(book, "report-dark")
    book.page.set_viewport_size({"width": 520, "height": 2600})  # Colab's column, and a zoom of 200 %
    check(book, "report-narrow")
    book.theme(dark=False)
    book.command("docmanager:save")
    book.close()
    saved = nbformat.read(lab.work / "look.ipynb", 4)
    saved.cells.append(nbformat.v4.new_markdown_cell("changed by someone else, so not trusted"))
    book = lab.open(saved, "look-untrusted", height=2600)
    page = book.page.locator(".jp-CodeCell").nth(1)
    page.get_by_role("heading", name="What is in the data").wait_for()
    bars = page.locator("td div[style*='background-color']")
    assert page.locator("style").count() == 0 and bars.count() > 10  # sanitised, and still a picture
    assert max(bars.nth(i).bounding_box()["height"] for i in range(0, bars.count(), 5)) > 20
    book.shot("report-untrusted")
    assert not book.fired()
    book.close()
