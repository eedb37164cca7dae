# make run     set up, then run the pipeline of params.yaml (the scanned digits, unless changed)
# make test    set up, then run the tests: a few minutes on two cores
# make test-slow
#              set up, then run the tests that run whole pipelines or kill processes: as long again
# make repro   set up, then bring everything up to date with `dvc repro`
# make lint    set up, then check style and types
# make docs    set up, then write docs/cli.md and build the documentation in site/

PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup run test test-slow repro lint docs

run: setup
	@$(BIN)/opnp run

test: setup
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

test-slow: setup
	$(BIN)/python -m pytest -m slow --numprocesses 2 --dist loadfile

repro: setup
	@test -d data || $(BIN)/opnp stage fetch
	PATH="$(CURDIR)/$(BIN):$$PATH" dvc repro

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: setup
	$(BIN)/python docs/build.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

setup: .venv/ready

.venv/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "OPNP needs Python 3.11 or later: name one with make PYTHON=…")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$$(sed -n 's/^uv==//p' constraints.txt)
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[dev]'
	@touch $@
