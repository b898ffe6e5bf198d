# `make train` and `make test` work in a fresh clone: they need git, make and Python >= 3.10 with venv.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
# Processes that run tests side by side, of about 1.5 GB each.
JOBS ?= 2

VENV_PYTHON := $(VENV)/bin/python
TRAIN_READY := $(VENV)/.ready-train
TEST_READY := $(VENV)/.ready-test
# Lies in the environment while an install runs; found at the start, the last one was interrupted.
INSTALLING := $(VENV)/.installing
PIP_INSTALL := $(VENV_PYTHON) -m pip install -qq --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help train results test test-all lint format clean

help:
	@echo 'make train     train a sparse network; flags in ARGS: make train ARGS="--help"'
	@echo 'make results   train what docs/results.md says, an hour or two, and write it; may be stopped'
	@echo 'make test      the tests, less the slow ones and those that need a GPU'
	@echo 'make test-all  the slow tests too; one file: make test-all ARGS=tests/test_packaging.py'
	@echo 'make lint      ruff and mypy'
	@echo 'make format    let ruff rewrite what it can'
	@echo 'make clean     remove $(VENV) and the caches; runs/ and data/ stay'
	@echo 'All but the last set up $(VENV) the first time, from PYTHON=$(PYTHON).'

train: $(TRAIN_READY)
	@$(VENV_PYTHON) train.py $(ARGS)

results: $(TRAIN_READY)
	@$(VENV_PYTHON) benchmarks/results.py $(ARGS)

test: $(TEST_READY)
	@$(VENV_PYTHON) -m pytest -n $(JOBS) --dist loadfile -m "not gpu and not slow" $(ARGS)

test-all: $(TEST_READY)
	@$(VENV_PYTHON) -m pytest -n $(JOBS) --dist loadfile -m "not gpu" $(ARGS)

lint: $(TEST_READY)
	@$(VENV_PYTHON) -m ruff check .
	@$(VENV_PYTHON) -m ruff format --check .
	@$(VENV_PYTHON) -m mypy dst growth triton_kernels train.py

format: $(TEST_READY)
	@$(VENV_PYTHON) -m ruff check --fix .
	@$(VENV_PYTHON) -m ruff format .

clean:
	@rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Empty, or why $(PYTHON) cannot make an environment. Raised with $(error), which prints one line.
python_version = $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
python_recent = $(shell $(PYTHON) -c 'import sys; print("yes" * (sys.version_info >= (3, 10)))' 2>/dev/null)
python_venv = $(shell $(PYTHON) -m venv --help >/dev/null 2>&1 && $(PYTHON) -c 'import ensurepip' 2>/dev/null && echo yes)
python_problem = $(strip \
  $(if $(python_version),,sparsegrow needs Python 3.10 or newer and '$(PYTHON)' does not run: install python3 and \
    python3-venv$(comma) or name another: make PYTHON=/path/to/python)\
  $(if $(python_version),$(if $(python_recent),,sparsegrow needs Python 3.10 or newer and '$(PYTHON)' is \
    $(python_version): name a newer one: make PYTHON=/path/to/python))\
  $(if $(python_recent),$(if $(python_venv),,'$(PYTHON)' cannot make a virtual environment: install the package \
    python$(python_version)-venv (apt install python$(python_version)-venv))))
comma := ,

venv_works = $(shell [ ! -e $(INSTALLING) ] && $(VENV_PYTHON) -m pip --version >/dev/null 2>&1 && echo yes)
require_python = $(if $(venv_works),,$(if $(python_problem),$(error $(python_problem))))

# $(call install,EXTRAS,STAMPS). The lock lets `make train` and `make test` run side by side: the one
# that waited finds its stamp made. pip does not mend a package it was killed over, so an environment
# whose install was interrupted is made anew; one where pip gave up by itself (no network) is kept.
define install
$(require_python)
@mkdir -p $(VENV); exec 9>$(VENV)/.lock; \
if command -v flock >/dev/null; then flock 9; fi; \
if [ $@ -nt pyproject.toml ]; then exit 0; fi; \
set -e; trap 'exit 130' INT TERM HUP; \
echo "Setting up $(VENV): the first time takes a few minutes and about 6 GB."; \
if [ -e $(INSTALLING) ] || ! $(VENV_PYTHON) -m pip --version >/dev/null 2>&1; then \
  touch $(INSTALLING); \
  find $(VENV) -mindepth 1 -maxdepth 1 ! -name .lock ! -name .installing -exec rm -rf {} +; \
  $(PYTHON) -m venv $(VENV); \
fi; \
rm -f $(TRAIN_READY) $(TEST_READY); \
touch $(INSTALLING); \
$(PIP_INSTALL) --upgrade pip && $(PIP_INSTALL) -e '.[$(1)]' || { \
  status=$$?; [ $$status -ge 128 ] || rm -f $(INSTALLING); exit $$status; }; \
rm -f $(INSTALLING); \
touch $(2)
endef

$(TRAIN_READY): pyproject.toml
	$(call install,cpu$(comma)wandb,$(TRAIN_READY))

# What the tests need includes what training needs.
$(TEST_READY): pyproject.toml
	$(call install,cpu$(comma)dev,$(TEST_READY) $(TRAIN_READY))
