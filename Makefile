# make train   train a 95 %-sparse network on real data, beside its controls (minutes)
# make test    all tests      make test-fast   without the slow ones
# make lint    formatter, linter, type checker
# make bench   what sparse training costs, against plain Optax in the same run
# make lock    renew constraints.txt
#
# Each sets up what it needs in .venv, once. Another interpreter: make PYTHON=python3.12

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
WORKERS ?= 2
CORE_TESTS := $(patsubst %,tests/core/test_%.py,selection errors schedules trees)

.PHONY: train test test-fast test-core lint bench compare-fashion-mnist lock clean

train: $(VENV)/.train
	$(BIN)/python scripts/compare.py --config=configs/digits_lenet.py --workdir=runs/digits

compare-fashion-mnist: $(VENV)/.train
	$(BIN)/python scripts/compare.py --config=configs/fashion_mnist_lenet.py --sparsities=.95,.98 \
	  --workdir=runs/fashion_mnist

test: $(VENV)/.test
	$(BIN)/python -m pytest -n $(WORKERS) --dist=loadgroup

test-fast: $(VENV)/.test
	$(BIN)/python -m pytest -n $(WORKERS) --dist=loadgroup -m "not slow"

test-core: $(VENV)/.test
	$(BIN)/python -m pytest -n $(WORKERS) --dist=loadgroup -m "not slow" $(CORE_TESTS)

lint: $(VENV)/.test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(VENV)/.train
	$(BIN)/python benchmarks/update_overhead.py

lock: $(VENV)/.test
	$(BIN)/python -m pip install -q uv
	$(BIN)/uv pip compile -q --universal --python-version=3.11 --no-annotate --no-header \
	  --extra=train --extra=test pyproject.toml --output-file=constraints.txt

clean:
	rm -rf $(VENV)

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is not Python 3.11 or newer; try make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.train: $(VENV)/.python pyproject.toml constraints.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[train]'
	@touch $@

$(VENV)/.test: $(VENV)/.train
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[train,test]'
	@touch $@
