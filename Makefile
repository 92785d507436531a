# Every target has its help text beside it; `make` prints them.
PRESET ?= quick
WORLD ?= portraits
SEED ?= 0
PYTHON ?=
export PYTHON

unknown := $(filter-out PRESET=% WORLD=% SEED=% PYTHON=%,$(MAKEOVERRIDES))
$(if $(strip $(unknown)),$(error unknown parameter $(unknown): known are PRESET, WORLD, SEED, PYTHON))

py := .venv/bin/python
chosen = --preset "$(PRESET)" --world "$(WORLD)" --seed "$(SEED)"

.PHONY: help reproduce test env lab world report publish clean

help: ## this text
	@echo "make TARGET [PRESET=smoke|quick|full] [WORLD=portraits] [SEED=0] [PYTHON=python3.11]"
	@echo
	@awk -F ':.*## ' '/^[a-z.]+:.*## / { printf "  %-18s %s\n", $$1, $$2 }' Makefile

reproduce: env ## run the notebooks that are out of date, write results/<preset>/report.md, compare with the last commit
	$(py) -m obclip_core.notebooks $(chosen)
	$(py) -m obclip_core.report $(chosen)
	@$(py) -m obclip_core.compare $(chosen)

test: env ## lint, all tests, every notebook
	$(py) -m ruff check .
	$(py) -m pytest

env: requirements.txt ## make .venv from the pins, when they changed
	@sh tools/venv.sh

lab: env ## open the notebooks in Jupyter
	$(py) -m jupyterlab notebooks

world: env ## train what is missing of the embedded world (hours), and measure it
	$(py) data/portraits/train.py
	$(py) data/portraits/evaluate.py

report: env ## write report.md and the numbers of README.md from the results that are there
	$(py) -m obclip_core.report $(chosen) --readme README.md

publish: env ## store the outputs of the last run in notebooks/, for readers on the web
	$(py) -m obclip_core.notebooks $(chosen) --publish

clean: ## forget what was computed and is not committed (keeps .venv)
	rm -rf results/smoke* results/*/.[a-z]* results/*/notebooks .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

requirements.txt: environment.yml ## the same pins for pip
	@{ echo "# Made from environment.yml by: make requirements.txt"; \
	   sed -n 's/^      - \([A-Za-z0-9_.-]*==[^ ]*\).*/\1/p' environment.yml; } > $@.new && mv $@.new $@
