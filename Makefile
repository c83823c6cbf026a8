# The verbs of this project. Each makes the environment first when it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-fast fuzz lint type check docs bench mutation clean

help:           ## list the verbs
	@grep -E '^[a-z-]+: .*##|^[a-z-]+:  *##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

$(READY): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --progress-bar off -e '.[dev]'
	touch $@

setup: $(READY) ## make the environment in .venv (about 6 GB, some minutes)

demo: $(READY) ## compress the embedded MNIST network and verify the result
	$(BIN)/compress run pipelines/quickstart.yaml

test: $(READY)  ## run the tests, two files at a time
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --timeout-method thread

test-fast: $(READY) ## run the tests without pipelines, trainings and measurements
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --timeout-method thread -m "not slow"

fuzz: $(READY)  ## damage 500 ONNX files and 500 images, and see that none of them ends in a bug
	$(BIN)/python tests/fuzz/onnx_files.py --count 500
	$(BIN)/python tests/fuzz/images.py --count 500

lint: $(READY)  ## ruff and the import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

type: $(READY)  ## mypy
	$(BIN)/mypy

check: lint type ## lint and type

docs: $(READY)  ## build the documentation in site/; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(READY) ## measure the README's result table on a quiet machine; WEIGHTS=resnet56_latency=FILE
	$(BIN)/python benchmarks/results.py $(addprefix --weights ,$(WEIGHTS)) --write README.md

mutation: $(READY) ## change the code in small ways and count what the tests notice, by package (hours; goes on where it was)
	$(BIN)/python benchmarks/mutation.py

clean:          ## remove the environment and what runs have left
	rm -rf $(VENV) runs build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
