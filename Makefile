# Two commands do everything on a machine with Python 3.11+, git and make:
#   make demo   installs the package and fine-tunes the built-in model
#   make test   installs the test tools too and runs every test
PYTHON ?= python3
VENV   ?= .venv
PY     := $(VENV)/bin/python
# Without an NVIDIA GPU torch is pinned to the release the CPU tests were made with.
PINS   := -c constraints.txt $(shell command -v nvidia-smi >/dev/null 2>&1 || echo -c constraints-cpu.txt)
META   := settings.ini setup.py pyproject.toml constraints.txt constraints-cpu.txt

.PHONY: demo test lint export open close run clean help

help:
	@grep -E '^#   make|^[a-z]+:.*##' Makefile | sed 's/^#   //; s/:.*##/  /'

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit("mistral_nb needs Python 3.11 or newer; this is " + sys.version.split()[0] + ". Try: make PYTHON=python3.12 ...") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip

$(VENV)/.run: $(PY) $(META)
	$(PY) -m pip install --quiet $(PINS) -e .
	@touch $@

$(VENV)/.dev: $(PY) $(META)
	$(PY) -m pip install --quiet $(PINS) -e '.[dev]'
	@touch $@ $(VENV)/.run

demo: $(VENV)/.run ## fine-tune the built-in model on its tool-calling task
	$(VENV)/bin/mistral-nb demo

test: $(VENV)/.dev ## lint, export check, every notebook, every test
	$(PY) -m pytest -n 2 --dist loadgroup

lint: $(VENV)/.dev ## ruff over the package, the notebooks and the tests
	$(VENV)/bin/ruff check mistral_nb nbs tutorials tests scripts benchmarks setup.py

export: $(VENV)/.dev ## notebooks -> package
	$(VENV)/bin/nbdev_export

open: $(VENV)/.dev ## N=26: edit nbs/26_*.ipynb as the script .pct/26_*.py
	$(PY) scripts/nb.py open $(N)

close: $(VENV)/.dev ## N=26: bring the script back, export, run, save outputs
	$(PY) scripts/nb.py close $(N)

run: $(VENV)/.dev ## run every notebook and save fresh outputs
	$(PY) scripts/nb.py run nbs/*.ipynb tutorials/*.ipynb

clean: ## remove what the targets made
	rm -rf $(VENV) .pct build dist *.egg-info
