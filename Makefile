# Every target sets itself up: `make quickstart` and `make test` work on a fresh clone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# A plain `pip install torch` may bring gigabytes of GPU libraries; the pinned one is installed first, by itself.
TORCH := $(shell sed -n 's/^torch==/torch==/p' constraints.txt)
export TOKENIZERS_PARALLELISM = false

.PHONY: help install quickstart test lint bench soak clean

help:
	@echo "make quickstart   web pages -> a small language model you can talk to, on a laptop CPU"
	@echo "make test         lint, types and all tests"
	@echo "make bench        measured ratios against named references"
	@echo "make soak         200 kills, healthy runs under a tight watch: the tests at length"
	@echo "make lint         ruff and mypy alone"

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[test]"
	touch $@

install: $(STAMP)

quickstart: $(STAMP)
	$(BIN)/trivium quickstart

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest

bench: $(STAMP)
	$(BIN)/python -m tests.bench.run

soak: $(STAMP)
	$(BIN)/python -m tests.soak.run

clean:
	rm -rf $(VENV) runs data .pytest_cache .ruff_cache .mypy_cache
