# Everything a developer types; `make help` lists it. A fresh clone needs only Python 3.11 to 3.13 and this file.
#
#   make test PYTHON=python3.12            choose the interpreter of a new .venv
#   make run ARGS="trainer.epochs=1"       more words for `launch`
#   make test PYTEST_ARGS="-k imports -x"  more words for pytest
#   make azure-acceptance ARGS="cluster.size=Standard_NC4as_T4_v3 cluster.budget_usd=5"

SHELL := /bin/bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SUPPORTED := (3, 11) <= sys.version_info[:2] < (3, 14)

# Four processes share the files of tests, also on two cores: much of the suite waits for other processes.
PARALLEL := -n 4 --dist loadfile --no-loadscope-reorder

# Folders with Python in them, so that a new one is linted from its first file on.
SOURCES := $(sort $(patsubst %/,%,$(dir $(wildcard launcher/*.py models/*.py conf/*.py tests/*.py benchmarks/*.py tools/*.py))))

.PHONY: help run test slow compat gpu-test azure-acceptance lint format lock clean venv-fits

help: ## list what make can do
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

run: $(VENV)/.installed ## set up .venv and train the default job: two workers, 5,000 real digits
	$(BIN)/launch experiment=mnist $(ARGS)
	@echo
	@echo "Next:"
	@echo "  see its loss         $(BIN)/launch board"
	@echo "  list the runs        $(BIN)/launch runs"
	@echo "  change a setting     $(BIN)/launch experiment=mnist trainer.epochs=2 optimizer.lr=3e-4"
	@echo "  without typing .venv: source $(BIN)/activate"

test: $(VENV)/.installed-test lint ## set up .venv with the test tools, lint, and run the whole suite
	$(BIN)/python -m pytest $(PARALLEL) $(PYTEST_ARGS)
	@echo
	@echo "All of it passed. Next:"
	@echo "  train the default job      make run"
	@echo "  the tests of minutes       make slow"
	@echo "  change something           CONTRIBUTING.md"

slow: $(VENV)/.installed-test ## run the tests that take minutes, and record their result in docs/slow-tests.md
	$(BIN)/python -m pytest -m slow --record docs/slow-tests.md $(PYTEST_ARGS)

compat: $(VENV)/.created ## run the smoke suite on the supported corners of Ray and torch, write docs/compatibility.md
	$(BIN)/python tools/compat.py $(ARGS)

# TF32 rounds the inputs of products; without it the tolerances of float32 hold on a GPU too.
gpu-test: $(VENV)/.installed-test ## run the tests of the engine that one GPU can run, on the GPU
	NVIDIA_TF32_OVERRIDE=0 $(BIN)/python -m pytest -m "gpu and not slow" --device cuda $(PYTEST_ARGS)

# Costs money: prints how much and asks, before it rents anything (docs/azure-acceptance.md).
azure-acceptance: $(VENV)/.installed-test ## rent two GPU nodes on Azure for minutes, check them, remove them, write a report
	$(BIN)/python -m benchmarks.azure_acceptance $(ARGS)

lint: $(VENV)/.installed-test ## check style, format, types and spelling
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy $(SOURCES)
	$(BIN)/codespell $(SOURCES) docs *.md

format: $(VENV)/.installed-test ## put the code in format and fix what ruff can fix
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

lock: $(VENV)/.created ## resolve the newest allowed versions again, write constraints.txt and locks/
	$(PIP) install --quiet uv
	$(BIN)/python tools/lock.py $(if $(TORCH),--torch $(TORCH))

clean: ## remove .venv and every cache, keep runs/
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +

# --- the virtual environment -------------------------------------------------------------------------------------
# The stamps lie inside .venv, so that they vanish with it. They are newer than what was installed from: an edited
# pyproject.toml or constraints.txt installs again, nothing else does.

$(VENV)/.created: | venv-fits
	@set -eu; found=; seen=; \
	for candidate in $(or $(PYTHON),python3 python3.13 python3.12 python3.11); do \
	    version=$$("$$candidate" -c 'import sys; print(sys.version.split()[0])' 2>/dev/null) || continue; \
	    seen="$$seen $$candidate is $$version;"; \
	    "$$candidate" -c 'import sys, ensurepip, venv; sys.exit(not $(SUPPORTED))' 2>/dev/null || continue; \
	    found=$$candidate; break; \
	done; \
	if [ -z "$$found" ]; then \
	    echo "make: Python 3.11, 3.12 or 3.13 with its venv module is needed, and none of" \
	        "$(or $(PYTHON),python3 python3.13 python3.12 python3.11) is one (found:$${seen:- nothing that runs})." \
	        "Install one (on Debian and Ubuntu: apt-get install python3 python3-venv)," \
	        "or name one: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)" >&2; exit 2; \
	fi; \
	echo "Creating $(VENV) with $$found ($$("$$found" --version))"; \
	"$$found" -m venv $(VENV); \
	touch $@

# A .venv that no longer runs (its Python was removed) is said to be so, and so is one that PYTHON=… contradicts.
venv-fits:
	@set -eu; [ -e $(VENV)/.created ] || exit 0; \
	version=$$($(BIN)/python -c 'import sys; print(*sys.version_info[:2], sep=".") if $(SUPPORTED) else sys.exit(1)') || \
	    { echo "make: the Python of $(VENV) does not run or is not 3.11 to 3.13; 'make clean' removes it, then try again" >&2; exit 2; }; \
	[ -z "$(PYTHON)" ] || [ "$$("$(PYTHON)" -c 'import sys; print(*sys.version_info[:2], sep=".")')" = "$$version" ] || \
	    { echo "make: PYTHON=$(PYTHON), but $(VENV) holds Python $$version; 'make clean' removes it, then try again" >&2; exit 2; }

$(VENV)/.installed: pyproject.toml constraints.txt $(VENV)/.created | venv-fits
	$(PIP) install --constraint constraints.txt --editable '.[examples]'
	@touch $@

$(VENV)/.installed-test: pyproject.toml constraints.txt $(VENV)/.created | venv-fits
	$(PIP) install --constraint constraints.txt --editable '.[azure,examples,test,bench]'
	@touch $(VENV)/.installed $@
