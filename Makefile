# make demo: from a fresh clone to a report.   make test: all tests.   make check: what the continuous integration runs.
# make matrix: try every task on every architecture and write docs/reference/matrix.md.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: install demo test quick check lint golden matrix

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --upgrade -e '.[dev]'
	@touch $@

demo: install
	$(BIN)/unlabeled pretrain recipe=demo out=runs/demo

test: install
	$(BIN)/python -m pytest -n 2

quick: install
	$(BIN)/python -m pytest -n 2 -m 'not slow'

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: lint test

matrix: install
	$(BIN)/unlabeled matrix out=docs/reference/matrix.md
