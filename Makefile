# make demo    the whole job on real data, in under four minutes
# make test    linters, types and tests, all but the long ones
# make chaos   5,000 seeded schedules, and the fault tests at full size: about half an hour
# make bench   this client against the same model alone
# make compare this client and what could be run instead: Dask, Ray, LitServe, Triton, plain processes, TorchServe
# make gpu-check  on a machine with a GPU: the handler's core against the model alone, overlap, bits over restarts
# All of them make the environment first, in .venv; nothing else on the machine is changed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test chaos lint bench compare gpu-check clean
.DELETE_ON_ERROR:

demo: $(VENV)/.serve
	$(BIN)/python -m batch_client.demo --dir .demo

test: lint
	$(BIN)/python -m pytest

chaos: $(VENV)/.dev
	BATCH_CLIENT_SEEDS=0:5000 $(BIN)/python -m pytest tests/simulation
	$(BIN)/python -m pytest -m chaos

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/end_to_end.py

gpu-check: $(VENV)/.dev
	$(BIN)/python benchmarks/gpu_check.py

compare: $(VENV)/.dev
	$(BIN)/python benchmarks/compare.py --environments $(VENV)/benchmarks

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "batch-client needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.serve: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "making the environment in $(VENV) (torch and TorchServe: about a minute with a warm cache)"
	$(PIP) --editable '.[serve,demo]'
	@touch $@

$(VENV)/.dev: $(VENV)/.serve
	$(PIP) --editable '.[serve,demo,aws,onnx,dev]'
	@touch $@

clean:
	rm -rf $(VENV) .demo dist
