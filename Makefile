# Everything a developer does is a verb here. `make demo` and `make test` need only python3.11, pip, git (and gcc for speed).

PYTHON ?= python3.11
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-slow lint types bench bench-merge docs clean

demo: $(READY)            ## the main job, on a real 4-bit model
	$(BIN)/qgraft demo

test: $(READY)            ## the tests that need neither a network nor a GPU
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2

test-slow: $(READY)       ## the others, but those for a GPU
	$(BIN)/python -m pytest -q -m "slow and not cuda"

lint: $(READY)
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

bench: $(READY)           ## speed and memory beside PEFT, bitsandbytes, llama.cpp and others, to benchmarks/results; an hour
	$(BIN)/python -m pip install --quiet -e ".[dev,bench]"
	$(BIN)/python benchmarks/train_cpu.py --dataset all
	$(BIN)/python benchmarks/decode_cpu.py
	$(BIN)/python benchmarks/profile_step.py
	$(BIN)/python benchmarks/load.py
	$(BIN)/python benchmarks/adapters.py
	$(BIN)/python benchmarks/jobs.py
	$(BIN)/python benchmarks/frozen_cache.py

bench-merge: $(READY)     ## what merging keeps, by format, rank and task; hours
	$(BIN)/python -m pip install --quiet -e ".[dev,bench]"
	$(BIN)/python benchmarks/merge_quality.py
	$(BIN)/python benchmarks/merge_quality.py --formats nf4 --methods peft-nf4 --ranks 8

docs: $(READY)            ## write docs/reference.md anew from --help
	$(BIN)/python docs/make_reference.py

# torch comes first and by its own line, so that a CPU build (TORCH="torch==2.13.0 --index-url ...") can be chosen.
$(READY): pyproject.toml setup.py $(wildcard src/qgraft/kernels/*.[ch])
	$(PYTHON) -m venv $(VENV) || python3 -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build src/*.egg-info src/qgraft/kernels/_native*
