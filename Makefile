# `make demo` and `make test` work on a fresh machine with Python and make, and set up .venv first.
# On Linux the package index has torch for CUDA, which is gigabytes and also works without a GPU.
# The small build for a CPU (docs/install.md):
#     make demo PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu"

PYTHON ?= python3
PIP_FLAGS ?=
WORKERS ?= 2
# Files in the order of their names: the long ones, of runs and ranks, begin, and the many short unit
# tests fill what a worker has left at the end.  By itself pytest-xdist ends with the files of few tests.
XDIST = -n $(WORKERS) --dist loadfile --no-loadscope-reorder
PIP = .venv/bin/python -m pip install --quiet $(PIP_FLAGS) --constraint constraints.txt

.PHONY: demo real test lint docs docs-site locks clean compare sglang-cpu demo-sglang test-sglang test-slurm
.PHONY: test-processors test-order test-newest newest newest-launch newest-sglang

demo: .venv/ready
	.venv/bin/megatron-prepo demo

# A pretrained model of 135M parameters is trained on tasks of reasoning-gym (docs/real_model.md).
real: .venv/ready-real
	.venv/bin/python examples/real/run.py

# With a real SGLang server and NeMo-Run, where both have been tried.  A test that is skipped, and is
# not allowed to be on such a machine, fails.
OTHERS_RUN := $(shell $(PYTHON) tests/allowed_skips.py)

test: .venv/ready-dev $(if $(OTHERS_RUN),.venv-launch/ready .venv-sglang/ready)
	.venv/bin/python -m pytest $(XDIST) --only-allowed-skips

# SGLang for a machine without a GPU (docs/sglang.md): 0.4 GB beside .venv.
sglang-cpu: .venv-sglang/ready

demo-sglang: .venv-sglang/ready
	.venv/bin/megatron-prepo demo --dir runs/demo_sglang rollout.engine=sglang \
	  servers.python=.venv-sglang/bin/python

# The numeric tests as processors with fewer instructions compute, with one thread and with two.
test-processors: .venv/ready-dev
	.venv/bin/python tools/checks/emulate_processors.py

test-sglang: .venv-sglang/ready
	.venv/bin/python -m pytest -m sglang tests/real_sglang

# The unit tests in random order, by a seed that the command shows: what one leaves behind must
# neither help nor harm another.
SEED ?= $(shell date +%s)

test-order: .venv/ready-dev
	.venv/bin/python -m pytest tests/unit -n $(WORKERS) --dist loadfile --random-order-seed=$(SEED)

# The newest releases that the index has and setup.py allows, without a pin, installed from scratch.
test-newest: newest $(if $(OTHERS_RUN),newest-launch newest-sglang)
	LAUNCH_PYTHON=$(CURDIR)/.venv-newest-launch/bin/python \
	  SGLANG_PYTHON=$(CURDIR)/.venv-newest-sglang/bin/python \
	  .venv-newest/bin/python -m pytest $(XDIST)

# On a real Slurm, as root; says which packages of Debian are missing.  A sample is part of `make test`.
# Each fault is injected TIMES times, at different steps of a run.
TIMES ?= 1

test-slurm: .venv/ready-dev $(if $(OTHERS_RUN),.venv-launch/ready .venv-sglang/ready)
	TIMES=$(TIMES) .venv/bin/python -m pytest -m slurm -rs tests/real_slurm

lint: .venv/ready-dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports

docs: .venv/ready
	.venv/bin/megatron-prepo reference > docs/configuration.md
	.venv/bin/megatron-prepo reference metrics > docs/metrics.md

# README.md and docs/ as a site (mkdocs.yml); a link or an anchor that leads nowhere is an error.
SITE ?= build/docs-site

docs-site: .venv-docs/ready
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict --site-dir $(abspath $(SITE))

# What GPU machines install (docs/install.md).  A lock keeps its versions while setup.py and the pins
# allow them: remove it first to get the newest.
LOCK = .venv/bin/python -m uv pip compile --quiet --no-config --universal --python-version 3.12 \
  --generate-hashes --no-annotate setup.py --extra tensorboard --extra wandb

locks: .venv/ready-dev
	$(LOCK) --extra sglang --constraint constraints.txt --override locks/cuda-13.overrides \
	  --output-file locks/cuda-13.txt
	$(LOCK) --constraint locks/cuda-12.8.in --output-file locks/cuda-12.8.txt

# Every run of the comparison (docs/comparison_protocol.md), then its page.  What is there is not run
# again; with RESULTS=benchmarks/results/compare that is all that is committed.
RESULTS ?= runs/compare
COMPARE = .venv/bin/megatron-prepo compare
METHODS = random,prepo,greso,dapo,mopps,foresight
ABLATIONS = ppl_only,entropy_only,reverse,rho_max,clamp,entropy_clamp,oracle
SCARCE = random,foresight,prepo,mopps,mapp,kgps,dps,greso,hive,dapo,pilot_commit,vip,rl_zvp,oracle
LARGE = random_large:selection.method=random;weighting.method=none;selection.num_selected=32;$\
selection.num_candidates=160;train.total_steps=80;eval.every=5
run = --name $(1) --dir runs/compare/$(1) --results $(RESULTS)/$(1).jsonl

