# Each target sets up what it needs in .venv first; what is already set up is left alone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Another torch: make TORCH="torch==2.11.* torchvision" setup
TORCH ?= torch>=2.11 torchvision
BUILD_TOOLS := "setuptools>=77" wheel "pybind11>=2.12" ninja "cmake>=3.25" numpy
NATIVE_SOURCES := CMakeLists.txt setup.py $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.cmake')
NATIVE_FORMATTED := $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
SANITIZE := build/sanitize
EMULATED := build/avx512

.PHONY: setup demo test avx512 lint format bench plots sanitize cuda-sanitize cuda-coverage wheel clean

setup: $(VENV)/built $(VENV)/extra-avatar $(VENV)/extra-dev

$(VENV)/torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(patsubst %,"%",$(TORCH)) $(BUILD_TOOLS)
	touch $@

$(VENV)/installed: pyproject.toml | $(VENV)/torch
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable .
	touch $@ $(VENV)/built

$(VENV)/built: $(NATIVE_SOURCES) | $(VENV)/installed
	$(BIN)/python setup.py --quiet build_ext --inplace
	touch $@

$(VENV)/extra-%: pyproject.toml | $(VENV)/torch
	$(BIN)/python -m pip install --quiet $$($(BIN)/python tools/extra.py $*)
	touch $@

demo: $(VENV)/built $(VENV)/extra-avatar
	$(BIN)/avatar demo

test: setup
	$(BIN)/python -m pytest $(TEST)

# The op tests on the AVX-512 kernels, which need no more than AVX2 here; without torch's compilers.
avx512: setup
	AVATAR_OPS_EMULATE_AVX512=1 AVATAR_OPS_CUDA=OFF AVATAR_OPS_BUILD_DIR=$(EMULATED)/cmake \
	  $(BIN)/python setup.py --quiet build --build-lib $(EMULATED)/lib
	PYTHONPATH=$(EMULATED)/lib $(BIN)/pytest tests/ops --isa avx512 \
	  -k "not compile and not export and not opcheck" $(TEST)

lint: $(VENV)/extra-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(NATIVE_FORMATTED)

format: $(VENV)/extra-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(NATIVE_FORMATTED)

# BENCH selects: make bench BENCH="-k knn"
bench: $(VENV)/built $(VENV)/extra-bench $(VENV)/extra-dev
	mkdir -p build
	$(BIN)/python -m pytest benchmarks --benchmark-json=build/bench.json --benchmark-columns=median,iqr $(BENCH)
	$(BIN)/python benchmarks/report.py build/bench.json

# Keeps the figures of the last `make bench` with those of earlier ones and draws them all.
plots: $(VENV)/extra-bench
	$(BIN)/python benchmarks/report.py build/bench.json --merge benchmarks/results
	$(BIN)/python benchmarks/plots.py benchmarks/results benchmarks/plots

# The op tests on a build with AddressSanitizer and UndefinedBehaviorSanitizer, leaving out torch's compilers.
sanitize: setup
	AVATAR_OPS_SANITIZE=1 AVATAR_OPS_CUDA=OFF AVATAR_OPS_BUILD_DIR=$(SANITIZE)/cmake \
	  $(BIN)/python setup.py --quiet build --build-lib $(SANITIZE)/lib
	PYTHONPATH=$(SANITIZE)/lib LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0:protect_shadow_gap=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  $(BIN)/pytest tests/ops -k "not compile and not export and not opcheck" $(TEST)

# The op tests on the CUDA kernels, compiled for the host with the sanitizers and with a detector of data races,
# and the broken kernels that each has to catch.
cuda-sanitize: setup
	$(BIN)/python -m pytest tests/hostcuda --hostcuda-variant sanitize --hostcuda-variant race $(TEST)
	$(BIN)/python -m pytest tests/hostcuda/test_programs.py --hostcuda-variant ucontext $(TEST)

# Which lines of device code the op tests reach.
cuda-coverage: setup
	$(BIN)/python tools/cuda_coverage.py --fail-under 95

# Builds the wheel into dist/ and tries it away from the sources.
wheel: $(VENV)/installed
	rm -rf dist build/wheel
	$(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .
	$(BIN)/python -m pip install --quiet --no-deps --target build/wheel dist/*.whl
	cd build/wheel && PYTHONPATH=. ../../$(BIN)/python -m avatar_ops

clean:
	rm -rf build dist *.egg-info avatar_ops/*.so
