PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# A file of versions to install, as constraints.txt; none: the newest that pyproject.toml allows.
CONSTRAINTS ?=
INSTALL := $(BIN)/python -m pip install --quiet $(if $(CONSTRAINTS),-c $(CONSTRAINTS))
# An environment remembers by which file it was made.
INSTALLED := $(VENV)/installed$(if $(CONSTRAINTS),-by-$(notdir $(CONSTRAINTS)))
# Further arguments of pytest.
ARGS ?=

.PHONY: quickstart check test test-lowest lint audit

quickstart: $(INSTALLED)
	$(BIN)/arabic-qwen quickstart

test: $(INSTALLED)-test
	$(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

# What hangs on the libraries, with the lowest versions of them that pyproject.toml promises, in an environment of its own.
test-lowest:
	$(MAKE) test VENV=.venv-lowest CONSTRAINTS=constraints-lowest.txt ARGS='-m "engine and not slow" $(ARGS)'

# For the inner loop.
check: lint
	$(BIN)/python -m pytest -q tests/text tests/packing tests/methods --ignore tests/methods/test_objectives.py --ignore tests/methods/test_plugins.py $(ARGS)

lint: $(INSTALLED)-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Asks an advisory service, so it needs a network; strict: a package that the service does not know is an error.
audit: $(INSTALLED)
	$(PYTHON) -m venv $(VENV)/audit
	$(VENV)/audit/bin/python -m pip install --quiet pip-audit
	$(BIN)/python -m pip freeze --exclude-editable > $(VENV)/audit/requirements.txt
	$(VENV)/audit/bin/pip-audit --strict --no-deps --disable-pip --requirement $(VENV)/audit/requirements.txt

# Editable, so that the checkout is what runs; repeated only when the requirements change.
$(INSTALLED): pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) -e .
	touch $@

$(INSTALLED)-test: pyproject.toml $(INSTALLED)
	$(INSTALL) -e .[test]
	touch $@
