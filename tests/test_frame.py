"""The house keeps its shape: export is clean, imports go down, the package starts fast and needs no tool of ours."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "mistral_nb"


def exported(notebook: Path) -> str:
    """The module that `notebook` exports, from its `default_exp`."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    found = re.findall(r"^#\|\s*default_exp\s+(\S+)", "\n".join("".join(c["source"]) for c in cells), re.M)
    assert len(found) == 1, f"{notebook.name}: expected one default_exp, found {found}"
    return f"{PACKAGE}.{found[0]}"


def floors() -> dict[str, int]:
    """Number of each module: the number its notebook's name starts with."""
    return {exported(nb): int(nb.name[:2]) for nb in sorted((ROOT / "nbs").glob("*.ipynb"))}


def imported(path: Path) -> set[str]:
    """All package modules that the source in `path` names in an import, wherever it stands."""
    out, parts = set(), path.relative_to(ROOT).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import): out |= {a.name for a in node.names}
        if isinstance(node, ast.ImportFrom):
            above = parts[:-node.level] if node.level else ()
            module = ".".join([*above, *([node.module] if node.module else [])])
            out |= {module, *(f"{module}.{a.name}" for a in node.names)}
    return {m for m in out if m.startswith(PACKAGE)}


def path_of(module: str) -> Path:
    return ROOT / (module.replace(".", "/") + ".py")


def test_names_of_notebooks_say_their_module() -> None:
    for nb in sorted((ROOT / "nbs").glob("*.ipynb")):
        assert re.fullmatch(r"\d\d_[a-z_.]+", nb.stem), nb.name
        assert exported(nb) == f"{PACKAGE}.{nb.stem[3:]}"


def test_a_module_imports_only_from_lower_floors() -> None:
    number = floors()
    wrong = [f"{module} ({n}) imports {other} ({number[other]})" for module, n in number.items()
             for other in imported(path_of(module)) if other in number and number[other] >= n]
    assert not wrong, "\n".join(wrong)


def test_no_module_without_a_notebook() -> None:
    modules = {str(p.relative_to(ROOT).with_suffix("")).replace("/", ".") for p in (ROOT / PACKAGE).rglob("*.py")}
    by_hand = {m for m in modules - set(floors()) if not re.search(r"\.(__init__|_modidx|__main__)$", m)}
    assert not by_hand, f"modules that no notebook exports: {by_hand}"


def test_exporting_changes_nothing(tmp_path: Path) -> None:
    """Export a copy of the checkout and compare it with what is committed."""
    import shutil
    for name in ("nbs", PACKAGE, "settings.ini", "pyproject.toml", "setup.py", "README.md"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    subprocess.run([Path(sys.executable).parent / "nbdev_export"], cwd=tmp_path, check=True, capture_output=True)
    made = {p.relative_to(tmp_path): p.read_bytes() for p in (tmp_path / PACKAGE).rglob("*.py")}
    different = [str(p) for p, text in made.items() if not (ROOT / p).exists() or (ROOT / p).read_bytes() != text]
    assert not different, f"run nbdev_export and commit: {different}"


def test_ruff_finds_nothing() -> None:
    ruff = [sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format", "concise"]
    done = subprocess.run([*ruff, "."], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("module", ["mistral_nb", "mistral_nb.config", "mistral_nb.data.sample"])
def test_imports_without_torch(module: str) -> None:
    code = f"import {module}, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_package_needs_neither_nbdev_nor_fastcore() -> None:
    wanted = re.compile(r"^\s*(from|import) (nbdev|fastcore|execnb)\b", re.M)
    users = [path.name for path in (ROOT / PACKAGE).rglob("*.py") if wanted.search(path.read_text(encoding="utf-8"))]
    assert not users


def test_nothing_asks_for_cuda_but_device() -> None:
    asks = re.compile(r"\.cuda\(|torch\.cuda\.")
    users = {path.name for path in (ROOT / PACKAGE).rglob("*.py") if asks.search(path.read_text(encoding="utf-8"))}
    assert users <= {"device.py"}


def test_metadata_is_read_from_settings() -> None:
    import configparser
    from importlib.metadata import metadata
    ini = configparser.ConfigParser(delimiters=["="])
    ini.read(ROOT / "settings.ini", encoding="utf-8")
    found = metadata(PACKAGE)
    assert found["Version"] == ini["DEFAULT"]["version"] and found["Summary"] == ini["DEFAULT"]["description"]
