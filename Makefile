# Evergreen needs Python 3.11 or newer and a package index; everything else is installed into .venv from the lock files.
PYTHON ?= python3
BIN := .venv/bin
DAYS ?=
# Two consecutive slots near the end of MovieLens' history with 300 and more requests to judge on (its last two have 190).
SLOTS := --as-of 1998-04-02T03:00 --as-of 1998-04-06T03:00
CHECK := 1998-04-08T12:00
.DEFAULT_GOAL := help
.PHONY: help install run test test-spark lint bench clean

help: ## Show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/'

.venv/.runtime: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Evergreen needs Python 3.11 or newer; call make PYTHON=/path/to/python3.11"; exit 2; }
	@echo "Creating .venv and installing the locked packages (a few minutes the first time) ..."
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable . 
	@$(BIN)/python -m pip check
	@touch $@

.venv/.dev: .venv/.runtime requirements-dev.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.lock
	@$(BIN)/python -m pip check
	@touch $@

install: .venv/.runtime ## Create .venv from the lock file

run: .venv/.runtime ## Fetch MovieLens 100K, run two consecutive retrain slots through the whole loop, then check for drift
	@$(BIN)/evergreen data fetch movielens-100k $(if $(DAYS),--last-days $(DAYS))
	@$(BIN)/evergreen retrain $(SLOTS) || [ $$? -eq 3 ]  # 3: held by the gate, which is a good end
	@$(BIN)/evergreen refresh --as-of $(CHECK)
	@$(BIN)/evergreen monitor --as-of $(CHECK)

test: .venv/.dev ## Run the tests
	@$(BIN)/python -m pytest -n 4  # two cores; half of the time tests wait for processes to start and to end

.venv/.spark: .venv/.dev requirements-spark.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation -r requirements-spark.lock
	@touch $@

test-spark: .venv/.spark ## Run the tests of features on Spark (needs Java 17)
	@$(BIN)/python -m pytest tests/unit/test_features_spark.py || [ $$? -eq 5 ]  # 5: all skipped, for lack of Java

lint: .venv/.dev ## Style, the rooms' order, types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/lint-imports
	@$(BIN)/mypy

bench: .venv/.dev ## Measure loop, features, ranker, learning, gate, serving, canary and drift (8 hours); writes docs/results/
	@$(BIN)/python -m benchmarks.loop
	@$(BIN)/python -m benchmarks.features
	@$(BIN)/python -m benchmarks.ranker
	@$(BIN)/python -m benchmarks.simulate
	@$(BIN)/python -m benchmarks.continual
	@$(BIN)/python -m benchmarks.gate
	@$(BIN)/python -m benchmarks.serving
	@$(BIN)/python -m benchmarks.canary
	@$(BIN)/python -m benchmarks.drift

clean: ## Remove the environment and the home directory's state
	rm -rf .venv .evergreen
