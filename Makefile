# Everything runs in a virtual environment of its own, which `make quickstart` and `make test` set up.
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
PINS := tools/constraints.txt
NEW := $(VENV)-upgrade/bin
LOWEST := $(VENV)-lowest/bin
RUN_ENV := OMP_NUM_THREADS=1 WANDB_SILENT=true

.PHONY: help install upgrade quickstart docs fmt lint types test check lowest

help:  ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

install: $(VENV)/.installed  ## create .venv and install the package with its development tools

# uv is bootstrapped with pip: it installs torch's large wheels several times faster.
$(VENV)/.installed: pyproject.toml $(PINS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(PINS) uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraints $(PINS) --build-constraints $(PINS) \
		--compile-bytecode -e '.[dev]'
	touch $@

upgrade:  ## raise the versions that the tests run on to the newest ones (then: make check)
	$(PYTHON) -m venv --clear $(VENV)-upgrade
	$(NEW)/python -m pip install --quiet --disable-pip-version-check uv
	$(NEW)/uv pip install --quiet --python $(NEW)/python hatchling editables -e '.[dev]'
	echo '# The versions that the tests run on; `make upgrade` writes them.' > $(PINS)
	$(NEW)/uv pip freeze --python $(NEW)/python --exclude-editable --exclude pip >> $(PINS)
	rm -r $(VENV)-upgrade

quickstart: install  ## digits: AT, WCI at three strengths and AWP; a table, a figure and a report page
	$(BIN)/wcitrain sweep recipes/sweeps/digits.yaml

docs: install  ## write the generated parts of the documents
	$(BIN)/python tools/docs.py

fmt: install  ## format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix --quiet .

lint: install  ## check style
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: install  ## check types
	$(BIN)/mypy

test: install  ## run the tests (minutes)
	$(RUN_ENV) $(BIN)/python -m pytest -q -n 2 -m "not slow"

check: install lint types  ## everything that must hold before a change is proposed
	$(RUN_ENV) $(BIN)/python -m pytest -q -n 2

lowest:  ## run the tests on the lowest versions that are supported
	$(PYTHON) -m venv --clear $(VENV)-lowest
	$(LOWEST)/python -m pip install --quiet --disable-pip-version-check --constraint $(PINS) uv
	$(LOWEST)/uv pip install --quiet --python $(LOWEST)/python --resolution lowest-direct \
		-e '.[dev]' 'pyparsing>=3.1,<3.2'
	$(RUN_ENV) $(LOWEST)/python -m pytest -q -n 2 -m "not slow"
