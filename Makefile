# `make demo` and `make test` install what they need first (apt and PyPI); see tools/bootstrap.

SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
CORES := p2pvpn/core/*,p2pvpn/crypto/*,p2pvpn/identity/*,p2pvpn/dht/*,p2pvpn/punch/*,p2pvpn/ike/*,p2pvpn/esp/*,p2pvpn/relay/*

.PHONY: help demo test check lint unit coverage bench bench-ike fuzz schedules sim nat-grid hard-nat hard-nat-demo upgrades bad-input flood planes tcp-speed idle-cost fresh clean
help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(VENV)/.demo: pyproject.toml tools/bootstrap
	@tools/bootstrap demo

$(VENV)/.test: pyproject.toml tools/bootstrap
	@tools/bootstrap test

demo: $(VENV)/.demo ## a small Internet of namespaces, live: ARGS="--nat-a symmetric --json out.json"
	@$(BIN)/p2pvpn demo $(ARGS)

test: $(VENV)/.test lint ## everything: lint, types, layers, unit, simulation, namespaces, strangers
	tools/run-tests $(ARGS)

check: $(VENV)/.test lint unit ## the quick part

lint: $(VENV)/.test
	$(BIN)/ruff check p2pvpn tests tools
	$(BIN)/ruff format --check p2pvpn tests tools
	$(BIN)/mypy
	$(BIN)/lint-imports

unit: $(VENV)/.test
	$(BIN)/pytest -m "not netns and not stranger and not slow" $(ARGS)

bench: $(VENV)/.test ## throughput side by side with peers
	$(BIN)/python -m tools.bench $(ARGS)

coverage: $(VENV)/.test ## branch coverage of the quick tests, with a floor for the protocol cores
	$(BIN)/coverage run -m pytest -q -m "not netns and not stranger"
	$(BIN)/coverage report --fail-under=94 --include='$(CORES)'

sim: $(VENV)/.test ## the simulated Internet, seeds 1-20: ARGS="--seeds 7 --churn 0.1"
	@$(BIN)/python -m tools.sim $(ARGS)

sim-life: $(VENV)/.test ## half an hour of mobility, sleep, crashes and dying hubs: ARGS="--seeds 3 --draw"
	@$(BIN)/python -m tools.sim_life $(ARGS)

nat-grid: $(VENV)/.test ## every pair of NATs: direct or relayed, how fast, at what cost: ARGS="--only 'no UDP'"
	@$(BIN)/python -m tools.nat_grid $(ARGS)

hard-nat: $(VENV)/.test ## 500 pairs of a random and a port-restricted NAT: ARGS="--hard symmetric/sequential"
	@$(BIN)/python -m tools.hard_nat $(ARGS)

hard-nat-demo: $(VENV)/.test ## the birthday method on a real kernel's fully random masquerade
	$(BIN)/pytest tests/lab/test_demo.py -k random_nat $(ARGS)

bench-ike: $(VENV)/.test ## CPU time of an IKE responder, ours and strongSwan's
	PYTHONPATH=.:tests $(BIN)/python -m tools.bench_ike $(ARGS)

fuzz: $(VENV)/.test ## mutated messages before and behind authentication: ARGS="--seconds 600"
	PYTHONPATH=.:tests $(BIN)/python -m tools.ike_fuzz $(ARGS)

schedules: $(VENV)/.test ## 10,000 seeded schedules of rekeyings and deletions at once on a bad wire
	PYTHONPATH=. $(BIN)/python -m tests.ike.schedules 10000

roaming: $(VENV)/.test ## how long traffic stands still when networks change: ARGS="--seeds 1-10 --case line"
	@$(BIN)/python -m tools.roaming $(ARGS)

upgrades: $(VENV)/.test ## twenty upgrades and fall-backs at 1,000 packets a second each way
	$(BIN)/python -m tools.upgrades $(ARGS)

bad-input: $(VENV)/.test ## 200 kills at random moments, floods at 50,000 packets a second beside an honest ping
	P2PVPN_MOMENTS=200 P2PVPN_FLOOD_RATE=50000 P2PVPN_FLOOD_S=10 \
		$(BIN)/pytest tests/lab/test_bad_ends.py tests/lab/test_bad_floods.py $(ARGS)

flood: $(VENV)/.test ## 20,000 spoofed IKE_SA_INITs a second at a hub, and three honest ones: needs an idle machine
	P2PVPN_FLOOD_S=10 $(BIN)/pytest -s tests/lab/test_bad_floods.py -k first_messages $(ARGS)

tcp-speed: $(VENV)/.test ## relayed throughput, over UDP and where UDP is blocked
	$(BIN)/python -m tools.tcp_speed $(ARGS)

idle-cost: $(VENV)/.test ## packets and CPU time of a peer that is idle: ARGS="--minutes 10 --json out.json"
	@$(BIN)/python -m tools.idle_cost $(ARGS)

planes: $(VENV)/.test ## the kernel plane in User-Mode Linux: the shared suite, strongSwan, kill -9, a network, the demo
	$(BIN)/pytest tests/planes/test_in_uml.py tests/planes/test_network.py $(ARGS)

fresh: ## `make test` inside a freshly debootstrapped Debian
	tools/fresh $(ARGS)

clean: ## remove what was built
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage
