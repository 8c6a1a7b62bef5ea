# Every target creates the environment first.
#   make demo   data, training, evaluation and registration on sample images; the results are in demo/
#   make test   lint, types, tests; the fast tests run first
#   make fast   only the tests that take less than a second each
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test fast lint environment clean

demo: $(READY)
	$(BIN)/python jobs/demo.py

# Two processes, each with its own Ray if its tests need one; a file's tests run in one of them.
TWO := -n 2 --dist loadfile --no-loadscope-reorder

test: lint
	$(BIN)/python -m pytest $(TWO) -m "not ray and not slow"
	$(BIN)/python -m pytest $(TWO) -m "slow or ray"

fast: $(READY)
	$(BIN)/python -m pytest $(TWO) -m "not ray and not slow"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell

environment: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is older than 3.11; use a newer one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	@$(PYTHON) -c 'import venv, ensurepip' || \
		{ echo "error: $(PYTHON) has no venv module; on Debian: apt-get install python3-venv"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

clean:
	rm -rf demo $(VENV)
