# Two commands to begin with: `make demo` and `make test`. Each sets up .venv first, and only when something changed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# A second Triton beside the environment's own, for the kernels' gate; it is only ever found through PYTHONPATH.
OTHER_TRITON := $(VENV)/other-triton/.installed
OTHER_TRITON_PIN := tests/qlora_core/aot/other-triton.txt
PYTEST_ARGS ?=
CHAOS_ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help demo serve test test-all chaos kernels gpu gpu-bench check install clean

help: ## show this
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | column -t -s '|' 2>/dev/null \
		|| sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1: \2/p' $(MAKEFILE_LIST)

demo: $(INSTALLED) ## fine-tune a small model from beginning to end, here and now (about five minutes)
	@$(BIN)/python -m operations demo

serve: $(INSTALLED) ## start the service here and stay with it (Ctrl-C stops it)
	@$(BIN)/python -m operations up

test: $(INSTALLED) $(OTHER_TRITON) ## run the tests, with a real PostgreSQL and Valkey of their own
	$(BIN)/pytest -n 2 --dist worksteal $(PYTEST_ARGS)

test-all: $(INSTALLED) $(OTHER_TRITON) ## the same with the long forms
	$(BIN)/pytest -n 2 --dist worksteal -m "not gpu" $(PYTEST_ARGS)

chaos: $(INSTALLED) ## kill and restart workers and servers under thirty jobs, and look for anything lost or done twice (some minutes)
	@$(BIN)/python -m tests.chaos $(CHAOS_ARGS)

kernels: $(INSTALLED) $(OTHER_TRITON) ## compile every GPU kernel for every GPU we serve, and examine the machine code (no GPU needed)
	@$(BIN)/python -m tests.qlora_core.aot

gpu: $(INSTALLED) ## run the tests that need an NVIDIA GPU
	@if [ -e /dev/nvidia0 ]; then \
		$(BIN)/pytest -m gpu $(PYTEST_ARGS); \
	else \
		echo "There is no NVIDIA GPU on this machine (no /dev/nvidia0): nothing to test."; \
	fi

gpu-bench: $(INSTALLED) ## check and measure on an NVIDIA GPU, into bench/results/
	@$(BIN)/python -m bench.on_gpu

check: $(INSTALLED) ## lint, formatting, types, imports, dependencies, spelling
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/deptry .
	$(BIN)/codespell

install: $(INSTALLED) ## set up .venv

clean: ## remove .venv and what tests and tools left behind
	rm -rf $(VENV) .demo .pytest_cache .ruff_cache .hypothesis .import_linter_cache *.egg-info build dist

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "Nibble needs Python 3.11 or newer, but $(PYTHON) is $$($(PYTHON) --version 2>&1 || true)."; \
		echo "Name another one: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; } >&2
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "$(PYTHON) has no venv: install it (Debian and Ubuntu: apt-get install python3-venv)."; exit 1; } >&2
	@test -x $(BIN)/pip || $(PYTHON) -m venv --clear $(VENV)
	@echo "Installing into $(VENV); the first time downloads about 1 GB (more with a GPU build of torch)."
	@began=$$(date +%s); \
		$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[server,engine,dev]' && \
		echo "Installed in $$(( $$(date +%s) - began )) s."
	@touch $@

$(OTHER_TRITON): $(OTHER_TRITON_PIN) | $(INSTALLED)
	@rm -rf $(@D)
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target $(@D) -r $(OTHER_TRITON_PIN)
	@touch $@
