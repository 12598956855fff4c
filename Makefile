# `make demo` and `make test` need Python and git, nothing else: they make the environment themselves.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
SEED ?= 0
DEMO_DIR ?= outputs/demo
BIN := $(VENV)/bin

.PHONY: demo test test-slow quality style clean

demo: $(VENV)/.ready  ## PPO on the embedded phantoms pipeline; writes $(DEMO_DIR)/report.md
	$(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no --quiet \
		examples/train_ppo.py --seed $(SEED) --output_dir $(DEMO_DIR)

test: $(VENV)/.ready  ## all tests but the slow ones
	$(BIN)/python -m pytest

test-slow: $(VENV)/.ready
	$(BIN)/python -m pytest -m slow

quality: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

style: $(VENV)/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/.ready: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test,dev,demo,browser]'
	touch $@

clean:  ## outputs stay
	rm -rf $(VENV) build *.egg-info
