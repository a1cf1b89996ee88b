# Two commands do everything on a fresh machine with Python 3.11 or newer: make demo, make test.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint types unit wheel results fuzz clean

# the stamp is older than pyproject.toml whenever the dependencies may have changed
$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "maskpack needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; set PYTHON=")'
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable '.[train,dev]'
	touch $@

demo: $(VENV)/.installed
	$(BIN)/maskpack demo

test: lint types unit wheel

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed
	$(BIN)/mypy

unit: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/pytest

wheel: $(VENV)/.installed
	rm -rf dist && $(BIN)/python -m build --quiet --wheel . && $(BIN)/check-wheel-contents dist

# figures of docs/results.md: about two hours on 2 cores; needs MASKPACK_DATA
results: $(VENV)/.installed
	$(BIN)/python benchmarks/results.py sketch banking77

# spoiled adapter files for two minutes; --seed and --case repeat what it finds
fuzz: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz.fuzz_reader --seconds 120

clean:
	rm -rf dist demo-output .mypy_cache .pytest_cache .ruff_cache .hypothesis
