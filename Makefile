# make demo    create .venv, install, and run the whole path on the CPU
# make test    the test suite, several files at a time
# make check   style and types
# make chaos   faults without end, and those that take long; what becomes of it (MINUTES=10)
# make fuzz    many damaged inputs for every reader of files (FUZZ=5000 of them)
# PYTHON=python3.12 picks the interpreter; PIP_FLAGS is handed to pip.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
FUZZ ?= 2000
MINUTES ?= 10
INSTALL = $(BIN)/python -m pip --disable-pip-version-check install --progress-bar off $(PIP_FLAGS) --constraint constraints.txt --editable

.PHONY: demo test check fuzz chaos clean

demo: $(VENV)/.installed
	@$(BIN)/octant demo

test: $(VENV)/.installed-dev
	@$(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

check: $(VENV)/.installed-dev
	@$(BIN)/ruff check .
	@$(BIN)/mypy

fuzz: $(VENV)/.installed-dev
	@$(BIN)/python -m pytest -q --timeout 3600 --fuzz $(FUZZ) $$(find tests -name 'test_fuzz*.py')

chaos: $(VENV)/.installed-dev
	@$(BIN)/python -m pytest -q --timeout 1800 --chaos tests/reliability/test_faults.py
	@$(BIN)/python -m tests.kit.chaos --minutes $(MINUTES)

clean:
	@rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Octant needs Python 3.11 or newer; try make PYTHON=python3.12")'
	@$(PYTHON) -m venv $(VENV)

# A constraints file newer than the stamp installs again; pip leaves alone what already fits.
$(VENV)/.installed: pyproject.toml setup.py constraints.txt | $(BIN)/python
	@echo "Installing Octant into $(VENV) (a minute or two) …"
	@$(INSTALL) '.[hf]'
	@touch $@

$(VENV)/.installed-dev: pyproject.toml setup.py constraints.txt | $(BIN)/python
	@echo "Installing Octant and its test tools into $(VENV) (a minute or two) …"
	@$(INSTALL) '.[hf,megatron,data,dev]'
	@touch $(VENV)/.installed $@
