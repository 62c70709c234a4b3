# Everything from one command: `make train` and `make test` set up what they need by themselves.

PYTHON := python3
VENV := .venv
CONFIG := configs/reviews.py
WORKDIR = runs/$(basename $(notdir $(CONFIG)))
ARGS :=

# What a set-up was made for stays so until another is asked for.
ACCELERATOR ?= $(or $(shell cat $(VENV)/accelerator 2>/dev/null),cpu)
ifeq ($(filter cpu cuda13 tpu,$(ACCELERATOR)),)
  $(error ACCELERATOR=$(ACCELERATOR): expected cpu, cuda13 or tpu)
endif
JAX := jax$(if $(filter-out cpu,$(ACCELERATOR)),[$(ACCELERATOR)])

# Never into a Python outside .venv. Constraints hold for builds too: one package (promise, of TFDS)
# comes as source only.
PIP_INSTALL := PIP_REQUIRE_VIRTUALENV=1 \
    PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt \
    $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --use-pep517

# Written when a set-up is complete, so an interrupted one does not count.
READY := $(VENV)/ready-$(ACCELERATOR)

.PHONY: help setup train test test-launch test-fast lint docs exactness gpu-check faults compile-check bench clean

help:  ## this list
	@echo 'make TARGET [CONFIG=configs/reviews.py] [WORKDIR=runs/reviews] [ARGS="--config.seed=1"]'
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-14s %s\n", $$1, $$2 }' Makefile

setup: $(READY)  ## install into .venv [ACCELERATOR=cpu|cuda13|tpu] [PYTHON=python3]
	@echo "$(VENV) is ready for $(ACCELERATOR)"

train: $(READY)  ## train CONFIG in WORKDIR; one that is there goes on
	$(VENV)/bin/python train.py --config="$(CONFIG)" --workdir="$(WORKDIR)" $(ARGS)

test: $(READY)  ## the tests of all promises but those below
	$(VENV)/bin/python -m pytest -m 'not launch' $(ARGS)

test-launch: $(READY)  ## Slurm, TPU VMs, buckets, compilation, on stand-ins; what documents show
	$(VENV)/bin/python -m pytest -m launch $(ARGS)

test-fast: $(READY)  ## the tests that take seconds
	$(VENV)/bin/python -m pytest -m 'not slow and not launch' $(ARGS)

lint: $(READY)  ## format, style and types, as CI wants them
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/shellcheck $(wildcard launch/*.sh launch/*.sbatch) .ci/run

docs: $(READY)  ## docs/config.md, from the fields as configs/ declares them
	$(VENV)/bin/python -m tools.knob_table >docs/config.md

exactness: $(READY)  ## train CONFIG on several layouts and compare the bits
	$(VENV)/bin/python -m tools.exactness --config="$(CONFIG)" $(ARGS)

gpu-check: $(READY)  ## train on the GPUs here, twice and killed, and compare [ACCELERATOR=cuda13]
	$(VENV)/bin/python -m tools.gpu_check $(ARGS)

faults: $(READY)  ## kill runs in every phase, resume and compare (half an hour) [ARGS=--rounds=3]
	$(VENV)/bin/python -m tests.faults $(ARGS)

compile-check: $(READY)  ## compile for TPUs, with none [VENV=.venv-tpu ACCELERATOR=tpu]
	$(VENV)/bin/python -m pytest tests/test_compile_for.py $(ARGS)

bench: $(READY)  ## measure speed and memory; a table and JSON in runs/bench [ARGS="--only data"]
	$(VENV)/bin/python -m benchmarks $(ARGS)

clean:  ## remove .venv and caches, never runs
	rm -rf $(VENV) .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

# A set-up for another accelerator, or one that was interrupted, starts afresh; changed requirements
# are installed over what is there. A .venv that was made by hand is kept and installed into.
$(READY): requirements.txt requirements-dev.txt constraints.txt
	@if { [ -f $(VENV)/accelerator ] && [ ! -f $@ ]; } || ! $(VENV)/bin/python -c \
	    'import pip, sys; sys.exit(sys.prefix == sys.base_prefix)' 2>/dev/null; then \
	  '$(PYTHON)' -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	    echo 'error: $(PYTHON) is no Python >= 3.11; name one, as in PYTHON=python3.12' >&2; exit 1; }; \
	  '$(PYTHON)' -c 'import ensurepip, venv' 2>/dev/null || { \
	    echo 'error: $(PYTHON) lacks venv; Debian and Ubuntu: apt install python3-venv' >&2; exit 1; }; \
	  rm -f $(VENV)/ready-* $(VENV)/pyvenv.cfg && rm -rf $(VENV) && mkdir $(VENV) && \
	  echo $(ACCELERATOR) >$(VENV)/accelerator && '$(PYTHON)' -m venv $(VENV); \
	fi
	@rm -f $(VENV)/ready-* && echo $(ACCELERATOR) >$(VENV)/accelerator
	@echo 'installing into $(VENV) for $(ACCELERATOR): a minute or two'
	@$(PIP_INSTALL) -r requirements-dev.txt '$(JAX)'
	@touch $@
