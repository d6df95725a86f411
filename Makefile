PYTHON ?= python3
# torch first and exactly: a range would bring several GB of CUDA packages to a machine without a GPU.
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup demo test test-slow lint bench clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet -e ".[hf,plot,dev]"
	touch $@

demo: setup
	$(BIN)/jointkv demo --output out/demo

test: setup
	$(BIN)/jointkv model fetch smollm2
	$(BIN)/pytest -m "not slow and not gpu"

test-slow: setup
	$(BIN)/jointkv model fetch smollm2
	$(BIN)/pytest -m "slow and not gpu"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup
	$(BIN)/jointkv model fetch smollm2
	$(BIN)/python benchmarks/run.py --output out/bench

clean:
	rm -rf $(VENV) out dist build
