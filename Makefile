# `make report` and `make test` need nothing before them but Python 3.11+ and make.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: report test test-fast lab tutorials publish bench clean

report: $(READY)  ## run the quickstart (skips what is unchanged) and leave reports/index.html
	$(BIN)/wddm run params/quickstart.yaml
	@echo "Open reports/index.html in a browser."

test: $(READY)  ## every test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

test-fast: $(READY)  ## what needs no notebook and no training
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile -m "not slow"

lab: export GOMP_SPINCOUNT ?= 1000
lab: export MALLOC_MMAP_MAX_ ?= 0
lab: export MALLOC_TRIM_THRESHOLD_ ?= -1
lab: $(READY)  ## open JupyterLab on the notebooks
	JUPYTER_CONFIG_PATH=notebooks/lab$${JUPYTER_CONFIG_PATH:+:$$JUPYTER_CONFIG_PATH} $(BIN)/jupyter lab --LabApp.default_url=/lab/tree/notebooks/01_prepare.ipynb

tutorials: $(READY)  ## execute the tutorials in place, for their outputs to be committed
	OMP_NUM_THREADS=1 $(BIN)/python notebooks/refresh.py notebooks/tutorials/*.ipynb

publish: $(READY)  ## RUN=name: its report as Markdown, which a repository's host shows
	$(BIN)/python notebooks/publish.py reports/$(RUN)

bench: $(READY)  ## ours against baselines, wavelets against pixels; FULL=1 for a GPU; PEERS=1 against other libraries
ifdef PEERS
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --editable '.[peers]'
	OMP_NUM_THREADS=1 $(BIN)/wddm run params/peers.yaml --force
else
	$(BIN)/wddm run params/benchmarks$(if $(FULL),-full).yaml --force
	@$(BIN)/python -c 'import pandas; print(pandas.read_csv("reports/benchmarks$(if $(FULL),-full)/benchmarks.csv").round(3).to_string(index=False))'
endif

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("wddm: got Python %d.%d, wanted 3.11 or newer: run make PYTHON=/path/to/python3.11" % v[:2])'
	@echo "Setting up .venv (once, several GB, a few minutes) ..."
	@test -d .venv || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $(READY)

clean:  ## remove the environment and caches; data, runs and reports stay
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
