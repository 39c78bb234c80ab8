# Every target sets up .venv first and installs nothing the second time. `make` alone lists the targets.
#
#   PYTHON=python3.12       the interpreter for .venv (default: python3.11, else python3)
#   TORCH_INDEX=https://... an index to take torch from, such as one of CPU builds (default: pip's own)

PYTHON ?= $(shell for p in python3.11 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' 2>/dev/null && echo $$p && break; done)
TORCH_INDEX ?=

BIN := .venv/bin
READY := .venv/.ready
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
PARALLEL := -n 2 --dist loadgroup

.PHONY: help setup demo test test-fast test-learn lint format clean
.DELETE_ON_ERROR:

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 14

setup: $(READY)  ## .venv with the pinned versions of constraints.txt

$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "No Python 3.11-3.14 found: install python3.11, or say make PYTHON=/path/to/python" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' || \
		{ echo "$(PYTHON) is not Python 3.11-3.14: say make PYTHON=/path/to/python" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv || \
		{ rm -rf .venv; echo "$(PYTHON) cannot make environments: install its venv package (Debian: python3.11-venv)" >&2; exit 2; }
	$(BIN)/python -m pip install --quiet -c constraints.txt torch $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --quiet -e '.[dev]'
	@touch $@

demo: $(READY)  ## train a tiny policy with GSPO at TP=2 on this machine: a few minutes
	$(BIN)/python examples/arithmetic.py runs/demo/data --seed 0
	$(BIN)/mcore-rl train examples/sft_tiny.toml
	$(BIN)/mcore-rl train examples/gspo_tiny.toml
	$(BIN)/mcore-rl report runs/demo
	@echo "Open runs/demo/report.html in a browser; the numbers are in runs/demo/metrics.jsonl"

test: lint  ## lint and the whole correctness suite on CPU
	$(PYTEST) $(PARALLEL) -m "not learn and not gpu and not sglang"

test-fast: $(READY)  ## the inner loop: under 3 minutes
	$(PYTEST) $(PARALLEL) -m "not slow and not learn and not gpu and not sglang"

test-learn: $(READY)  ## learning runs: tens of minutes
	$(PYTEST) -m learn

lint: $(READY)  ## ruff and the type checker
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/basedpyright

format: $(READY)  ## rewrite the sources as lint wants them
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:  ## remove what was built; runs/ stays
	rm -rf .venv build dist .pytest_cache .ruff_cache .hypothesis
