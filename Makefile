# make demo      sets everything up and trains a small language model in FP8 beside its bf16 twin
# make test      sets everything up and runs the tests
# make test-fast runs the tests of what users call; make test-docs those of the pages
# make lint      checks form, types, C++ layout and spelling
# make docs      builds the site into .make/site, with warnings as errors
# make sanitize  runs the host code under sanitizers, with a fake compiler and a fake driver
# make soak      on a Hopper GPU: products known to the bit, for SECONDS, drawn from SEED
# make plant     on a Hopper GPU: shows that the soak finds faults
# make sanitize-gpu  on a Hopper GPU: every family of kernels under compute-sanitizer
# make dist      builds the wheels and the sdist into dist/, with Python 3.11 and 3.12
# make test-dist installs these in fresh environments, with Python 3.11, 3.12 and 3.13
# make frameworks  runs the adapters and other libraries' tests over this one, and stores the counts
# make gpu       on a Hopper GPU: runs its tests and the benchmarks, and records them
PYTHON ?= python3
# What the tests bring (compilers for a GPU that is not there) must not disturb the demo.
DEMO := .make/demo
TEST := .make/test
SOURCES := $(shell find csrc cmake -type f) CMakeLists.txt pyproject.toml

# pip compiles no Python of what it installs: most of that is never imported. It reads "no compile: no".
export PIP_NO_COMPILE := 0

# A GPU's own JAX where there is a GPU; else the CPU's.
EXTRA := $(shell command -v nvidia-smi >/dev/null 2>&1 && echo cuda12 || echo cpu)

.PHONY: demo test test-fast test-docs frameworks gpu docs lint sanitize sanitize-gpu soak plant \
	dist test-dist clean

demo: $(DEMO)/.installed
	$(DEMO)/bin/python examples/demo.py

# The tests compile kernels and whole programs for a Hopper GPU, with or without one; kernels by the
# compilers of CUDA 12, of CUDA 13 today, and of the oldest CUDA 13.
NVRTC_13 := $(TEST)/lib/python*/site-packages/nvidia/cu13/lib/libnvrtc.so.13
NVRTC_130 := $(TEST)/cuda-13.0/nvidia/cu13/lib/libnvrtc.so.13
test: $(TEST)/.installed $(NVRTC_130)
	$(TEST)/bin/python -m pytest -n 2 --dist worksteal
	ls $(NVRTC_13) $(NVRTC_130) > $(TEST)/nvrtc.txt
	xargs -a $(TEST)/nvrtc.txt -P 2 -I {} env JAX_FP8GEMM_NVRTC={} \
	$(TEST)/bin/python -m pytest -k no_spills tests/test_compiler.py tests/test_quantize_kernels.py

$(NVRTC_130): $(TEST)/bin/python
	$(TEST)/bin/python -m pip install --quiet --no-deps --target $(TEST)/cuda-13.0 \
	nvidia-cuda-nvrtc==13.0.88
	touch $@

# tokamax and MaxText need Python 3.12 and a newer JAX than the tests have. MaxText lists its needs in
# extras that pin hundreds of packages: here are those that its layers import, and those of Gemma's.
# Flax's tests are in its source package. JAX's are in no package: JAX_TESTS=folder names those of a
# checkout of JAX. Without it their counts stay as they are stored.
FRAMEWORKS := .make/frameworks
PYTHON312 ?= python3.12
MAXTEXT := drjax grain huggingface_hub jinja2 omegaconf pathwaysutils pillow sentencepiece sympy \
	tiktoken transformers
GEMMA := clu einops jaxtyping lark ml_collections tensorflow typeguard
JAX_TESTS ?=
frameworks: $(FRAMEWORKS)/.installed
	FLAX_TESTS=$(FRAMEWORKS)/flax/tests JAX_TESTS=$(JAX_TESTS) \
	$(FRAMEWORKS)/bin/python tests/frameworks/run.py

$(FRAMEWORKS)/.installed: $(SOURCES)
	$(PYTHON312) -m venv $(FRAMEWORKS)
	$(FRAMEWORKS)/bin/python -m pip install --quiet --editable ".[cpu,frameworks]" $(MAXTEXT) \
	$(GEMMA)
	$(FRAMEWORKS)/bin/python -m pip install --quiet --no-deps maxtext==0.2.5 aqtp==0.9.0 \
	gemma==3.3.0 kauldron==1.4.4
	rm -rf $(FRAMEWORKS)/flax && mkdir $(FRAMEWORKS)/flax
	$(FRAMEWORKS)/bin/python -m pip download --quiet --no-deps --no-binary flax \
	--dest $(FRAMEWORKS)/flax "flax==$$($(FRAMEWORKS)/bin/python -c 'import flax; print(flax.__version__)')"
	tar -xzf $(FRAMEWORKS)/flax/flax-*.tar.gz --strip-components 1 -C $(FRAMEWORKS)/flax
	touch $@

