# Everything sets itself up: the first target that needs it makes .venv and installs into it, once.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Two test processes on two cores, one thread each. A file's tests stay together, so that what they share is made once
# (pytest 9.2 with xdist 3.8 passes over groups without a word).
TEST_PROCESSES ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

.PHONY: install demo test check bench faults distributed recipes format clean

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
	$(PYTEST)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

## Every recipe, as a toy through every stage.
recipes: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(TEST_PROCESSES) tests/recipes --all-recipes

# Fault 23, which is a test of several processes.
CHANGED_GROUP := test_a_checkpoint_goes_on_under_another_strategy_and_number_of_processes

## Every fault at full length: a kill at each operation of a save, twenty kills of one run instead of three.
faults: $(STAMP)
	$(PYTEST) tests/distributed/test_equal.py::$(CHANGED_GROUP) tests/faults tests/resume \
		tests/unit/train/test_backoff.py tests/unit/train/test_fitting.py --all-faults

## Every strategy on two and four processes against one, launchers, and two hosts joined by a cable.
distributed: $(STAMP)
	$(PYTEST) tests/distributed --all-faults

## Every figure of benchmarks/RESULTS.md but a GPU's (benchmarks/gpu.py). NANOGPT=PATH, a checkout of karpathy/nanoGPT, adds that peer; DATA=PATH, with sst2/ and multi30k/, what packing is worth.
bench: $(STAMP)
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/quickstart.py
	$(BIN)/python benchmarks/tokenize.py
	$(BIN)/python benchmarks/attention.py
	$(BIN)/python benchmarks/compile.py
	$(BIN)/python benchmarks/activation.py
	$(BIN)/python benchmarks/halves.py
	$(BIN)/python benchmarks/checkpoint.py
	$(BIN)/python benchmarks/evaluate.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/packing.py
	$(BIN)/python benchmarks/generate.py $(if $(NANOGPT),--nanogpt $(NANOGPT))
	$(BIN)/python benchmarks/train.py $(if $(NANOGPT),--nanogpt $(NANOGPT))
	$(BIN)/python benchmarks/time_to_loss.py $(if $(NANOGPT),--nanogpt $(NANOGPT))

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
