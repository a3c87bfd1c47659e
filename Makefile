# `make demo` and `make test` install what they need first (apt and PyPI); see tools/bootstrap.

SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=

.PHONY: help demo test check lint unit bench fresh clean
help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(VENV)/.installed: pyproject.toml tools/bootstrap
	tools/bootstrap
	@touch $@

demo: $(VENV)/.installed ## a small Internet of namespaces, live: ARGS="--nat-a symmetric --json out.json"
	$(BIN)/p2pvpn demo $(ARGS)

test: $(VENV)/.installed lint ## everything: lint, types, layers, unit, simulation, namespaces, strangers
	tools/run-tests $(ARGS)

check: $(VENV)/.installed lint unit ## the quick part

lint:
	$(BIN)/ruff check p2pvpn tests tools
	$(BIN)/ruff format --check p2pvpn tests tools
	$(BIN)/mypy
	$(BIN)/lint-imports

unit:
	$(BIN)/pytest -m "not netns and not stranger and not slow" $(ARGS)

bench: $(VENV)/.installed ## throughput side by side with peers
	$(BIN)/python -m tools.bench $(ARGS)

fresh: ## `make test` inside a freshly debootstrapped Debian
	tools/fresh

clean: ## remove what was built
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage
