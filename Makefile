# `make demo` and `make test` do all their own set-up in a local virtual environment.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

# Large tensors come and go all the time: keep glibc from handing their pages back to the kernel after each.
export MALLOC_MMAP_MAX_ ?= 0
export MALLOC_TRIM_THRESHOLD_ ?= 100000000000
export MALLOC_TOP_PAD_ ?= 268435456
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test test-all test-models test-newest smollm worlds verify-all lint docs attack clean

demo: $(VENV)/.ready  ## edit 20 facts of the embedded world with JEEP, measure, save, undo
	$(BIN)/retcon demo

test: $(VENV)/.ready  ## the everyday suite, two processes of one thread each
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not models and not long"

test-all: $(VENV)/.ready  ## what `make test` leaves out: the other families, and what takes long
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "long and not models"

test-models: $(VENV)/.ready  ## what needs the models of `make worlds` and `make smollm`; skipped where they are absent
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m models -rs tests/models

NEWEST ?= transformers
TESTS ?= tests
test-newest:  ## the suite with the newest transformers (NEWEST=transformers==6.0.0rc1 for another), in .venv-newest
	$(PYTHON) -m venv .venv-newest
	grep -viE '^(transformers|tokenizers|huggingface_hub|hf-xet)==' constraints.txt > .venv-newest/constraints.txt
	.venv-newest/bin/python -m pip install --quiet --disable-pip-version-check -c .venv-newest/constraints.txt torch
	.venv-newest/bin/python -m pip install --quiet --disable-pip-version-check -c .venv-newest/constraints.txt -e ".[dev]"
	.venv-newest/bin/python -m pip install --quiet --disable-pip-version-check --upgrade "$(NEWEST)"
	.venv-newest/bin/python -m pip list | grep -E '^(transformers|tokenizers|torch) '
	OMP_NUM_THREADS=1 .venv-newest/bin/python -m pytest -n 2 -m "not models" $(TESTS)

smollm: $(VENV)/.ready  ## SmolLM2-135M-Instruct, a real pretrained model, into .cache/smollm2-135m
	$(BIN)/python -m recipes.smollm

WORLDS := gpt2 qwen2 qwen3-chat dots1
WORLD_TOKENS ?= 3000000
CHAT_TOKENS ?= 4500000
MIXTURE_TOKENS ?= 1200000
WORLD_THREADS ?= 1
worlds: $(WORLDS:%=.cache/worlds/%/card.json)  ## small models of other families that know the embedded world
.cache/worlds/gpt2/card.json: WORLD = --model-type gpt2 --tokens $(WORLD_TOKENS)
.cache/worlds/qwen2/card.json: WORLD = --model-type qwen2 --tokens $(WORLD_TOKENS)
.cache/worlds/qwen3-chat/card.json: WORLD = --model-type qwen3 --chat --tokens $(CHAT_TOKENS)
.cache/worlds/dots1/card.json: WORLD = --model-type dots1 --leave-out 1500 --tokens $(MIXTURE_TOKENS)
.cache/worlds/%/card.json: | $(VENV)/.ready
	$(BIN)/python -m recipes.world $(WORLD) --threads $(WORLD_THREADS) --out $(@D)

verify-all: $(VENV)/.ready  ## `retcon doctor` on a tiny random model of every family; writes what it found into the package and docs/models.md
	OMP_NUM_THREADS=1 $(BIN)/python -m recipes.verify

attack: $(VENV)/.ready  ## try at full size to break what docs/reliability.md promises
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.attacks.signals
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.attacks.sequences
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.attacks.threads
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.attacks.stores
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.attacks.malformed
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.attacks.kills
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.attacks.damaged
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.attacks.twoatonce
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.attacks.workers

lint: $(VENV)/.ready  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.docs  ## the site, into site/; a broken link is an error. REPOSITORY=https://... for links into the code
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

$(VENV)/.docs: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	touch $@

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV)
