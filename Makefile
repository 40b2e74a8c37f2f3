.PHONY: install quickstart lint test test-all support-table bench clean
PYTHON ?= python3
BIN := .venv/bin
PYTEST := $(BIN)/pytest --numprocesses auto --dist worksteal

.venv/.installed: setup.cfg setup.py pyproject.toml constraints.txt $(wildcard knnmoe_hf/native/*.?pp)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt -e '.[test,bench]'
	touch $@

install: .venv/.installed

quickstart: install
	$(BIN)/knnmoe quickstart

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

test: lint
	$(PYTEST) -m 'not slow'

test-all: test
	$(PYTEST) -m 'slow and not support_table'

# every cell of docs/support.md, and the page's table
support-table: install
	$(PYTEST) -m '' tests/support/table
	$(BIN)/python -m tests.support.table.page

bench: install
	$(BIN)/python -m benchmarks.effect.run

clean:
	rm -rf .venv build knnmoe_hf/native/*.so dist *.egg-info quickstart-out quickstart-out-report.html
