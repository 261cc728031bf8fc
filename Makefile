# make demo: set up and run the main job.  make test: set up and run the tests.  make help: all.

PYTHON ?= python3
VENV := .venv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
WORKERS ?= 2
PYTEST := $(VENV)/bin/python -m pytest -q -n $(WORKERS) --dist worksteal

# Nothing below calls out; Flower's and Ray's telemetry is off. Ray would run its workers at nice 15.
OFFLINE := RAY_worker_niceness=0 FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1 HF_HUB_OFFLINE=1 \
	HF_HUB_DISABLE_TELEMETRY=1 RAY_USAGE_STATS_ENABLED=0 TOKENIZERS_PARALLELISM=false

# Else glibc hands the memory of a large batch back after every step, and asks for it again.
KEEP_MEMORY := MALLOC_MMAP_THRESHOLD_=1000000000 MALLOC_TRIM_THRESHOLD_=2000000000

.PHONY: help install demo test test-slow test-nightly lint bench clean
.DEFAULT_GOAL := help

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 22

install: $(VENV)/.dev ## .venv with fedtune, its extras and the development tools

demo: $(VENV)/.base ## federated LoRA beside centralized and local training, with a report
	$(OFFLINE) $(KEEP_MEMORY) OMP_NUM_THREADS=1 $(VENV)/bin/python recipes/lora_sft.py \
	--config recipes/demo.yaml

test: $(VENV)/.dev ## the tests, without the slow ones
	$(OFFLINE) OMP_NUM_THREADS=1 $(PYTEST) -m "not slow and not nightly"

test-slow: $(VENV)/.dev ## the slow tests: deployments, kills, long runs
	$(OFFLINE) OMP_NUM_THREADS=1 $(PYTEST) --dist loadfile -m "slow and not nightly"

test-nightly: $(VENV)/.dev ## all tests, and those that take hours: busy hosts, every benchmark
	$(OFFLINE) OMP_NUM_THREADS=1 $(PYTEST) --dist loadfile

lint: $(VENV)/.dev ## ruff and mypy
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy

bench: $(VENV)/.dev ## the benchmarks, one table each
	@for file in benchmarks/*.py; do echo "== $$file"; \
	$(OFFLINE) OMP_NUM_THREADS=1 $(VENV)/bin/python "$$file" || exit 1; done

clean: ## remove .venv and caches; outputs/ stays
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps hold what is installed; make repeats it when a version list changes.
$(VENV)/.base: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	{ echo "error: $(PYTHON) is older than 3.11. Run: make PYTHON=python3.11"; exit 2; }
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@if [ -n "$(TORCH_INDEX_URL)" ]; then \
	$(PIP) install -qq -c constraints.txt --index-url "$(TORCH_INDEX_URL)" torch==$(TORCH); \
	elif ! $(PIP) install -qq -c constraints.txt "torch==$(TORCH)+cpu" 2>/dev/null; then \
	echo "no torch==$(TORCH)+cpu in the package index: plain torch follows, some GB with CUDA" \
	"(another build: TORCH_INDEX_URL)"; \
	$(PIP) install -qq -c constraints.txt torch==$(TORCH); fi
	$(PIP) install -qq -c constraints.txt -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.base
	$(PIP) install -qq -c constraints.txt -e ".[dev]"
	@touch $@
