# Two commands for a newcomer: `make demo` and `make test`. Both create the environment first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
INSTALLED_DEV := $(VENV)/.installed-dev
VLLM := .venv-vllm
TRANSFORMERS_4 := .transformers4
CLIENTS := .venv-clients
# A machine without a GPU is better served by a CPU build of torch; TORCH_INDEX names a package index to take it from.
TORCH_INDEX ?=

.PHONY: demo test test-full test-vllm lint docs bench clean

demo: $(INSTALLED)
	$(BIN)/corral run recipes/quickstart.toml

# Two tests at a time, each on one core: most tests start processes and wait, so threads within one test would not help.
TESTS := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

test: $(INSTALLED_DEV)
	$(TESTS) -m "not full"

test-full: $(INSTALLED_DEV) $(TRANSFORMERS_4)/.installed $(CLIENTS)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[full]"
	$(TESTS)

# transformers 4, which many programs still use, for tests/consumers: only the packages that differ, which shadow those of .venv.
$(TRANSFORMERS_4)/.installed: constraints-transformers4.txt $(INSTALLED_DEV)
	rm -rf $(TRANSFORMERS_4)
	$(BIN)/python -m pip install --quiet --no-deps --target $(TRANSFORMERS_4) --requirement constraints-transformers4.txt
	touch $@

# Clients that people use with the server, for tests/clients, and to record what they send (`python -m tests.clients.record`). They
# are as a user installs them: without corral, and in the versions that their own requirements allow.
$(CLIENTS)/.installed: constraints-clients.txt
	rm -rf $(CLIENTS)
	$(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/python -m pip install --quiet --no-deps --requirement constraints-clients.txt
	touch $@

# vLLM pins other versions than the rest, so its tests run in an environment of their own, with its CPU build. It is installed
# without its requirements (--no-deps): constraints-vllm.txt lists what text generation needs, without torchvision and others.
test-vllm: $(VLLM)/.installed
	$(VLLM)/bin/python -m pytest tests/engines/test_vllm.py tests/consumers/test_vllm.py

$(VLLM)/.installed: pyproject.toml constraints-vllm.txt
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --constraint constraints-vllm.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(VLLM)/bin/python -m pip install --quiet --no-deps --requirement constraints-vllm.txt --editable .
	touch $@

lint: $(INSTALLED_DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

docs: $(INSTALLED)
	$(BIN)/python -m corral.recipe.reference > docs/recipe.md

bench: $(INSTALLED_DEV)
	$(BIN)/python benchmarks/rouge.py --json benchmarks/results/rouge.json
	$(BIN)/python benchmarks/vote.py --json benchmarks/results/vote.json
	$(BIN)/python benchmarks/train_cpu.py --json benchmarks/results/train_cpu.json
	$(BIN)/python benchmarks/align_cpu.py --json benchmarks/results/align_cpu.json
	$(BIN)/python benchmarks/generate_cpu.py --json benchmarks/results/generate_cpu.json
	$(BIN)/python benchmarks/prepare.py --json benchmarks/results/prepare.json
	$(BIN)/python benchmarks/batch.py --json benchmarks/results/batch.json
	$(BIN)/python benchmarks/serve.py --json benchmarks/results/serve.json
	$(BIN)/python benchmarks/findings.py --run runs/quickstart
	$(BIN)/python benchmarks/alignment.py

# What a user needs: `make demo` installs nothing else.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit(0 if sys.version_info >= (3, 11) else 'corral needs Python 3.11 or newer; try: make PYTHON=python3.11 ...')"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[openvino,quant]"
	touch $@

# What developers need besides: the test runner, linters, and the peers that tests compare with.
$(INSTALLED_DEV): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev,openvino,quant]"
	touch $@

clean:
	rm -rf $(VENV) $(VLLM) $(TRANSFORMERS_4) $(CLIENTS) build dist *.egg-info
