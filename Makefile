# Two commands do everything on a fresh machine: `make demo` runs the main job, `make test` passes the tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Two cores are the reference machine: one thread per process, parallelism comes from processes.
export OMP_NUM_THREADS ?= 1
export MKL_NUM_THREADS ?= 1
export HF_HUB_OFFLINE ?= 1
# Hundreds of processes of the tests import the same modules: each is compiled once.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help install demo test test-fast test-slow bench bench-peers bench-quick gpu-check lint format faults fuzz soak golden peers docs docs-site clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install: $(VENV)/.installed  ## create .venv with the pinned set

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: install  ## zoo, sweep with two Ray workers, report, export, re-score
	$(BIN)/python -m experiments.demo

lint: install  ## ruff and mypy (strict)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint test-fast  ## ruff, mypy and the test suite

# The tests build it themselves where it is missing; here the time limit of a test does not count.
$(VENV)/.pretend-card: $(VENV)/.installed tests/pretend/build.py $(wildcard tests/pretend/native/*)
	$(BIN)/python -m tests.pretend.build
	touch $@

test-fast: install $(VENV)/.pretend-card
	$(BIN)/python -m pytest -n 3 --dist loadgroup

test-slow: install $(VENV)/.pretend-card  ## kill schedules and other long tests
	$(BIN)/python -m pytest -m slow --timeout 1800 -n 2 --dist loadgroup

bench: install  ## performance figures as ratios inside one run
	$(BIN)/python -m experiments.bench

bench-peers: install .venv-peers/.installed  ## whole trials beside those of other packages, in an environment of their own
	$(BIN)/python -m experiments.bench.peers

bench-quick: install  ## a minute of ratios; fails where one is worse than the committed figures
	$(BIN)/python -m experiments.bench.quick

# TIER=kernels takes what `python3` has: torch, triton, numba, numpy and transformers.
TIER ?= full
gpu-check: $(if $(filter kernels,$(TIER)),,install)  ## what needs a GPU, in ten minutes; rewrites docs/gpu.md
	$(if $(filter kernels,$(TIER)),$(PYTHON),$(BIN)/python) -m experiments.gpu_check --tier $(TIER)

faults: install  ## a sweep through everything that clusters do; rewrites docs/faults.md
	$(BIN)/python -m tests.faults.report

# SEED= is the first seed, COUNT= how many of every kind, KIND= which kinds (with commas).
fuzz: install  ## 5,000 seeded mutations of every kind of file, read by the real readers
	$(BIN)/python -m tests.fuzz.run --seed $(or $(SEED),0) --count $(or $(COUNT),5000) --kind "$(KIND)"

soak: install  ## two hours of studies that are killed, moved, starved and resumed
	$(BIN)/python -m tests.soak.run --seed $(or $(SEED),0) --minutes $(or $(MINUTES),120)

golden: install  ## rewrite the golden recommendations (an algorithm change: say so in CHANGELOG.md)
	$(BIN)/python -m tests.golden.write

peers: .venv-peers/.installed  ## rewrite the golden tensors of other packages, in an environment of their own
	.venv-peers/bin/python -m tests.peers.generate

.venv-peers/.installed: tests/peers/requirements.txt
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check -r tests/peers/requirements.txt
	touch $@

docs: install  ## write the pages of operators, strategies and study keys from their declarations
	$(BIN)/python -c "from pathlib import Path; from mergesearch.merging.operators.pages import write_pages; write_pages(Path('docs/operators'))"
	$(BIN)/python -c "from pathlib import Path; from mergesearch.search.strategies.pages import write_pages; write_pages(Path('.'))"
	$(BIN)/python -c "from pathlib import Path; from mergesearch.search.plan.study_reference import write_page; write_page(Path('.'))"

docs-site: install  ## build the documentation site in build/site; broken links are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

format: install  ## format the sources
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## remove runs and the zoo, keep .venv
	rm -rf runs zoo
