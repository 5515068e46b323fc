# `make demo` and `make test` work on a fresh machine with Python and make, and set up .venv first.
# Where the package index has no CPU build of torch, and there is no GPU:
#     make demo PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu"

PYTHON ?= python3
PIP_FLAGS ?=
PIP = .venv/bin/python -m pip install --quiet $(PIP_FLAGS) --constraint constraints.txt

.PHONY: demo test lint docs clean

demo: .venv/ready
	.venv/bin/megatron-prepo demo

test: .venv/ready-dev
	.venv/bin/python -m pytest

lint: .venv/ready-dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

docs: .venv/ready
	.venv/bin/megatron-prepo reference > docs/configuration.md

clean:
	rm -rf .venv build *.egg-info

.venv/ready: setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) torch==2.13.0
	$(PIP) --editable .
	touch $@

.venv/ready-dev: .venv/ready
	$(PIP) --editable ".[dev]"
	touch $@
