# ovis-batch: every command that README names. `make help` lists them.

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
TORCH := $(shell sed -n 's/^\(torch==[0-9.]*\).*/\1/p' constraints.txt)
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu

.DEFAULT_GOAL := help
.PHONY: help demo up test chaos client check check-docker bench bench-engine screenshot lock clean

help: ## List these commands
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "  make %-12s %s\n", $$1, $$2}'

demo: $(INSTALLED) ## Draw the shipped catalogue of banners on this machine, into demo-output/
	@$(BIN)/ovis-batch demo

up: $(INSTALLED) ## Run a whole farm on this machine until Ctrl-C
	@$(BIN)/ovis-batch up

test: $(INSTALLED) ## Run the whole test suite, with real servers (two halves side by side)
	$(BIN)/python tests/two_halves.py

chaos: $(INSTALLED) ## Kill, freeze and cut off everything a thousand times, and count what was lost (25 minutes)
	$(BIN)/python -m tests.chaos --long

client: $(INSTALLED) ## Write the client that waits from the one that is awaited
	$(BIN)/python tests/sync_client.py

check: $(INSTALLED) check-docker ## Lint, format, types, import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check-docker:
	@PATH="$(CURDIR)/$(BIN):$$PATH" sh docker/check.sh

bench: $(INSTALLED) ## Measure jobs a second and rows a second on this machine
	$(BIN)/python tests/benchmarks/throughput.py

bench-engine: $(INSTALLED) ## Measure the engine beside diffusers on this machine (ten minutes; nothing else should run)
	$(BIN)/python tests/benchmarks/engine.py

screenshot: $(INSTALLED) ## Take README's picture of the page of the farm that `make up` runs (needs chromium)
	$(BIN)/python tests/acceptance/screenshot.py http://127.0.0.1:8000/ producer/dashboard/page.png

lock: $(INSTALLED) ## Write constraints.txt from what is installed
	@{ sed -n '/^#/p' constraints.txt; $(BIN)/pip freeze --exclude-editable | sed 's/^\(torch==[0-9.]*\)+.*/\1/'; } > constraints.new
	@mv constraints.new constraints.txt

clean: ## Remove the environment, the farm's data and the demo's output
	rm -rf $(VENV) .ovis demo-output *.egg-info

$(INSTALLED): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or later found: install one, or set PYTHON=/path/to/it"; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		v=$$($(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])'); \
		echo "$(PYTHON) cannot make environments: run  sudo apt-get install python$$v-venv"; exit 2; }
	@echo "Creating the environment in $(VENV) (once; a few minutes)"
	@$(PYTHON) -m venv $(VENV)
	@if [ "$$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null 2>&1; then \
		echo "No GPU here: fetching torch's CPU build (some 200 MB; the whole environment takes 2 GB)"; \
		$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --retries 0 --timeout 20 \
			--index-url $(TORCH_CPU_INDEX) $(TORCH) 2>/dev/null \
		|| echo "$(TORCH_CPU_INDEX) does not answer: taking torch from pip's own source, maybe several GB"; \
	fi
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[worker,local,dev]'
	@touch $@