CPP := $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cuh')
lint: $(TEST)/.installed
	$(TEST)/bin/ruff check .
	$(TEST)/bin/ruff format --check .
	$(TEST)/bin/clang-format --dry-run --Werror $(CPP)
	$(TEST)/bin/pyright --pythonpath $(TEST)/bin/python
	$(TEST)/bin/mypy
	$(TEST)/bin/codespell

# The pages alone: their code, links, figures and English.
test-docs: $(TEST)/.installed
	$(TEST)/bin/python -m pytest -n 2 tests/test_docs.py

# What numbers mean and what users call, on a CPU: before each push.
FAST := checks errors layout groups variants gemm quantize matmul routing release
test-fast: $(TEST)/.installed
	$(TEST)/bin/python -m pytest -n 2 $(FAST:%=tests/test_%.py)

docs: $(TEST)/.installed
	NO_MKDOCS_2_WARNING=1 $(TEST)/bin/mkdocs build --strict

sanitize: $(TEST)/.installed
	$(TEST)/bin/python tests/sanitize/run.py

# On a Hopper GPU: its tests, and every benchmark but the training runs; records both.
CARD = $$($(TEST)/bin/python -c "import sys; sys.path.append('benchmarks'); \
	import protocol; print(protocol.results().with_suffix(''))")
RECORD := JAX_FP8GEMM_COMMIT=$$(git rev-parse --short HEAD)
gpu: $(TEST)/.installed
	$(RECORD) JAX_FP8GEMM_TEST_GPU=1 JAX_FP8GEMM_RECORD=$(CARD)-tests.json \
	XLA_PYTHON_CLIENT_PREALLOCATE=false $(TEST)/bin/python -m pytest -n 8 --durations=25 tests/gpu
	for script in gemm grouped quantize router moe_layer exchange train_step; do \
	$(RECORD) $(TEST)/bin/python benchmarks/$$script.py || exit 1; done
	$(RECORD) XLA_FLAGS=--xla_gpu_enable_command_buffer= \
	$(TEST)/bin/python benchmarks/gemm.py --only host
	$(TEST)/bin/python benchmarks/readme.py --write
	$(TEST)/bin/python benchmarks/plot.py

# Adds a run to the record. SEED must differ from run to run, or the same data come again.
# SOAK=--sharded: over all GPUs of the machine.
SECONDS ?= 540
SEED ?= $(shell date +%s)
soak: $(TEST)/.installed
	$(RECORD) $(TEST)/bin/python tests/soak/run.py --seconds $(SECONDS) --seed $(SEED) $(SOAK)

# Shows that it finds faults, in scratch copies of the package.
plant: $(TEST)/.installed
	$(RECORD) $(TEST)/bin/python tests/soak/plant.py

sanitize-gpu: $(TEST)/.installed
	$(RECORD) $(TEST)/bin/python tests/gpu/sanitizers.py --record $(CARD)-sanitizers.json

# Wheels for x86-64. With pyenv: PYENV_VERSION=3.11.7:3.12.1:3.13.0 make dist test-dist.
DIST := .make/dist
dist: $(DIST)/bin/python
	$< -m pip install --quiet --group dist
	$< .ci/dist.py python3.11 python3.12

test-dist:
	$(PYTHON) .ci/test_dist.py python3.11 python3.12 python3.13

$(DEMO)/bin/python $(TEST)/bin/python $(DIST)/bin/python:
	$(PYTHON) -m venv $(@D)/..
	$@ -m pip install --quiet --upgrade pip

$(DEMO)/.installed: $(DEMO)/bin/python $(SOURCES)
	$< -m pip install --quiet --editable ".[$(EXTRA),plot]"
	touch $@

$(TEST)/.installed: $(TEST)/bin/python $(SOURCES)
	$< -m pip install --quiet --editable ".[$(EXTRA),test,lint,cross,plot,docs]"
	touch $@

clean:
	rm -rf .make build
