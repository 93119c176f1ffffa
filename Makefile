# make train   make .venv, install the package, train on the built-in scenes
# make bench   the same .venv with the bench extra; benchmarks against the classical loop (about 15 minutes)
# make test    the same .venv with the test extra; ruff and all tests
# make clean   remove .venv, build products and caches; data/ and runs/ stay
#
# PYTHON=python3.12    the Python (3.10 or newer) that makes .venv
# ARGS='flickr8k --epochs 5'    what `make train` hands on

PYTHON ?= python3
ARGS ?=
VENV := .venv
PY := $(VENV)/bin/python

.PHONY: train bench test clean
.NOTPARALLEL:

train: $(VENV)/.package
	$(PY) -m clip_scratch.train $(ARGS)

bench: $(VENV)/.bench
	$(PY) -m benchmarks $(ARGS)

test: $(VENV)/.test
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m pytest -n auto --dist worksteal

# A stamp is written only after pip succeeded. A pip that was killed leaves .unfinished behind, and half-written
# packages with it: the next make starts from an empty .venv (pip has kept the downloads).
define install
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	|| { echo "error: clip_scratch needs Python 3.10 or newer: make PYTHON=/path/to/python3 ..."; exit 2; }
@if [ -e $(VENV)/.unfinished ] || ! $(PY) -m pip --version >/dev/null 2>&1; then \
	$(PYTHON) -m venv --clear $(VENV); \
fi
@echo "installing $(1) into $(VENV) (about 3 minutes and 6 GB the first time) ..."
@touch $(VENV)/.unfinished
@$(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '$(1)'; \
	status=$$?; rm -f $(VENV)/.unfinished; exit $$status
endef

$(VENV)/.package: setup.cfg constraints.txt
	$(call install,.)
	@touch $@

$(VENV)/.test: setup.cfg constraints.txt
	$(call install,.[test])
	@touch $(VENV)/.package $@

$(VENV)/.bench: setup.cfg constraints.txt
	$(call install,.[bench])
	@touch $(VENV)/.package $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find clip_scratch tests -name __pycache__ -prune -exec rm -rf {} +
