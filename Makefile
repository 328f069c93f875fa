# Everything goes through `make setup`, which makes .venv once and is instant after that.
#   make setup TORCH_SPEC=torch==2.14.0 PYTHON=python3.12 GENIE_SYSTEM=0
SHELL := /bin/bash
PY := .venv/bin/python
export TORCH_SPEC PYTHON GENIE_SYSTEM

# Seconds that the suites may take on two idle cores. They are stopped at three times that, and `make test` before an
# hour is over.
TEST_BUDGET_S ?= 2160
TEST_LONG_BUDGET_S ?= 3600
TEST_PROCESSES ?= 2
TEST_ARGS ?=
BENCH_ARGS ?=
DEMO_ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-long check bench bench-peers notebooks docs golden clean

help:  ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup:  ## make .venv with everything in it
	@tools/setup.sh

demo: setup  ## the main job on real input, compared with local eager (DEMO_ARGS=--quick)
	@$(PY) -m genie_dynamo.cli demo $(DEMO_ARGS)

test: setup  ## all tests but the slow ones (TEST_ARGS="-k keys")
	@TEST_LIMIT_S=3300 tools/run_tests.sh $(TEST_BUDGET_S) -n $(TEST_PROCESSES) -m "not slow" --durations=15 $(TEST_ARGS) tests

test-long: setup  ## the slow tests alone
	@tools/run_tests.sh $(TEST_LONG_BUDGET_S) -n $(TEST_PROCESSES) -m slow --durations=15 $(TEST_ARGS) tests

check: setup  ## ruff, mypy and the fast tests, in under a minute
	@$(PY) -m ruff check .
	@tools/typecheck.sh
	@tools/run_tests.sh 60 -n $(TEST_PROCESSES) -q -m "not slow and not heavy" $(TEST_ARGS) \
		tests/core tests/passes tests/cli tests/packaging tests/plugins

bench: setup  ## measure against local and against the floor; writes build/bench.json
	@mkdir -p build
	@$(PY) -m bench all --out build/bench.json $(BENCH_ARGS)

bench-peers: setup  ## measure against other frameworks (those that are installed); writes build/bench-peers.json
	@mkdir -p build
	@$(PY) -m bench peers --out build/bench-peers.json $(BENCH_ARGS)

notebooks: setup  ## execute the notebooks and keep their outputs
	@$(PY) tools/notebooks.py notebooks/*.ipynb

docs: setup  ## write the tables of the documents from the code, and check links and examples
	@$(PY) tools/docs.py --write

golden: setup  ## write the golden files of the tests anew; look at the diff before committing it
	@$(PY) -m pytest -q --update-golden -m golden tests

clean:  ## remove what the targets above made, but for .venv
	@rm -rf build dist .mypy_cache .ruff_cache .pytest_cache
