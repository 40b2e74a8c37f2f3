.PHONY: install quickstart lint test test-all clean
PYTHON ?= python3
BIN := .venv/bin

.venv/.installed: setup.cfg constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt -e '.[test]'
	touch $@

install: .venv/.installed

quickstart: install
	$(BIN)/knnmoe quickstart

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

test: lint
	$(BIN)/pytest -m 'not slow'

test-all: test
	$(BIN)/pytest -m slow

clean:
	rm -rf .venv build dist *.egg-info quickstart-out
