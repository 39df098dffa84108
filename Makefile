PYTHON ?= python3
OLDEST_PYTHON ?= python3.10
BIN := .venv/bin
READY := .venv/.ready
OLDEST := .venv-oldest/bin
OLDEST_READY := .venv-oldest/.ready
PYTEST := pytest --numprocesses auto --maxprocesses 4 --maxschedchunk 1
# The tests that depend most on versions of libraries.
OLDEST_TESTS := tests/model tests/hugging_face tests/bench/test_roofline.py tests/run_folder/test_checkpoints.py \
	tests/data/test_store.py tests/data/test_mds.py tests/preparation/test_data_prep.py \
	tests/evaluation

.PHONY: help setup demo check docs test test-oldest

help: ## Show this help
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY) ## Build .venv with everything that demo, check and test need

$(READY): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable '.[dev]'
	$(BIN)/pip check
	@touch $(READY)

# The lowest version of everything that pyproject.toml names, with MosaicML streaming, which wants what is old.
$(OLDEST_READY): pyproject.toml
	$(OLDEST_PYTHON) -m venv .venv-oldest
	grep -oE '"[a-z0-9-]+(\[[a-z]+\])?>=[0-9.]+' pyproject.toml | sed -E 's/^"//; s/\[.*\]//; s/>=/==/' > .venv-oldest/constraints.txt
	$(OLDEST)/pip install --quiet --upgrade pip
	$(OLDEST)/pip install --quiet --constraint .venv-oldest/constraints.txt --editable '.[dev,streaming]'
	$(OLDEST)/pip check
	@touch $(OLDEST_READY)

demo: $(READY) ## Prepare text that is already on this machine, and train the demo on it: minutes on a laptop
	$(BIN)/python -m data_prep +corpus=demo
	$(BIN)/python -m modernenc.plan +recipe=demo
	$(BIN)/python -m modernenc.train +recipe=demo

check: $(READY) docs ## Lint, type-check, check the direction of imports, and build the manual
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

docs: $(READY) ## Build the manual into docs/.site; a link that leads nowhere is an error
	$(BIN)/python docs/reference.py
	$(BIN)/zensical build --strict --config-file docs/zensical.toml

test: $(READY) ## Run all tests
	OMP_NUM_THREADS=1 $(BIN)/$(PYTEST)

test-oldest: $(OLDEST_READY) ## Run the tests that depend on versions, under the lowest one of Python and of every library
	OMP_NUM_THREADS=1 $(OLDEST)/$(PYTEST) -m 'not slow and not wall_clock' $(OLDEST_TESTS)
