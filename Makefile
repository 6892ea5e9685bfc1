# Everything sets itself up: the first target that needs it makes .venv and installs into it, once.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Two test processes on two cores, one thread each.
TEST_PROCESSES ?= 2

.PHONY: install demo test check bench faults recipes format clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "gptcli needs Python 3.11 or newer; say which with: make PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -m compileall -q gptcli
	@touch $(STAMP)

## Train a GPT on text that every Python has, evaluate it, and let it write. Under five minutes on two cores.
demo: $(STAMP)
	$(BIN)/gptcli pretrain quickstart
	$(BIN)/gptcli eval
	$(BIN)/gptcli generate --prompt "The str.join() method" --prompt "Return a new list"

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(TEST_PROCESSES) --dist loadgroup

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

## Every recipe, as a toy through every stage.
recipes: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(TEST_PROCESSES) tests/recipes --all-recipes

## Every fault at full length: a kill at each operation of a save, twenty kills of one run instead of three.
faults: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(TEST_PROCESSES) --dist loadgroup tests/faults tests/resume tests/distributed --all-faults

## Every figure of benchmarks/RESULTS.md but a GPU's (benchmarks/gpu.py). NANOGPT=PATH, a checkout of karpathy/nanoGPT, adds that peer.
bench: $(STAMP)
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/quickstart.py
	$(BIN)/python benchmarks/tokenize.py
	$(BIN)/python benchmarks/attention.py
	$(BIN)/python benchmarks/compile.py
	$(BIN)/python benchmarks/activation.py
	$(BIN)/python benchmarks/halves.py
	$(BIN)/python benchmarks/checkpoint.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/train.py $(if $(NANOGPT),--nanogpt $(NANOGPT))
	$(BIN)/python benchmarks/time_to_loss.py $(if $(NANOGPT),--nanogpt $(NANOGPT))

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
