# Two commands for a newcomer: `make run` and `make test`. Each makes .venv if it must and does its work.
VENV := .venv
BIN := $(VENV)/bin

.PHONY: run test test-all lint clean
.DEFAULT_GOAL := test

$(VENV)/.installed: requirements.lock pyproject.toml deploy/make_env.sh
	bash deploy/make_env.sh $(VENV)
	touch $@

run: $(VENV)/.installed  ## a real document through two ranks of a private local Ray, questions on it
	$(BIN)/python -m ringspan.deploy.jobs.demo

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint  ## lint, types, tests
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 --dist loadfile --no-loadscope-reorder -m "not slow"

test-all: lint  ## with the long ones: every combination with the real model
	$(BIN)/pytest -q

clean:
	rm -rf $(VENV) build dist .cache
