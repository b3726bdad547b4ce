# `make demo` and `make test` do all their own set-up in a local virtual environment.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

# Large tensors come and go all the time: keep glibc from handing their pages back to the kernel after each.
export MALLOC_MMAP_MAX_ ?= 0
export MALLOC_TRIM_THRESHOLD_ ?= 100000000000
export MALLOC_TOP_PAD_ ?= 268435456
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test lint clean

demo: $(VENV)/.ready  ## edit 20 facts of the embedded world with JEEP, measure, save, undo
	$(BIN)/retcon demo

test: $(VENV)/.ready  ## the whole suite, two processes of one thread each
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

lint: $(VENV)/.ready  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV)
