# The one list of tasks, for people and hooks. `make install` once, in a virtual environment that is active.

.DEFAULT_GOAL := help
.PHONY: help install format lint types contract check test test-slow smoke demo clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

install:  ## the package in place, with all development tools
	pip install --quiet --editable '.[dev]'

format:  ## sort imports, mend what can be mended, lay out the code
	ruff check --fix --quiet .
	ruff format --quiet .

lint:  ## undefined names, docstrings, common slips, layout
	ruff check .
	ruff format --check .

types:  ## the type checker over the package
	mypy

contract:  ## imports point downwards
	lint-imports

check: lint types contract  ## all that needs no run

test:  ## the quick tests
	pytest

test-slow:  ## minutes of training, full fault counts
	pytest -m slow

smoke:  ## one step of each method on the CPU
	@set -e; out=$$(mktemp -d); trap 'rm -rf "$$out"' EXIT; for recipe in swav_cpu jigclu_cpu mejigclu_cpu smog_cpu coke_cpu; do \
		tessella pretrain $$recipe --data digits --out "$$out/$$recipe" --max-steps 1 --device cpu; \
	done

demo:  ## what pretraining buys, in minutes
	tessella demo

clean:  ## caches and builds; runs stay
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
