"""Edit notebooks as text, and run them: open, close, new, run, check (see CONTRIBUTING.md).

    python scripts/nb.py open  nbs/26_model.lora.ipynb     # -> .pct/26_model.lora.py, a py:percent script
    python scripts/nb.py close nbs/26_model.lora.ipynb     # .pct script -> notebook, export, run, save outputs
    python scripts/nb.py run   nbs/*.ipynb                 # run in a real kernel, save fresh outputs
    python scripts/nb.py check nbs tutorials               # faults that the other tools do not see
"""

import argparse
import json
import os
import re
import subprocess
import sys
import uuid
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
TEXT = ROOT / ".pct"
KERNEL = {"display_name": "python3", "language": "python", "name": "python3"}
SKIP = re.compile(r"^#\|\s*(eval:\s*false|notest)\b", re.M)
WATCH = """
def _watch():
    shell, failed = get_ipython(), []
    def after(result):
        code = shell.user_ns.pop("_exit_code", 0)
        if code: failed.append(f"a shell command ended with {code} in: {result.info.raw_cell[:60]}")
    shell.events.register("post_run_cell", after)
    return failed
_failed = _watch()
"""


def script_of(nb: Path) -> Path:
    """The `.pct` script that `nb` is edited as."""
    return TEXT / f"{nb.stem}.py"


def jupytext(*args: str) -> None:
    subprocess.run([sys.executable, "-m", "jupytext", "--quiet", *args], check=True)


def open_text(nb: Path) -> None:
    """Write `nb` as a py:percent script."""
    TEXT.mkdir(exist_ok=True)
    jupytext("--to", "py:percent", str(nb), "-o", str(script_of(nb)))
    print(f"edit {script_of(nb).relative_to(ROOT)}, then close {nb.name}")


def close_text(nb: Path) -> None:
    """Bring the script back into `nb` (ids and outputs kept), export it, run it."""
    update = ["--update"] if nb.exists() else []
    jupytext("--to", "ipynb", *update, str(script_of(nb)), "-o", str(nb))
    tidy(nb)
    export(nb)
    run(nb)


def tidy(nb: Path) -> None:
    """Give `nb` a kernelspec, unique ids and cells without blank edges."""
    book, seen = nbformat.read(nb, 4), set()
    book.metadata = nbformat.from_dict({"kernelspec": KERNEL})
    book.nbformat_minor = 5
    for cell in book.cells:
        cell.source = cell.source.strip("\n")
        if cell.get("id") in seen or "id" not in cell: cell.id = uuid.uuid4().hex[:8]
        seen.add(cell.id)
    book.cells = [c for c in book.cells if c.source]
    write(book, nb)


PATHS = [(re.compile(re.escape(str(ROOT)) + r"(/\.venv/lib/python[\d.]+/site-packages)?"), "…"),
         (re.compile(r"/tmp/ipykernel_\d+/\d+\.py"), "<cell>"), (re.compile(r"/tmp/tmp[a-z0-9_]+"), "/tmp/…")]


def without_paths(out: nbformat.NotebookNode) -> None:
    """Leave out of an output where this machine keeps things."""
    texts = [(out, "text")] if "text" in out else [(out.data, k) for k in out.get("data", {}) if k.startswith("text/")]
    for owner, key in texts:
        for path, short in PATHS: owner[key] = path.sub(short, owner[key])