compare: .venv/ready
	$(COMPARE) examples/laptop/compare.yaml --methods $(METHODS) --seeds 1-5 \
	  $(call run,story_sums)
	$(COMPARE) examples/laptop/compare.yaml --methods "$(ABLATIONS),$(LARGE)" --seeds 1-3 \
	  $(call run,story_sums)
	$(COMPARE) examples/traces/compare.yaml --methods $(METHODS) --seeds 1-5 $(call run,traces)
	$(COMPARE) examples/traces/compare.yaml --methods "oracle,$(LARGE)" --seeds 1-3 \
	  $(call run,traces)
	test -f runs/compare/story_sums_prompts/train.jsonl || \
	  .venv/bin/python examples/laptop/build.py --fresh 12800 --out runs/compare/story_sums_prompts
	$(COMPARE) examples/laptop/compare.yaml --methods $(METHODS) --seeds 1-5 \
	  $(call run,story_sums_fresh) data.train=runs/compare/story_sums_prompts/train.jsonl
	$(COMPARE) examples/lists/compare.yaml --methods $(METHODS) --seeds 1-5 $(call run,lists)
	test -f runs/compare/lists_scarce_prompts/train.jsonl || \
	  .venv/bin/python examples/lists/build.py --scarce --out runs/compare/lists_scarce_prompts
	$(COMPARE) examples/lists/compare.yaml --methods $(SCARCE) --seeds 1-3 \
	  $(call run,lists_scarce) data.train=runs/compare/lists_scarce_prompts/train.jsonl \
	  optimizer.lr=2e-4
	.venv/bin/megatron-prepo report $(RESULTS)/*.jsonl --out $(RESULTS)/comparison.html

clean:
	rm -rf .venv .venv-docs .venv-launch .venv-sglang .venv-newest* build *.egg-info

.venv/ready: setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) --editable .
	touch $@

# SGLang's own requirements are a CUDA build of torch and kernels that no CPU has: neither is used,
# so nothing is installed that SGLang asks for by itself.  torch, transformers and what else is in
# .venv is taken from there; the trainer sees nothing of SGLang's.
SGLANG_PIP = .venv-sglang/bin/python -m pip install --quiet $(PIP_FLAGS) --constraint constraints.txt
SITE_PACKAGES = -c 'import sysconfig; print(sysconfig.get_path("purelib"))'

.venv-sglang/ready: .venv/ready-dev sglang_cpu.txt
	$(PYTHON) -m venv .venv-sglang
	.venv/bin/python $(SITE_PACKAGES) > $$(.venv-sglang/bin/python $(SITE_PACKAGES))/shared.pth
	$(SGLANG_PIP) --no-deps sglang torchvision xgrammar
	$(SGLANG_PIP) --requirement sglang_cpu.txt
	touch $@

.venv/ready-dev: .venv/ready
	$(PIP) --editable ".[dev]"
	touch $@

.venv/ready-real: .venv/ready
	$(PIP) --editable ".[real,tasks]"
	touch $@

# The extra `docs` without the package itself: pages are built without torch.
.venv-docs/ready: setup.py constraints.txt
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --quiet $(PIP_FLAGS) --constraint constraints.txt \
	  mkdocs-material
	touch $@

# NeMo-Run brings a hundred packages, and older versions of some: it sees .venv, not the reverse.
LAUNCH_PIP = .venv-launch/bin/python -m pip install --quiet $(PIP_FLAGS) --constraint constraints.txt

.venv-launch/ready: .venv/ready-dev
	$(PYTHON) -m venv .venv-launch
	.venv/bin/python $(SITE_PACKAGES) > $$(.venv-launch/bin/python $(SITE_PACKAGES))/shared.pth
	$(LAUNCH_PIP) --editable ".[launch]"
	touch $@

NEWEST = $(PYTHON) -m venv --clear .venv-newest
NEWEST_PIP = bin/python -m pip install --quiet $(PIP_FLAGS)
SHARE_NEWEST = .venv-newest/bin/python $(SITE_PACKAGES) > $$($(1)/bin/python $(SITE_PACKAGES))/shared.pth

newest:
	$(NEWEST)
	.venv-newest/$(NEWEST_PIP) --editable ".[dev]"

newest-launch: newest
	$(NEWEST)-launch
	$(call SHARE_NEWEST,.venv-newest-launch)
	.venv-newest-launch/$(NEWEST_PIP) --editable ".[launch]"

newest-sglang: newest
	$(NEWEST)-sglang
	$(call SHARE_NEWEST,.venv-newest-sglang)
	.venv-newest-sglang/$(NEWEST_PIP) --no-deps sglang torchvision xgrammar
	sed 's/[=#].*//' sglang_cpu.txt > .venv-newest-sglang/names.txt
	.venv-newest-sglang/$(NEWEST_PIP) --requirement .venv-newest-sglang/names.txt
