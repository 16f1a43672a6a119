# make demo   train nothing, need nothing: a real circuit of the bundled model, with its audit and its page, in out/demo
# make test   every test, in two processes
# Both make the virtual environment first if it is not there. The others: make venv | lint | bench | notebooks | figures
# | docs | docs-links | tl39

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
EXTRAS := fast,viz,search,notebooks,docs,test,dev
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test venv lint bench notebooks figures docs docs-links tl39
.DELETE_ON_ERROR:

demo: venv
	$(BIN)/sparse-interp demo --out out/demo

test: venv
	$(BIN)/python -m pytest -n 2 --dist loadfile

venv: $(VENV)/.installed

# The stamp is written last, so it vouches for a whole installation. While `.installing` is there the environment is
# half made, and the next attempt begins again from an empty one. The build backends (ours, and that of a dependency
# which has no wheel) are installed first, under the same constraints, so no build fetches versions of its own.
# Of axe-playwright-python a test needs the axe-core inside it alone, and not the browsers' driver that it names.
$(VENV)/.installed: pyproject.toml constraints.txt
	@rm -f $@
	@if [ -e $(VENV)/.installing ]; then $(PYTHON) -m venv --clear $(VENV); else $(PYTHON) -m venv $(VENV); fi
	@touch $(VENV)/.installing
	$(PIP) hatchling editables setuptools
	$(PIP) --no-build-isolation -e '.[$(EXTRAS)]'
	$(PIP) --no-deps axe-playwright-python
	@mv $(VENV)/.installing $@

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: venv
	@set -e; for claim in benchmarks/*.py; do echo "== $$claim"; $(BIN)/python $$claim; done

notebooks: venv
	$(BIN)/python notebooks/run.py

figures: venv
	$(BIN)/sparse-interp figures --out out/figures

# A warning is an error: a reference that leads nowhere, a page that nothing leads to.
docs: venv
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs out/docs
	@echo "out/docs/index.html"

# Asks every address outside whether it is still there, so it needs a network.
docs-links: venv
	$(BIN)/python -m sphinx -q -b linkcheck docs out/docs-links

# The oldest TransformerLens that is supported, in an environment of its own: the same scripts as in the tests.
tl39: .venv39/.installed
	.venv39/bin/python tests/model/tl_battery.py
	.venv39/bin/python tests/model/dense_script.py

.venv39/.installed:
	$(PYTHON) -m venv --clear .venv39
	.venv39/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 transformer-lens==3.9.0 numba safetensors circuitsvis==1.43.3
	@touch $@
