# From a bare clone: `make demo` goes from a folder of images and one mask to a report, on images
# that it draws; `make test` runs every check.
# Both build .venv once; the stamps in it are renewed only when a requirements file changes.

PYTHON ?= python3
DEMO_ARGS ?=
PYTEST_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check
VENV_STAMP := $(VENV)/.created
RUN_STAMP := $(VENV)/.installed
DEV_STAMP := $(VENV)/.installed-dev

.DEFAULT_GOAL := help
.PHONY: help demo test clean

help:
	@echo "make demo    segment synthetic micrographs by one mask, up to the report; DEMO_ARGS adds options"
	@echo "make test    format, lint, types, tests but the slow ones; PYTEST_ARGS adds pytest flags"
	@echo "             all tests: make test PYTEST_ARGS=\"-m ''\""
	@echo "make clean   remove .venv and the caches; run folders stay"
	@echo "PYTHON=python3.12 chooses the interpreter (>= 3.10), used when .venv is built"

demo: $(RUN_STAMP)
	$(BIN)/python segment.py --demo $(DEMO_ARGS)

test: $(DEV_STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n auto --maxprocesses 4 -m "not slow" $(PYTEST_ARGS)

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp is written last, so a step that was interrupted is done again.
$(VENV_STAMP):
	@$(PYTHON) -c '' 2>/dev/null || { echo "'$(PYTHON)' does not run; name a Python >= 3.10:" \
		"make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo "'$(PYTHON)' is $$($(PYTHON) --version 2>&1), but Python >= 3.10 is needed:" \
		"make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@

$(RUN_STAMP): $(VENV_STAMP) requirements.txt
	$(INSTALL) -r requirements.txt
	@touch $@

$(DEV_STAMP): $(RUN_STAMP) requirements-dev.txt
	$(INSTALL) -r requirements-dev.txt
	$(INSTALL) --no-deps "lightly==1.6.*"
	@touch $@
