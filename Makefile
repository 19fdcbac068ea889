# `make` alone prints this help. PYTHON may name another interpreter: make test PYTHON=python3.12
PYTHON ?= python

.DEFAULT_GOAL := help
.PHONY: help install format lint types test test-slow test-library test-oldest quickstart starters site check

help:  ## print this help
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install:  ## install the package with what training and development need, in the tested versions
	$(PYTHON) -m pip install -c constraints.txt -e ".[train,dev]"

format:  ## rewrite the sources in the house format
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

lint:  ## report what ruff finds
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

types:  ## check the types of modeling_memory and training
	$(PYTHON) -m mypy

test:  ## run the tests and the doctests (minutes on two cores)
	$(PYTHON) -m pytest

test-slow:  ## run the tests that take minutes each
	$(PYTHON) -m pytest -m slow

test-library:  ## run transformers' own tests of models, configs and processors on ours (fetches its source distribution)
	TRANSFORMERS_TESTS=$$(PYTHON=$(PYTHON) .ci/transformers_tests) $(PYTHON) -m pytest -m hf_common -n 2 tests/hf_common

test-oldest:  ## run the package's tests on the oldest supported torch and transformers (downloads some gigabytes)
	PYTHON=$(PYTHON) bash .ci/oldest

quickstart:  ## train, evaluate and export the quickstart model (about 20 minutes on two cores)
	$(PYTHON) -m training.run configuration/recipes/quickstart.yaml

starters:  ## write the cards and the links to code in model_cards/ anew, from the records there
	for folder in model_cards/starter-*; do $(PYTHON) -m training.publish $$folder --refresh || exit 1; done

site:  ## build the documentation as a site, in site/
	$(PYTHON) -m mkdocs build --strict

check: lint types test  ## what a change must pass
