# implicit-bench: `make demo` shows what it does, `make test` checks it.
VENV ?= .venv
PY := $(VENV)/bin/python

.PHONY: help setup demo readme bench-solvers choosing faithfulness results reproduce docs smoke test soak lint clean
help:             ## what can be made
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/'

$(VENV)/.stamp: pyproject.toml constraints.txt
	@start=$$(date +%s); echo "setup   building $(VENV) (one to three minutes, once)"; \
	python3 -m venv $(VENV) && $(PY) -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev]" && \
	touch $@ && echo "setup   $(VENV) ready ($$(( $$(date +%s) - start )) s, once)"

setup: $(VENV)/.stamp   ## make .venv with everything installed

demo: setup       ## train a Skip DEQ on real digits and time it against its rivals, about a minute
	@PATH="$(VENV)/bin:$$PATH" $(PY) scripts/demo.py

readme: setup     ## rewrite the demo's output in README.md
	@PATH="$(VENV)/bin:$$PATH" $(PY) scripts/demo.py --readme

bench-solvers: setup  ## solvers and train steps against their floor, torchdeq and torchdiffeq; writes results/
	@$(PY) scripts/solver_bench.py --save

choosing: setup   ## the figures of docs/choosing.md, about ten minutes
	@$(PY) scripts/choosing.py

faithfulness: setup   ## the measured tables of docs/faithfulness.md, about forty minutes
	@$(PY) scripts/faithfulness.py

results: setup    ## every committed table and figure anew from the records in results/; fails where one differs
	@$(PY) scripts/results.py $(RESULTS)

reproduce: setup  ## a paper's table trained anew, here, then shown: make reproduce TABLE=cdeq_mnist [WORDS="time=1h"]
	@$(VENV)/bin/implicit-bench table table=$(or $(TABLE),$(error say which, such as TABLE=cdeq_mnist)) records=runs run_missing=true $(WORDS)

docs: setup       ## the pages as a site, in site/
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet && echo "wrote   site/index.html"

smoke: setup      ## length=smoke of the experiments on real images, three seeds each: does the loss fall?
	@$(PY) scripts/smoke.py

test: setup       ## the whole test suite
	@$(PY) -m pytest -n auto --maxprocesses 4

soak: setup       ## what can go wrong, at length, about twenty minutes; its log is results/soak.log
	@rm -f results/soak.log; IMPLICIT_BENCH_SOAK=$(CURDIR)/results/soak.log $(PY) -m pytest tests/test_faults.py --timeout 3600

lint: setup       ## ruff and mypy
	@$(PY) -m ruff check . && $(PY) -m mypy

clean:            ## remove the virtual environment and caches, never runs/ or data/
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache dist site
