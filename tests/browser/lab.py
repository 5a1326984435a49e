"""A real JupyterLab in a real Chromium, for tests: `with Lab(folder) as lab: nb = lab.open(book); nb.run()`.

The server runs under a small keeper that ends it, kernels and all, once the test process is gone, however it went.
Screenshots are kept in the folder that the variable SCREENSHOTS names, if it is set.
"""

import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat

KEEPER = """
import os, signal, subprocess, sys
server = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, start_new_session=True)
sys.stdin.buffer.read()  # ends with the process that holds the other end
server.terminate()
try: server.wait(8)
except subprocess.TimeoutExpired: os.killpg(server.pid, signal.SIGKILL)
"""
QUIET = {
    "@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": False},
    "@jupyterlab/notebook-extension:tracker": {"windowingMode": "none"},  # every cell is in the page
    "@jupyterlab/docmanager-extension:plugin": {"autosave": False},
}
PROGRAMS = ("chromium", "chromium-browser", "google-chrome")


def chromium() -> str | None:
    """The browser of this machine."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, PROGRAMS)), None)


def missing() -> str:
    """What a browser test needs and this machine lacks, in words; nothing if it has all."""
    from importlib.util import find_spec
    lacks = [name for name in ("playwright", "jupyterlab") if not find_spec(name)]
    if not chromium(): lacks.append("chromium (on Debian: apt-get install chromium fonts-dejavu)")
    return f"browser tests need {' and '.join(lacks)}" if lacks else ""


def until(check: Callable[[], Any], what: str, seconds: float = 30) -> Any:
    """Ask again and again until `check` gives something true."""
    end = time.monotonic() + seconds
    while not (value := check()):
        if time.monotonic() > end: raise TimeoutError(f"{what}: not in {seconds} s")
        time.sleep(0.05)
    return value


class Lab:
    """JupyterLab on a free port of this machine, and a browser."""

    def __init__(self, folder: Path):
        self.folder, self.token, self.work = folder, secrets.token_urlsafe(24), folder / "work"
        self.work.mkdir(parents=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.stack = contextlib.ExitStack()

    def __enter__(self) -> "Lab":
        try: self.start()
        except BaseException: self.stack.close(); raise
        return self

    def __exit__(self, *exc: Any) -> None: self.stack.close()

    def start(self) -> None:
        """Start the server, then the browser."""
        from playwright.sync_api import sync_playwright
        log = self.stack.enter_context(open(self.folder / "lab.log", "wb"))
        command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1",
                   f"--port={self.port}", "--ServerApp.port_retries=0", f"--IdentityProvider.token={self.token}",
                   f"--ServerApp.root_dir={self.work}", "--expose-app-in-browser",
                   f"--LabApp.app_settings_dir={self.settings()}"]
        keeper = subprocess.Popen([sys.executable, "-c", KEEPER, *command], stdin=subprocess.PIPE, stdout=log,
                                  stderr=log, env=self.environment())
        self.stack.callback(keeper.wait)
        self.stack.callback(keeper.stdin.close)
        until(lambda: self.answers(keeper), "JupyterLab answers", 60)
        play = self.stack.enter_context(sync_playwright())
        self.browser = play.chromium.launch(executable_path=chromium(), args=["--no-sandbox", "--disable-gpu"])
        self.stack.callback(self.browser.close)

    def settings(self) -> Path:
        """A folder with settings under which nothing pops up."""
        folder = self.folder / "settings"
        folder.mkdir()
        (folder / "overrides.json").write_text(json.dumps(QUIET))
        return folder

    def environment(self) -> dict[str, str]:
        """Jupyter's folders, all of them ours."""
        names = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR",
                 "JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR")
        return {**os.environ, **{name: str(self.folder / "jupyter" / name.lower()) for name in names},
                "JUPYTER_PLATFORM_DIRS": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[2])}

    def answers(self, keeper: subprocess.Popen) -> bool:
        """Whether the server is there."""
        log = self.folder / "lab.log"
        if keeper.poll() is not None: raise RuntimeError(f"JupyterLab ended: {log.read_text()[-2000:]}")
        try: return bool(urllib.request.urlopen(f"http://127.0.0.1:{self.port}/api?token={self.token}", timeout=5))
        except (urllib.error.URLError, OSError): return False

    def open(self, book: nbformat.NotebookNode, name: str, width: int = 1000, height: int = 1400) -> "Notebook":
        """Open `book` in a page of its own."""
        nbformat.write(book, self.work / f"{name}.ipynb")
        return Notebook(self, name, width, height)


class Notebook:
    """A notebook in a page, and what the page did that it should not."""

    def __init__(self, lab: Lab, name: str, width: int, height: int):
        self.name, self.faults = name, []
        self.page = lab.browser.new_page(viewport={"width": width, "height": height})
        self.watch()
        self.page.goto(f"http://127.0.0.1:{lab.port}/lab/tree/{name}.ipynb?token={lab.token}&reset")
        self.page.wait_for_function(
            "() => window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status == 'idle'",
            timeout=60_000)
        self.command("application:toggle-left-area")

    def watch(self) -> None:
        """Write down script errors, dialogs, and requests for a payload's address."""
        note, page = self.faults.append, self.page
        page.on("pageerror", lambda e: note(f"error: {e}"))
        page.on("console", lambda m: note(f"console: {m.text}") if m.type == "error" else None)
        page.on("dialog", lambda d: (note(f"dialog: {d.message}"), d.dismiss()))
        page.on("request", lambda r: note(f"request: {r.url}") if "payload.invalid" in r.url else None)

    def fired(self) -> list[str]:
        """All that a payload achieved: a script that ran, or one of the faults."""
        ran = self.page.evaluate("() => 'set in: ' + (window.__fired ? 'page' : '')")
        return self.faults + [ran] * (ran != "set in: ")

    def command(self, name: str, **args: Any) -> None:
        """Do what a menu entry of JupyterLab does, and wait until it is done."""
        self.page.evaluate("async ([name, args]) => { await window.jupyterapp.commands.execute(name, args) }",
                           [name, args])

    def run(self) -> None:
        """Run all cells; fail with the first error that a cell shows."""
        self.command("notebook:run-all-cells")
        cells = self.page.evaluate("() => window.jupyterapp.shell.currentWidget.content.model.toJSON().cells")
        errors = [o for cell in cells for o in cell.get("outputs", []) if o["output_type"] == "error"]
        assert not errors, "\n".join(errors[0]["traceback"])

    def output(self, cell: int) -> Any:
        """Where the output of code cell `cell` is shown."""
        return self.page.locator(".jp-CodeCell").nth(cell).locator(".jp-OutputArea-output").first

    def theme(self, dark: bool) -> None:
        """Switch JupyterLab's theme."""
        self.command("apputils:change-theme", theme="JupyterLab Dark" if dark else "JupyterLab Light")
        want = "false" if dark else "true"
        self.page.wait_for_function(f"() => document.body.dataset.jpThemeLight == '{want}'")

    def shot(self, name: str, what: Any = None) -> bytes:
        """A picture of the page, or of `what` in it."""
        image = (what or self.page).screenshot()
        if folder := os.environ.get("SCREENSHOTS"):
            Path(folder).mkdir(parents=True, exist_ok=True)
            (Path(folder) / f"{name}.png").write_bytes(image)
        return image

    def close(self) -> None: self.page.close()
