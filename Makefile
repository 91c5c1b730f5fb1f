# Every target sets up what it needs: `make fit` and `make test` work on a fresh checkout.

PYTHON ?= python3
BIN    := .venv/bin
# Tools are run on these, never on `.`: the root entries `models` and `guides` are links.
CODE   := conftest.py .ci/check_wheel .ci/site_hooks.py ppl_vae tests $(wildcard benchmarks notebooks)

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help install fit test lint typecheck format notebooks docs build-check clean

help: ## List the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 14

install: .venv/.dev ## Set up .venv with the library and the development tools, at the pinned versions

fit: .venv/.run ## Train a small VAE on the handwritten digits; the run lands in runs/digits
	$(BIN)/ppl-vae fit --data digits --output runs/digits --overwrite

test: .venv/.dev ## Run the tests and the doctests, one process per core; ARGS="-k vae" is passed to pytest
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto $(ARGS)

lint: .venv/.dev ## Check style and formatting
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)

typecheck: .venv/.dev ## Check the types
	$(BIN)/mypy

format: .venv/.dev ## Fix what can be fixed by itself, and format
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

notebooks: .venv/.dev ## Run the notebooks at full size and write their outputs into them; PPL_VAE_DATA names the data
	env -u CI $(BIN)/jupyter nbconvert --to notebook --execute --inplace \
		--ExecutePreprocessor.record_timing=False notebooks/*.ipynb

docs: .venv/.dev ## Build the documentation site into site/, warnings as errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

build-check: .venv/.dev ## Build the wheel and import it in a clean environment
	$(BIN)/python .ci/check_wheel

clean: ## Remove caches and build outputs (.venv and runs stay)
	rm -rf build dist site .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find $(wildcard ppl_vae tests benchmarks notebooks) -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps .run and .dev say that the pinned install is done; they age with the two files on the right.
.venv/.run: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -c constraints.txt -e .
	@touch $@

.venv/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	@touch .venv/.run $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	"ppl-vae needs Python 3.11 or newer, got " + sys.version.split()[0] + "; try: make PYTHON=python3.11 <target>")'
	$(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }
