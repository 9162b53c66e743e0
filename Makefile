# Everything goes into .venv; each target sets up what it needs.
PYTHON ?= python3.11
ifeq (,$(shell command -v $(PYTHON)))
PYTHON := python3
endif
BIN := .venv/bin
export NM_DISABLE_ANALYTICS = 1
export NO_MKDOCS_2_WARNING = 1  # an advertisement of Material for MkDocs

.PHONY: install demo test lint docs docs-serve clean help

help:  ## Show what there is
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

.venv/installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade 'pip>=24'
	$(BIN)/pip install --quiet -r requirements.txt
	$(BIN)/pip install --quiet -e '.[sparseml,research,wandb,dev]'
	touch $@

install: .venv/installed  ## Create .venv with the pinned stack (Python 3.11 if there is one; without SparseML on later ones)

demo: install  ## Prune a small vision transformer with three methods and compare them
	$(BIN)/python research/demo/run_demo.py

lint: install  ## Lint, check formatting, check types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint  ## Run linters and the test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

.venv/docs: .venv/installed
	$(BIN)/pip install --quiet -e '.[docs]'
	touch $@

docs: .venv/docs  ## Build the documentation site into output/site; every warning is an error
	$(BIN)/mkdocs build --strict

docs-serve: .venv/docs  ## Serve the documentation site on http://127.0.0.1:8000 and rebuild it on changes
	$(BIN)/mkdocs serve

clean:  ## Remove the environment and all caches
	rm -rf .venv output .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info src/*.egg-info
