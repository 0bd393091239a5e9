# make demo: from a fresh clone to a report.   make test: all tests.   make check: what the continuous integration runs.
# make docs: build the pages into docs/_build/html.   make docs-tables: write the generated tables in README and docs.
# make matrix: try every task on every architecture and write docs/reference/matrix.md.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: install demo test quick check lint docs docs-tables matrix

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

docs: install
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html

docs-tables: install
	$(BIN)/python docs/tables.py

check: lint docs test

matrix: install
	$(BIN)/unlabeled matrix out=docs/reference/matrix.md
