# make setup: .venv with everything; make demo: the whole path on a small trained model; make test: the tests.
PYTHON ?= python3
BIN := .venv/bin
NATIVE := $(shell find csrc -name '*.cc' -o -name '*.h')

.PHONY: setup demo test lint format clean

setup: .venv/installed

.venv/installed: pyproject.toml setup.py CMakeLists.txt $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[export,test]'
	touch $@

demo: setup
	$(BIN)/healthgpt-edge demo

test: setup
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(NATIVE)
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(NATIVE)

clean:
	rm -rf .venv build *.egg-info demo-output runtime/*.so
