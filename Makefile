# The commands of this project. Only python3 (3.11 or newer) and make have to be there: `make setup` brings the rest.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TESTS := ghsync_dagster_tests
BOOTSTRAP := $(PYTHON) ghsync_dagster/local/bootstrap.py

.DEFAULT_GOAL := help
.PHONY: help setup setup-dev ready packages run cdc test dev check bench bench-batch bench-cdc bench-supervised bench-audit bench-files faults mutations stack-env e2e lock clean

help: ## show these commands
	@$(PYTHON) -c 'import re; [print("make {:<17}{}".format(*m)) for m in re.findall(r"(?m)^([a-z-]+):.*?## (.+)", open("Makefile").read())]'

setup: ## install everything that a run needs: uv, locked packages, Java if there is none, jars
	@$(BOOTSTRAP)

setup-dev: ## the same, and what tests and checks need
	@$(BOOTSTRAP) --dev

# The class archive comes after the first run, which needs none.
ready:
	@$(BOOTSTRAP) --no-archive

# By the shell, as a list of paths has quotes in it.
export EVENTS
run: ready ## take EVENTS (the sample) to MongoDB with all checks, and print a summary
	@$(BIN)/ghsync run $${EVENTS:+--events "$$EVENTS"}
	@$(BOOTSTRAP)

cdc: ready ## try the change path on local servers: workload, sync, latency, audit
	@$(BIN)/ghsync cdc rehearse
	@$(BOOTSTRAP)

test: setup-dev ## run all tests, in JOBS processes (4, as some wait)
	@$(BIN)/python -m pytest --numprocesses $(or $(JOBS),4) --dist loadfile --no-loadscope-reorder

dev: setup ## serve the Dagster UI with daemon and sensors on 127.0.0.1, PORT (3000)
	@$(BIN)/ghsync dev --port $(or $(PORT),3000)

packages: ## install the locked packages alone: all that checks need
	@$(BOOTSTRAP) --dev --packages

check: packages ## lint, format, types, import rules, declared packages
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/deptry . --extend-exclude 'benchmarks|$(TESTS)'
	@$(BIN)/deptry . $(TESTS) --ignore DEP002,DEP004

bench: bench-batch bench-files bench-cdc bench-supervised bench-audit ## run all benchmarks against their peers

bench-batch: setup-dev ## the batch benchmark
	@$(BIN)/python -m benchmarks.batch

bench-cdc: setup-dev ## the benchmark of the change path
	@$(BIN)/python -m benchmarks.cdc

bench-supervised: setup-dev ## the benchmark of hand-overs and kills under the supervisor
	@$(BIN)/python -m benchmarks.cdc_supervised

bench-audit: setup-dev ## the benchmark of the audit against an earlier build
	@$(BIN)/python -m benchmarks.audit

bench-files: setup-dev ## the benchmark of many files beside one, against an earlier build and Spark's own reader
	@$(BIN)/python -m benchmarks.files

faults: setup-dev ## the long campaign of kills and races
	@TEST_FAULT_ROUNDS=30 $(BIN)/python -m pytest -m faults

mutations: setup-dev ## mutations of the product's own code, and which test turns red for each
	@TEST_FAULT_ROUNDS=1 $(BIN)/python -m pytest ghsync_dagster_tests/faults/test_mutations.py -rP --numprocesses $(or $(JOBS),2)

stack-env: ## write .env for the compose stack, unless it is there: docker compose up --detach --build --wait is next
	@if [ -e .env ]; then echo "there is a .env already; deploy/env.example has what the stack needs"; exit 2; fi
	@sed "s/^STACK_DOCKER_GID=.*/STACK_DOCKER_GID=$$(stat -c %g $${DOCKER_SOCKET:-/var/run/docker.sock})/" deploy/env.example > .env

e2e: packages ## the compose stack from nothing: used, killed, restored, removed; needs Docker
	@$(BIN)/python -m ghsync_dagster_tests.e2e $(E2E)

lock: ## resolve the lock files from pyproject.toml; UPGRADE=1 takes newer versions
	@$(BOOTSTRAP) --lock $(if $(UPGRADE),--upgrade)

clean: ## stop the local servers; remove what was set up, and .ghsync with all local data
	@if [ -x $(BIN)/ghsync ]; then $(BIN)/ghsync down; fi
	@rm -rf $(VENV) .uv .ghsync .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
