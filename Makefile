PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: quickstart test lint

quickstart: $(VENV)/installed
	$(BIN)/arabic-qwen quickstart

test: $(VENV)/installed-test
	$(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Editable, so that the checkout is what runs; repeated only when the requirements change.
$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -e .
	touch $@

$(VENV)/installed-test: pyproject.toml $(VENV)/installed
	$(BIN)/python -m pip install --quiet -e .[test]
	touch $@
