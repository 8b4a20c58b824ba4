# `make` alone lists the targets. Everything is installed into .venv, once per change of the lock files.

PYTHON ?= python3
TEST_WORKERS ?= 2
UV_VERSION := 0.13.9
TORCH := torch==2.13.0

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
# --no-compile halves the time: Python compiles what it imports, when it does.
PIP_INSTALL := $(PIP) install --root-user-action=ignore --no-compile
LOCKED := --no-deps --require-hashes --requirement
COMPILE = .cache/lock/bin/uv pip compile pyproject.toml --universal --python-version 3.11 --generate-hashes \
	--no-emit-package torch --custom-compile-command "make lock" --quiet $(UPGRADE)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-fast test-trackers torture docs lint format golden bench lock clean distclean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: $(VENV)/.runtime ## install, write the sample data, train on the embedded base model, evaluate, calibrate, export
	@if ! [ -f data/sample/train.jsonl ] || ! [ -f data/sample/val.jsonl ] || ! [ -f data/sample/test.jsonl ]; then \
		$(BIN)/ctxtrain sample data/sample; \
	fi
	@rm -rf runs/demo
	@$(BIN)/ctxtrain train configs/demo.yaml data.test=data/sample/test.jsonl

# One thread per worker: the workers share the cores, and sums keep one order. Nothing is fetched from a hub.
test: export OMP_NUM_THREADS = 1
test: export TOKENIZERS_PARALLELISM = false
test: export HF_HUB_OFFLINE = 1
test: lint ## install the development tools; linter, formatter, type check, all tests
	$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

test-fast: export OMP_NUM_THREADS = 1
test-fast: export TOKENIZERS_PARALLELISM = false
test-fast: export HF_HUB_OFFLINE = 1
test-fast: $(VENV)/.dev ## linter, and the tests that need neither a whole run nor a process of their own
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder -m "not slow" $(ARGS)

test-trackers: export OMP_NUM_THREADS = 1
test-trackers: export TOKENIZERS_PARALLELISM = false
test-trackers: export HF_HUB_OFFLINE = 1
test-trackers: $(VENV)/.trackers ## install MLflow and W&B too; test the trackers against the real ones
	$(BIN)/python -m pytest tests/tracking/test_tracking.py --torture $(ARGS)

torture: export OMP_NUM_THREADS = 1
torture: export TOKENIZERS_PARALLELISM = false
torture: export HF_HUB_OFFLINE = 1
torture: $(VENV)/.dev ## the fault tests in full; their figures go into docs/reliability.md
	@rm -rf .cache/figures
	$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist load --torture -m promise $(ARGS)
	$(BIN)/python -m tests.reliability.page

docs: $(VENV)/.dev ## write docs/config.md and the schemas of a config, a summary and runs.json anew from the code
	$(BIN)/python -m tests.config_page

lint: $(VENV)/.dev ## linter, formatter and type check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev ## rewrite the code: formatter, then what the linter can repair
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

golden: export OMP_NUM_THREADS = 1
golden: $(VENV)/.dev ## write tests/golden/losses.txt anew, after a change that means to move numbers
	$(BIN)/python -m pytest tests/test_train.py -k golden --rewrite-golden

bench: $(VENV)/.bench ## run every benchmarks/bench_*.py
	@for script in $(sort $(wildcard benchmarks/bench_*.py)); do \
		echo "== $$script"; \
		$(BIN)/python "$$script" || exit 1; \
	done

lock: .cache/lock/bin/uv ## write requirements/*.txt from pyproject.toml (UPGRADE=--upgrade takes newer releases)
	$(COMPILE) --output-file requirements/runtime.txt
	$(COMPILE) --extra dev --constraints requirements/runtime.txt --output-file requirements/dev.txt
	$(COMPILE) --extra mlflow --extra wandb --constraints requirements/dev.txt --output-file requirements/trackers.txt
	$(COMPILE) --extra bench --constraints requirements/dev.txt --constraints requirements/trackers.txt \
		--output-file requirements/bench.txt

clean: ## remove caches, build products, the sample data and the demo run
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis runs/demo data/sample
	find ctxtrain ml tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

distclean: clean ## clean, and remove .venv and the lock tool
	rm -rf $(VENV) .cache

# A stamp is newer than its environment's lock file only after every step went through.
$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "ctxtrain needs Python 3.11 or newer; $(PYTHON) gives: $$($(PYTHON) --version 2>&1 | head -n 1)." \
			"Name another interpreter, as in: make demo PYTHON=python3.12" >&2; \
		exit 1; \
	}
	@echo "Making $(VENV)"
	@$(PYTHON) -m venv --clear $(VENV) || { rm -rf $(VENV); exit 1; }

# The lock holds what torch itself requires. So the torch line adds torch alone, or torch with the accelerator
# libraries that belong to its build, and moves nothing that the lock has set.
$(VENV)/.runtime: requirements/runtime.txt pyproject.toml $(VENV)/bin/python
	@echo "Installing the locked dependencies and $(TORCH); the first time this takes a few minutes"
	@$(PIP_INSTALL) $(LOCKED) requirements/runtime.txt
	@$(PIP_INSTALL) $(TORCH)
	@$(PIP_INSTALL) --no-deps --no-build-isolation --editable .
	@$(PIP) check
	@touch $@

$(VENV)/.dev: requirements/dev.txt $(VENV)/.runtime
	@echo "Installing the locked development tools"
	@$(PIP_INSTALL) $(LOCKED) requirements/dev.txt
	@$(PIP) check
	@touch $@

$(VENV)/.trackers: requirements/trackers.txt $(VENV)/.dev
	@echo "Installing MLflow and Weights & Biases"
	@$(PIP_INSTALL) $(LOCKED) requirements/trackers.txt
	@$(PIP) check
	@touch $@

$(VENV)/.bench: requirements/bench.txt $(VENV)/.runtime
	@echo "Installing what the benchmarks compare with"
	@$(PIP_INSTALL) $(LOCKED) requirements/bench.txt
	@$(PIP) check
	@touch $@

.cache/lock/bin/uv: Makefile
	@$(PYTHON) -m venv --clear .cache/lock
	@.cache/lock/bin/python -m pip --disable-pip-version-check --quiet install uv==$(UV_VERSION)
	@touch $@
