# AgentGym's commands. `make demo` and `make test` each work alone on a fresh clone: they create .venv and
# install into it what they need. `make help` lists everything.

PYTHON ?= python3
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest
# Two threads that share two cores are slower than one each: tests parallelise over processes instead.
TEST_ENV := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow test-all check types lint docs dist bench peers clean distclean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install:  ## create .venv and install AgentGym into it; seconds when nothing changed
	@$(PYTHON) scripts/install.py

demo: install  ## train a small language model on a text game: at most ten minutes on two cores
	@OMP_WAIT_POLICY=PASSIVE $(BIN)/python examples/demo.py

test: install  ## the tests, but the slow ones
	@$(PYTHON) scripts/install.py system
	@$(TEST_ENV) $(PYTEST) -m "not slow" -n auto --maxprocesses 4

test-slow: install  ## the slow tests
	@$(PYTHON) scripts/install.py system
	@$(TEST_ENV) $(PYTEST) -m slow -n auto --maxprocesses 2

test-all: test test-slow  ## both

check: lint types  ## ruff and mypy: must be clean

lint: install  ## ruff, as linter and formatter
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

# mypy cannot follow folders that are mapped into one namespace: it reads a tree of links laid out as installed.
types: install  ## mypy --strict
	@rm -rf build/types && mkdir -p build/types
	@cp -rs "$(CURDIR)/agentgym" build/types/agentgym
	@for room in environments sandboxes tools trainers; do \
		cp -rs "$(CURDIR)/$$room" build/types/agentgym/$$room; done
	@cd build/types && ../../$(BIN)/mypy --config-file ../../pyproject.toml \
		--cache-dir ../../.mypy_cache -p agentgym

docs: install  ## the documentation, into site/
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "site/index.html"

dist: install  ## sdist and wheel of the last commit, into dist/
	@rm -rf build/export dist && mkdir -p build/export
	@git archive HEAD | tar -x -C build/export
	@SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct) $(BIN)/python -m build --no-isolation \
		--outdir dist build/export

bench: install  ## the benchmarks: the core's, then those of the environments
	@$(TEST_ENV) $(BIN)/agentgym bench core
	@$(TEST_ENV) $(BIN)/agentgym bench environments

peers: install  ## TRL in an environment of its own, build/peers, for `agentgym bench training`
	@$(BIN)/python scripts/peers.py

clean:  ## remove what was built, but .venv and runs
	@rm -rf build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	@find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +

distclean: clean  ## clean, and remove .venv
	@rm -rf .venv
