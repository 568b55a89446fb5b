# make demo   sets everything up and trains a small language model in FP8 beside its bf16 twin
# make test   sets everything up and runs the tests
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(shell find csrc cmake -type f) CMakeLists.txt pyproject.toml

# A GPU's own JAX where there is a GPU; else the CPU's.
EXTRA := $(shell command -v nvidia-smi >/dev/null 2>&1 && echo cuda12 || echo cpu)

.PHONY: demo test lint clean

demo: $(VENV)/.demo
	$(BIN)/python examples/demo.py

# The tests compile kernels and whole programs for a Hopper GPU, with or without one.
test: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 --dist worksteal

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
