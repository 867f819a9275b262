PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
LONG := export or cuda or slow or network
PARALLEL := -n auto --maxprocesses 4

.PHONY: demo test test-all page check clean

demo: $(VENV)/.demo
	$(BIN)/ffnfold demo -o out/vit-s

test: $(VENV)/.test
	$(BIN)/python -m pytest -q $(PARALLEL) -m "not ($(LONG))" tests

test-all: $(VENV)/.test
	$(BIN)/python -m pytest -q $(PARALLEL) -m "not (cuda or slow)" tests
	$(BIN)/python -m pytest -q -m "cuda or slow" tests

page: $(VENV)/.test
	FFNFOLD_SCREENSHOTS=out/screenshots $(BIN)/python -m pytest -q tests/cli/test_page_in_browser.py

check: $(VENV)/.test
	$(BIN)/ruff check .
	rm -rf build/check build/lib && $(BIN)/python -m pip install -q --no-deps --no-build-isolation --target build/check .
	MYPYPATH=build/check $(BIN)/mypy --cache-dir build/.mypy_cache -p ffnfold

clean:
	rm -rf $(VENV) build out *.egg-info

$(VENV)/bin/python:
	$(PYTHON) -c "import sys; sys.exit('Python 3.10 or newer is needed, this is ' + sys.version.split()[0] \
	  + ': make PYTHON=python3.x') if sys.version_info < (3, 10) else None"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip "setuptools>=77"

$(VENV)/.demo: $(VENV)/bin/python setup.cfg pyproject.toml
	$(BIN)/python -m pip install -q -e '.[cpu,demo,report]'
	touch $@

$(VENV)/.test: $(VENV)/bin/python setup.cfg pyproject.toml
	$(BIN)/python -m pip install -q -e '.[cpu,demo,report,test]'
	touch $@