def write(book: nbformat.NotebookNode, nb: Path) -> None:
    """Save as nbdev_clean would: no counts, no run-time metadata, sorted keys."""
    for cell in book.cells:
        cell.metadata = {"tags": cell.metadata["tags"]} if cell.metadata.get("tags") else {}
        if cell.cell_type != "code": continue
        cell.execution_count = None
        for out in cell.outputs:
            without_paths(out)
            if "execution_count" in out: out.execution_count = None
            if "metadata" in out: out.metadata = {}
    text = nbformat.writes(book, 4)
    tmp = nb.with_suffix(".tmp")
    tmp.write_text(json.dumps(json.loads(text), indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(tmp, nb)


def export(nb: Path) -> None:
    """Export one notebook of `nbs/` to its module."""
    if nb.parent.resolve() != ROOT / "nbs": return
    from nbdev.config import get_config
    from nbdev.export import add_init, nb_export
    nb_export(nb.resolve())
    add_init(get_config().lib_path)


def execute(nb: Path, timeout: int = 600) -> nbformat.NotebookNode:
    """Run `nb` from the top in a fresh kernel; raise on any error, also on those a notebook hides."""
    book = nbformat.read(nb, 4)
    run_cells = [c for c in book.cells if c.cell_type != "code" or not SKIP.search(c.source)]
    job = nbformat.v4.new_notebook(metadata=dict(book.metadata))
    job.cells = [nbformat.v4.new_code_cell(WATCH), *run_cells, nbformat.v4.new_code_cell("assert not _failed, _failed")]
    env = {**os.environ, "IN_TEST": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    where = {"metadata": {"path": str(nb.parent)}}
    client = NotebookClient(job, timeout=timeout, kernel_name="python3", resources=where)
    client.execute(env=env)
    for why in hidden_errors(job): raise RuntimeError(f"{nb.name}: {why}")
    return book


def hidden_errors(book: nbformat.NotebookNode) -> list[str]:
    """Errors that do not stop a notebook: in threads, in widget callbacks, under `with Output()`."""
    outs = [(c, o) for c in book.cells if c.cell_type == "code" for o in c.outputs]
    found = [o.text for _, o in outs if o.output_type == "stream" and "Exception in thread" in o.text]
    found += [f"{o.ename}: {o.evalue}" for c, o in outs
              if o.output_type == "error" and "raises-exception" not in c.metadata.get("tags", [])]
    widgets = book.metadata.get("widgets", {}).get("application/vnd.jupyter.widget-state+json", {}).get("state", {})
    found += [f"{o['ename']}: {o['evalue']}" for w in widgets.values() for o in w["state"].get("outputs", [])
              if o["output_type"] == "error"]
    return found


def run(nb: Path) -> None:
    """Run `nb` and save its fresh outputs."""
    write(execute(nb), nb)
    print(f"ran {nb.name}")


def faults(nb: Path) -> list[str]:
    """What is wrong with a notebook's form: ids, kernelspec, hidden directives, magics in exports, conflicts."""
    book, found = json.loads(nb.read_text(encoding="utf-8")), []
    ids = [c.get("id") for c in book["cells"]]
    if None in ids or len(set(ids)) < len(ids): found.append("cell ids missing or repeated")
    if "kernelspec" not in book["metadata"]: found.append("no kernelspec")
    for i, cell in enumerate(book["cells"]):
        text = "".join(cell["source"])
        if re.search(r"^`?(<{7}|>{7}) ", text, re.M): found.append(f"cell {i}: merge conflict")
        if text != text.strip("\n") or not text.strip(): found.append(f"cell {i}: blank edge or empty")
        if cell["cell_type"] != "code": continue
        exported = re.match(r"(#\|.*\n)*#\|\s*export", text)
        if re.search(r"^# %%", text, re.M): found.append(f"cell {i}: a line starts with '# %%'")
        if exported and re.search(r"^\s*[%!]", text, re.M): found.append(f"cell {i}: magic in an exported cell")
        if not exported and re.search(r"^\s*#\|\s*export", text, re.M):
            found.append(f"cell {i}: the export directive is not at the top")
    return found


def check(folder: Path) -> None:
    bad = [f"{nb}: {why}" for nb in sorted(folder.rglob("*.ipynb")) for why in faults(nb)]
    if bad: sys.exit("\n".join(bad))


def find(pattern: str) -> Path:
    """A notebook by path, or by the number its name starts with: `26` -> nbs/26_model.lora.ipynb."""
    if pattern.endswith(".ipynb") or Path(pattern).is_dir(): return Path(pattern).resolve()
    hits = sorted((ROOT / "nbs").glob(f"{pattern}_*.ipynb")) or sorted((ROOT / "tutorials").glob(f"{pattern}_*.ipynb"))
    if len(hits) != 1: sys.exit(f"N={pattern}: expected one notebook nbs/{pattern}_*.ipynb, found {len(hits)}")
    return hits[0]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["open", "close", "run", "check"])
    parser.add_argument("notebooks", nargs="+", help="paths, or numbers such as 26")
    args = parser.parse_args()
    act = {"open": open_text, "close": close_text, "run": run, "check": check}[args.action]
    for name in args.notebooks: act(find(name))
