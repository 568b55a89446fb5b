# make demo   sets everything up and trains a small language model in FP8 beside its bf16 twin
# make test   sets everything up and runs the tests
# make gpu    on a Hopper GPU: runs its tests and the benchmarks, and records them
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(shell find csrc cmake -type f) CMakeLists.txt pyproject.toml

# A GPU's own JAX where there is a GPU; else the CPU's.
EXTRA := $(shell command -v nvidia-smi >/dev/null 2>&1 && echo cuda12 || echo cpu)

.PHONY: demo test gpu lint clean

demo: $(VENV)/.demo
	$(BIN)/python examples/demo.py

# The tests compile kernels and whole programs for a Hopper GPU, with or without one; kernels by the
# compilers of CUDA 12, of CUDA 13 today, and of the oldest CUDA 13.
NVRTC_13 := $(VENV)/lib/python*/site-packages/nvidia/cu13/lib/libnvrtc.so.13
NVRTC_130 := $(VENV)/cuda-13.0/nvidia/cu13/lib/libnvrtc.so.13
test: $(VENV)/.test $(NVRTC_130)
	$(BIN)/python -m pytest -n 2 --dist worksteal
	for nvrtc in $(NVRTC_13) $(NVRTC_130); do JAX_FP8GEMM_NVRTC=$$(ls $$nvrtc) \
	$(BIN)/python -m pytest -n 2 -k no_spills \
	tests/test_compiler.py tests/test_quantize_kernels.py || exit 1; done

$(NVRTC_130): $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --no-deps --target $(VENV)/cuda-13.0 nvidia-cuda-nvrtc==13.0.88
	touch $@

# On a Hopper GPU: its tests, and every benchmark but the training runs; records both.
CARD = $$($(BIN)/python -c "import sys; sys.path.append('benchmarks'); \
	import protocol; print(protocol.results().with_suffix(''))")
RECORD := JAX_FP8GEMM_COMMIT=$$(git rev-parse --short HEAD)
gpu: $(VENV)/.test
	$(RECORD) JAX_FP8GEMM_TEST_GPU=1 JAX_FP8GEMM_RECORD=$(CARD)-tests.json \
	XLA_PYTHON_CLIENT_PREALLOCATE=false $(BIN)/python -m pytest -n 8 tests/gpu
	for script in gemm grouped quantize moe_layer train_step; do \
	$(RECORD) $(BIN)/python benchmarks/$$script.py || exit 1; done
	$(RECORD) XLA_FLAGS=--xla_gpu_enable_command_buffer= \
	$(BIN)/python benchmarks/gemm.py --only host
	$(BIN)/python benchmarks/plot.py

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.demo: $(VENV)/bin/python $(SOURCES)
	$(BIN)/python -m pip install --quiet --editable ".[$(EXTRA),plot]"
	touch $@

$(VENV)/.test: $(VENV)/bin/python $(SOURCES)
	$(BIN)/python -m pip install --quiet --editable ".[$(EXTRA),test,cross,plot]"
	touch $@

clean:
	rm -rf $(VENV) build
