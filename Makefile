# make setup: .venv with everything; make demo: the whole path on a small trained model; make test: the tests.
# make bench: a full-size random M3 in BENCH_WORK, timed beside the peers that `make peers` builds into .peers (both
# long). BENCH_OPTIONS are those of `python -m benchmarks`.
PYTHON ?= python3
BIN := .venv/bin
BENCH_WORK ?= bench-work
BENCH_OPTIONS ?= --picture
NATIVE := $(shell find csrc tests/csrc -name '*.cc' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: setup demo test bench peers neon avx512 lint format clean

setup: .venv/installed

# Built with what pyproject.toml's build-system names, but in .venv: elsewhere it would all be fetched and built each time.
# What pip would compile file by file is compiled by all cores; some packages bring files for a later Python.
.venv/installed: pyproject.toml setup.py CMakeLists.txt $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip 'setuptools>=77' 'cmake>=3.24' ninja 'pybind11>=2.13'
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pip install --quiet --no-compile --no-build-isolation \
	    --editable '.[bench,export,test]'
	$(BIN)/python -m compileall -qq -j 0 .venv/lib || true
	touch $@

demo: setup
	$(BIN)/healthgpt-edge demo

test: setup
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

bench: setup
	$(BIN)/python -m benchmarks $(BENCH_WORK) $(addprefix --peers-python ,$(wildcard .peers/bin/python)) $(BENCH_OPTIONS)

peers:
	test -x .peers/bin/python || $(PYTHON) -m venv .peers
	CMAKE_ARGS="-DGGML_NATIVE=ON" .peers/bin/python -m pip install --quiet -r benchmarks/peers/requirements.txt

# NEON under an emulator: Debian's g++-aarch64-linux-gnu and qemu-user-static.
neon: setup
	$(BIN)/cmake -S . -B build/neon -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
	    -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ -DCMAKE_EXE_LINKER_FLAGS=-static
	$(BIN)/cmake --build build/neon --target compare_targets
	qemu-aarch64-static build/neon/compare_targets

# AVX-512 with AVX2's instructions in the place of its own, by Debian's libsimde-dev.
avx512: setup
	EMULATED=Avx512 $(BIN)/python -m pytest tests/csrc/test_sanitizers.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(NATIVE)
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(NATIVE)

clean:
	rm -rf .venv build *.egg-info demo-output runtime/*.so
