# Every target sets up what it needs first and installs nothing the second time. `make` alone lists the targets.
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
SGLANG := .venv-sglang
SGLANG_PIP := $(SGLANG)/bin/python -m pip install --quiet

.PHONY: help setup demo demo-sglang test test-fast test-learn test-sglang sglang-cpu lint format clean
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

demo-sglang: $(READY) $(SGLANG)/.ready  ## the demo with a real SGLang server on CPU
	$(BIN)/python examples/arithmetic.py runs/demo-sglang/data --seed 0
	$(BIN)/mcore-rl train examples/sft_tiny.toml $(DEMO_SGLANG) --run.dir runs/demo-sglang/warm_start \
		--model.path runs/demo-sglang/data/model
	$(BIN)/mcore-rl train examples/gspo_sglang_tiny.toml
	$(BIN)/mcore-rl report runs/demo-sglang

DEMO_SGLANG := --data.train runs/demo-sglang/data/train.jsonl --data.eval runs/demo-sglang/data/eval.jsonl

test: lint  ## lint and the whole correctness suite on CPU
	$(PYTEST) $(PARALLEL) -m "not learn and not gpu and not sglang"

test-fast: $(READY)  ## the inner loop: under 3 minutes
	$(PYTEST) $(PARALLEL) -m "not slow and not learn and not gpu and not sglang"

test-learn: $(READY)  ## learning runs: tens of minutes
	$(PYTEST) -m learn

test-sglang: $(READY) $(SGLANG)/.ready  ## against real SGLang servers on CPU: under 25 minutes
	$(PYTEST) -m sglang tests/sglang

sglang-cpu: $(SGLANG)/.ready  ## SGLang 0.5.23 on CPU torch, in an environment of its own

# The .pth file makes every process of that interpreter import the names that SGLang misses on a CPU.
$(SGLANG)/.ready: tests/sglang_cpu/requirements.txt
	@test -n "$(PYTHON)" || { echo "No Python 3.11-3.14 found: install python3.11, or say make PYTHON=/path/to/python" >&2; exit 2; }
	@test -x $(SGLANG)/bin/python || $(PYTHON) -m venv $(SGLANG) || { rm -rf $(SGLANG); exit 2; }
	$(SGLANG_PIP) -c $< torch $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	$(SGLANG_PIP) --no-deps -r $<
	@printf '%s\nimport sglang_cpu_names\n' '$(CURDIR)/tests/sglang_cpu' > \
		$$($(SGLANG)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/sglang_cpu.pth
	@touch $@

lint: $(READY)  ## ruff and the type checker
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/basedpyright

format: $(READY)  ## rewrite the sources as lint wants them
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:  ## remove what was built; runs/ stays
	rm -rf .venv $(SGLANG) build dist .pytest_cache .ruff_cache .hypothesis
