# Every target makes .venv first when it is missing or older than what it was made from, and costs nothing when not.
#   PYTHON=python3.12   the Python to make it with (3.11 or newer)
#   TORCH="..."         a pip requirement for torch, with options if need be; scripts/install.py says what happens without
# Both are remembered; another value makes .venv anew.

VENV := .venv
MADE_WITH_PYTHON := $(shell cat $(VENV)/.python 2>/dev/null)
MADE_WITH_TORCH := $(shell cat $(VENV)/.torch 2>/dev/null)
PYTHON ?= $(or $(MADE_WITH_PYTHON),python3)
TORCH ?= $(MADE_WITH_TORCH)
JOBS ?= 2
CHROMIUM ?= $(shell command -v chromium || command -v chromium-browser || command -v google-chrome)
export CHROMIUM

RUN := $(VENV)/.installed
DEV := $(VENV)/.installed-dev
PY := $(VENV)/bin/python
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest
# Code that jaxtyping checks cannot be compiled, so the tests that compile have a run of their own.
COMPILES := $(PYTEST) -q --jaxtyping-packages=
LINT := $(VENV)/bin/ruff format --check --quiet --diff . && $(VENV)/bin/ruff check --quiet . && $(VENV)/bin/mypy
SPREAD := -n $(JOBS) --dist worksteal
INSTALL = $(PYTHON) scripts/install.py $(VENV) --python='$(PYTHON)' --torch='$(TORCH)'

ifneq ($(wildcard $(VENV)/.python),)
ifneq ($(PYTHON)|$(TORCH),$(MADE_WITH_PYTHON)|$(MADE_WITH_TORCH))
OTHER_CHOICE := other-choice
endif
endif

.DEFAULT_GOAL := help
.PHONY: help demo test test-all test-browser lint bench docs clean other-choice

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

demo: $(RUN) ## see what looping is, then a model learning it; TEXT=file or folder for your own text
	@$(VENV)/bin/loopwise demo $(if $(TEXT),--text '$(TEXT)')

test: $(DEV) ## lint, types and all tests but the slow ones
	@failed=; \
	{ $(LINT); } || failed="$$failed lint"; \
	$(COMPILES) -m 'compiles and not slow' || failed="$$failed compiling-tests"; \
	$(PYTEST) -q $(SPREAD) || failed="$$failed tests"; \
	if [ "$$failed" ]; then echo "failed:$$failed"; exit 1; fi

test-all: $(DEV) ## the same with the slow tests and a wider search for counterexamples; see tests/test-all.json
	@failed=; \
	{ $(LINT); } || failed="$$failed lint"; \
	$(COMPILES) -m compiles --record=compiles || failed="$$failed compiling-tests"; \
	$(PYTEST) -q $(SPREAD) -m 'not compiles and not browser' --hypothesis-profile=search --record=all || failed="$$failed tests"; \
	if [ "$$failed" ]; then echo "failed:$$failed"; exit 1; fi

test-browser: $(DEV) ## drive the studio in a real Chromium (CHROMIUM=path; without one, it is fetched)
	@$(INSTALL) --extras=dev,train,study,serve,finetune,eval,tensorboard,browser
	@command -v '$(CHROMIUM)' >/dev/null || $(PY) -m playwright install --with-deps chromium
	@$(PYTEST) -q -m browser tests/browser

lint: $(DEV) ## format, style and types
	@$(LINT)

bench: $(DEV) ## run every benchmark, one after the other; leave the machine alone meanwhile
	@for script in $(filter-out benchmarks/_%,$(wildcard benchmarks/*.py)); do echo "== $$script"; $(PY) "$$script" || exit 1; done

docs: $(DEV) ## write docs/commands from the program itself
	@$(PY) -m loopwise.cli.reference docs/commands

clean: ## remove what the tools leave behind; .venv and runs stay
	@rm -rf build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	@find src tests scripts benchmarks examples experiments -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

$(RUN): pyproject.toml constraints.txt Makefile scripts/install.py $(OTHER_CHOICE)
	@command -v '$(PYTHON)' >/dev/null || { echo "error: there is no $(PYTHON) here; type: make PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is $$($(PYTHON) --version 2>&1), and Loopwise needs 3.11 or newer; type: make PYTHON=python3.11" >&2; exit 1; }
	@$(INSTALL) --extras=study
	@touch $@

$(DEV): $(RUN)
	@$(INSTALL) --extras=dev,train,study,serve,finetune,eval,tensorboard
	@touch $@
