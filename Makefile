# SPDX-License-Identifier: Apache-2.0
.DEFAULT_GOAL := help
.PHONY: help demo test test-fast quality style clean

PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable
# Without the number of threads `accelerate launch` uses one core of a CPU; without the other flags it warns at length.
LAUNCH := $(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
	--num_cpu_threads_per_process $(shell getconf _NPROCESSORS_ONLN)

help:  ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

.venv/.train: setup.cfg setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(INSTALL) ".[train]"
	@touch $@

.venv/.test: .venv/.train
	$(INSTALL) ".[train,test,quality]"
	@touch $@

demo: .venv/.train  ## condense a small DiT into one learngene and build models of many sizes from it
	$(LAUNCH) examples/train_wave.py --output_dir outputs/wave --resume_from_checkpoint latest

test: quality  ## check the style and the types, then run every test
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile

test-fast: .venv/.test  ## run the tests that take seconds
	$(BIN)/python -m pytest --numprocesses auto -m "not slow"

quality: .venv/.test  ## check the style and the types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

style: .venv/.test  ## mend the style
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:  ## remove builds and caches (the environment and outputs/ stay)
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path "./.venv/*" -prune -exec rm -rf {} +
