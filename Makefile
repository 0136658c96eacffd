# The book's commands; `make help` lists them. Each sees to the set-up first: .venv from
# requirements.lock, data and models into the cache. Nothing after the set-up needs the network.

PYTHON ?= python3
RUN := .venv/bin/python
# Two labs or two test workers run at a time: more threads would only fight over the processor.
QUIET := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false TRANSFERKIT_PROGRESS=0
PYTEST := $(QUIET) $(RUN) -m pytest -n 2 --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help setup book test lab serve full elsewhere bench gpu peers diagrams lint lock clean

help:  ## list these commands
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' Makefile
	@echo "  PYTHON=python3.12 makes .venv with that Python."

setup:  ## make .venv and fetch the data sets and models (part of all below)
	@$(PYTHON) tools/bootstrap.py

book: setup  ## run the labs that changed, build and check the book
	@$(RUN) -m tools.build

test: book lint  ## prove it: every lab again in small, then all tests
	@echo "Tests, 1 of 2: every lab from top to bottom in the smoke profile"
	@TRANSFERKIT_PROFILE=smoke TRANSFERKIT_OFFLINE=1 $(PYTEST) --nbval-lax notebooks
	@echo "Tests, 2 of 2: laws, equations, book, browser"
	@$(PYTEST) -rs tests

lab: setup  ## open the labs in JupyterLab
	@$(RUN) -m jupyterlab --notebook-dir=notebooks

serve: book  ## serve the book to this machine; to the local network with SHARE=1
	@$(RUN) -m tools.serve $(if $(filter 1,$(SHARE)),--host 0.0.0.0) \
		$(if $(filter command%,$(origin HOST)),--host $(HOST)) $(if $(PORT),--port $(PORT))

full: setup  ## run one lab at full size and record it: LAB=part/name
	@test -n "$(LAB)" || { echo "make full: name the lab, LAB=part/name"; exit 2; }
	@$(RUN) -m tools.execute --profile full $(LAB)

elsewhere: setup  ## ask the claims of labs with the arithmetic of another processor: LAB=part/name
	@$(QUIET) $(RUN) -m tools.elsewhere $(LAB)

bench: setup  ## measure training beside other libraries: an hour, on an idle machine
	@$(PYTHON) -m benchmarks.peers.environment
	@python=.venv-peers/bin/python; test -x $$python || python=$(RUN); \
		TRANSFERKIT_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONPATH=. \
		$$python -m benchmarks $(PARTS)

# Not after the set-up: a machine with a card may have a torch of its own and no network.
gpu:  ## check and measure on a CUDA card in ten minutes; "Error 3" without one
	@python=$(RUN); test -x $$python || python=$(PYTHON); \
		$(QUIET) TRANSFERKIT_OFFLINE=1 $$python -m benchmarks.gpu $(PARTS) \
		$(if $(OUTPUT),--output $(OUTPUT))

peers:  ## ask other libraries the same laws, in .venv-peers, and record the answers
	@$(PYTHON) -m benchmarks.peers.environment
	@$(QUIET) .venv-peers/bin/python -m benchmarks.peers.laws

diagrams: setup  ## draw the diagrams whose source changed (needs npm and Chromium)
	@$(RUN) -m tools.diagrams

lint: setup  ## check code style, types and spelling
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .
	@$(RUN) -m mypy
	@$(RUN) -m codespell_lib

lock: setup  ## write requirements.lock anew from pyproject.toml
	@$(RUN) -m tools.lock

clean:  ## remove what was built (.venv* too with ALL=1; the cache of assets stays)
	rm -rf _build .pytest_cache .ruff_cache .mypy_cache .hypothesis $(if $(ALL),.venv .venv-peers)
