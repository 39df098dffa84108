PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: help setup demo check test

help: ## Show this help
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY) ## Build .venv with everything that demo, check and test need

$(READY): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable '.[dev,demo,bench]'
	$(BIN)/pip check
	@touch $(READY)

demo: $(READY) ## Prepare text that is on this machine anyway, and train the demo on it: minutes on a laptop
	$(BIN)/python -m data_prep +corpus=demo
	$(BIN)/python -m modernenc.plan +recipe=demo
	$(BIN)/python -m modernenc.train +recipe=demo

check: $(READY) ## Lint and type-check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

test: $(READY) ## Run all tests
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --maxprocesses 4 --maxschedchunk 1
