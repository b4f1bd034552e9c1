# One way to do each chore; CI uses the same. `make help` lists them.
VENV ?= .venv
PYTHON ?= python3
WORKERS ?= 2
BIN := $(VENV)/bin

.PHONY: help demo test test-quick test-gpu lint types bench bench-peers bench-gpu contracts format clean

help:  ## list the chores
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(BIN)/pip:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.base: pyproject.toml | $(BIN)/pip
	$(BIN)/pip install --disable-pip-version-check -q -e .
	@touch $@

$(VENV)/.dev: pyproject.toml | $(BIN)/pip
	$(BIN)/pip install --disable-pip-version-check -q -e '.[test,lint]'
	@touch $@ $(VENV)/.base

demo: $(VENV)/.base  ## serve a real model: what was chosen and why, an answer, a mixed batch
	$(BIN)/drivetrain demo

test: $(VENV)/.dev  ## run every test, in WORKERS processes
	$(BIN)/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test-quick: $(VENV)/.dev  ## run the tests that take seconds
	$(BIN)/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m "not slow"

test-gpu: $(VENV)/.dev  ## run the tests that need a GPU, in WORKERS processes; without one each is skipped
	$(BIN)/pytest -n $(WORKERS) --dist worksteal tests/gpu

lint: $(VENV)/.dev  ## style and import law
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pytest -q tests/core/test_laws.py

types: $(VENV)/.dev  ## type-check the package as it is installed
	rm -rf build/types
	$(BIN)/pip install --disable-pip-version-check -q --no-deps --target build/types .
	MYPYPATH=build/types $(BIN)/mypy --config-file pyproject.toml -p drivetrain

bench: $(VENV)/.dev  ## compare with transformers in one run
	$(BIN)/python tests/benchmarks/against_transformers.py

bench-peers: $(VENV)/.dev  ## compare with llama.cpp, vLLM and transformers, and write docs/benchmarks/cpu.md
	$(BIN)/python tests/benchmarks/against_peers.py --docs docs/benchmarks

bench-gpu: $(VENV)/.dev  ## compare the Triton kernels with the ceilings of the GPU; writes docs/benchmarks/gpu.md
	$(BIN)/python tests/benchmarks/gpu/run.py

contracts: $(VENV)/.dev  ## rewrite the snapshot of the public contracts after a versioned change
	$(BIN)/python tests/support/contract_snapshot.py

format: $(VENV)/.dev  ## rewrite the code in the house style
	$(BIN)/ruff check --fix-only -q .
	$(BIN)/ruff format -q .

clean:  ## remove what the chores made
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache
