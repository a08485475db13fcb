# The list of tasks. Run `make install` once, in an active virtual environment.

.DEFAULT_GOAL := help
.PHONY: help install format lint types contract check test test-slow smoke demo clean

help:  ## list the tasks
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

install:  ## install the package in editable mode, with all development tools
	pip install --quiet --editable '.[dev]'

format:  ## sort imports, fix what can be fixed automatically, format the code
	ruff check --fix --quiet .
	ruff format --quiet .

lint:  ## check undefined names, docstrings, common mistakes, format
	ruff check .
	ruff format --check .

types:  ## check the types of the package
	mypy

contract:  ## check that imports point downwards
	lint-imports

check: lint types contract  ## all checks that run no test

test:  ## run the quick tests
	pytest

test-slow:  ## run the slow tests: trainings of minutes, full fault counts
	pytest -m slow

smoke:  ## train one step of each method on the CPU
	@set -e; out=$$(mktemp -d); trap 'rm -rf "$$out"' EXIT; for recipe in swav_cpu jigclu_cpu mejigclu_cpu smog_cpu coke_cpu; do \
		tessella pretrain $$recipe --data digits --out "$$out/$$recipe" --max-steps 1 --device cpu; \
	done

demo:  ## pretrain and evaluate on embedded digits, in minutes
	tessella demo

clean:  ## remove caches and builds; runs stay
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
