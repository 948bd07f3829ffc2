# Set-up, demonstration and tests of neighborlm. `make` alone lists the targets.
#
# Variables, given as `make setup FAISS=cpu`:
#   PYTHON        the Python, 3.11 or newer, that .venv is made with
#   FAISS         cpu or gpu: which faiss to install; if not given, the one that is installed, else
#                 gpu where an NVIDIA driver answers on 64-bit x86 Linux (the only platform that
#                 package is built for), else cpu
#   HF            1, as by default, for what models of Hugging Face need (about 700 MB) besides; 0 to
#                 leave it out: then a flag that needs it says so, and tests of it are skipped
#   PYTEST_ARGS   what pytest gets, for example PYTEST_ARGS="-k decoder"
#
# Which build of torch comes, for CUDA or for the CPU alone, is pip's choice: set its own options
# (PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS) to change it.

PYTHON ?= python3
HF ?= 1
PYTEST_ARGS ?= -n 2 --dist loadfile --no-loadscope-reorder

BIN := .venv/bin
# The kind of faiss is in the stamp's name, so that asking for the other kind installs it.
STAMP := .venv/.installed-
FAISS := $(or $(FAISS),$(patsubst $(STAMP)%,%,$(firstword $(wildcard $(STAMP)*))),$(shell \
	test "$$(uname -sm)" = "Linux x86_64" && nvidia-smi >/dev/null 2>&1 && echo gpu || echo cpu))
ifeq ($(filter cpu gpu,$(FAISS)),)
$(error FAISS is '$(FAISS)', but it must be cpu or gpu)
endif
OTHER_FAISS := $(filter-out $(FAISS),cpu gpu)
ifeq ($(filter 0 1,$(HF)),)
$(error HF is '$(HF)', but it must be 0 or 1)
endif
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt

.PHONY: help setup demo test test-gpu test-hosts lint clean distclean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

setup: $(STAMP)$(FAISS) $(if $(filter 1,$(HF)),.venv/.hf-installed) ## Make .venv and install into it what constraints.txt pins

demo: $(STAMP)$(FAISS) ## Train a small model, give it a memory and compare the perplexities
	$(BIN)/python -m benchmarks.demo

# Two pytest workers with one thread each do not fight over the cores.
test: setup ## Run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q $(PYTEST_ARGS)

test-gpu: setup ## Run the tests that need a CUDA device
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m gpu

test-hosts: setup ## Run the test of two hosts, as root on Linux
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m hosts

lint: setup ## Check style and format
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

clean: ## Remove build leftovers; leaves .venv, .cache/ (corpora), runs/ and datastores/
	rm -rf build dist ./*.egg-info .pytest_cache .ruff_cache
	find . \( -path ./.venv -o -path ./.cache -o -path ./runs -o -path ./datastores \) -prune \
		-o -type d -name __pycache__ -prune -exec rm -rf {} +

distclean: clean ## As clean, and remove .venv and .cache/ too; leaves runs/ and datastores/
	rm -rf .venv .cache

$(STAMP)$(FAISS): pyproject.toml setup.py constraints.txt
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { \
		$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
			echo "neighborlm needs Python 3.11 or newer, and '$(PYTHON)' is not one: name one with make PYTHON=..." >&2; \
			exit 1; }; \
		$(PYTHON) -m venv .venv; }
	@rm -f $(STAMP)*
	@$(BIN)/python -m pip uninstall -q -y faiss-$(OTHER_FAISS) 2>/dev/null
	@echo "Installing into .venv, with faiss for $(FAISS): this takes a few minutes the first time."
	$(PIP) -e ".[$(FAISS),test]"
	@touch $@

.venv/.hf-installed: $(STAMP)$(FAISS)
	@echo "Installing what models of Hugging Face need."
	$(PIP) -e ".[$(FAISS),hf]"
	@touch $@
