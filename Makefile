# make train   train a 95 %-sparse network on real data, beside its controls (minutes)
# make test    all tests      make test-fast   without the slow ones
# make test-core  the part of them that CI runs on the newest Python and JAX, too
# make test-matrix  likewise, with the oldest and the newest versions of what it depends on
# make lint    formatter, linter, type checker
# make reproduce  RigL against its controls at 80 to 99.5 % (an hour); runs with a record stay
# make reproduce-quick  a little of every claim, to see that the commands work (minutes)
# make compare every method at 90, 95, 98 % on Fashion-MNIST; runs with a record are not repeated
# make compare-text  methods at 75, 90 % on a recurrent language model (two hours); likewise
# make compare-text-quick (ten minutes, one seed, a fifth of the steps)
# make compare-gpt   methods at 80, 90 % on a GPT, at equal steps and FLOPs; likewise; -quick: ten minutes
# make study-gpt     the GPT's best rates by sparsity; Adam at a rewiring (an hour)
# make study-circuit  weight-sparse GPTs, and the circuit of a behaviour (a quarter of an hour)
# make compare-vision  dense, static, RigL at 90, 95 % of a WRN on Fashion-MNIST (an hour); likewise
# make compare-structures  blocks and constant fan-in against single weights, with seconds; likewise
# make bench   what sparse training costs, against plain Optax in the same run
# make bench-vision  whole steps of ResNet-50 and MobileNet-v1, sparse against dense
# make bench-input  images a second, beside tf.data (puts TensorFlow into .venv-tf)
# make bench-inference  sparse networks in all forms, beside dense in XLA and in PyTorch (.venv-torch)
# make bench-recurrent  recurrent language models against Flax's own cells
# make bench-condensed  training steps of really sparse weights against the same dense model
# make bigger-than-dense  under 3 GB: dense networks fail, condensed ones learn (ten minutes)
# make accelerator  every check and measurement on a GPU or TPU, with the JAX of $(PYTHON)
#              (eight minutes); make accelerator ARGS=--tiny: that the command works, on a CPU
# make soak   half an hour of rewiring and kills     make fuzz   mutated files into every loader
# make docs    the site, into build/site      make pages  the tables in docs/ that are generated
# make lock    renew constraints.txt
#
# Each sets up what it needs in .venv, once. Another interpreter: make PYTHON=python3.12

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
WORKERS ?= 2
# A module's tests share what it compiles and trains: they stay together, the slow modules first.
# A process that crashes ends the run: pytest-xdist 3.8 may wait for ever for one in its place.
SPREAD := -n $(WORKERS) --dist=loadfile --no-loadscope-reorder --max-worker-restart=0 --durations=15

# The modules with tests that are not compiled the quick way (tests/conftest.py).
EXACT = $(shell grep -rl --include='test_*.py' 'mark\.exact' tests)

NEWEST := catalogue rewiring sharding trees users reproducible no_gather mask_memory selection errors blend

TEXT_METHODS := --methods=dense,small_dense,static,set,snfs,rigl,gmp --sparsities=.75,.9
GPT_METHODS := --methods=dense,small_dense,static,set,rigl,gmp,granet

.PHONY: train reproduce reproduce-quick test test-fast test-core test-matrix lint bench soak fuzz compare compare-fashion-mnist docs pages lock clean
.PHONY: compare-text compare-text-quick bench-recurrent compare-vision bench-vision bench-input
.PHONY: accelerator bench-inference compare-structures bench-condensed bigger-than-dense compare-gpt compare-gpt-quick study-gpt
.PHONY: study-landscape study-circuit

train: $(VENV)/.train
	$(BIN)/python scripts/compare.py --config=configs/digits_lenet.py --workdir=runs/digits

reproduce: $(VENV)/.train
	$(BIN)/python scripts/reproduce.py methods
	$(BIN)/python docs/reproduced.py

# A little of every claim, to see that each command works; nothing of it is kept as a record.
reproduce-quick: $(VENV)/.train
	for claim in $$($(BIN)/python scripts/reproduce.py --list | sed -n 's/^\([a-z_]*\):.*/\1/p'); do \
	  $(BIN)/python scripts/reproduce.py $$claim --quick || exit 1; \
	done

compare: $(VENV)/.train
	$(BIN)/python scripts/compare.py --config=configs/fashion_mnist_lenet.py --methods=all \
	  --sparsities=.9,.95,.98 --workdir=runs/compare --records=results/fashion_mnist_lenet \
	  --nocurves --config.checkpoint.every=0 --config.eval.every=1100

compare-fashion-mnist: $(VENV)/.train
	$(BIN)/python scripts/compare.py --config=configs/fashion_mnist_lenet.py --sparsities=.95,.98 \
	  --workdir=runs/fashion_mnist

# 39 runs of about 150 s on 2 quiet cores: two hours; and the same methods, one seed, ten minutes.
compare-text: $(VENV)/.train
	$(BIN)/python scripts/compare.py --config=configs/tdavid_gru.py $(TEXT_METHODS) --seeds=3 \
	  --workdir=runs/tdavid_gru --records=results/tdavid_gru

compare-text-quick: $(VENV)/.train
	$(BIN)/python scripts/compare.py --config=configs/tdavid_gru.py $(TEXT_METHODS) --seeds=1 \
	  --workdir=runs/tdavid_gru_quick --config.steps=200 --config.eval.every=100

# 57 runs: those at equal steps take about 5 minutes each on 2 quiet cores, the others less.
compare-gpt: $(VENV)/.train
	$(BIN)/python scripts/compare.py --config=configs/tdavid_gpt.py $(GPT_METHODS) \
	  --sparsities=.8,.9 --seeds=3 --workdir=runs/tdavid_gpt --records=results/tdavid_gpt \
	  --equal_flops --config.checkpoint.every=0

compare-gpt-quick: $(VENV)/.train
	$(BIN)/python scripts/compare.py --config=configs/tdavid_gpt.py $(GPT_METHODS) \
	  --sparsities=.9 --seeds=1 --workdir=runs/tdavid_gpt_quick --config.checkpoint.every=0 \
	  --config.steps=300 --config.method.every=30 --config.eval.every=300

# The best Adam rate by sparsity, and the spikes after rewirings by what newborn weights start from.
study-gpt: $(VENV)/.train
	$(BIN)/python -m benchmarks.transformer_rates --figure=docs/images/gpt_rates.png
	$(BIN)/python -m benchmarks.newborn_weights --figure=docs/images/newborn_weights.png

# What the heads and units of weight-sparse GPTs do: docs/circuits.md.
study-circuit: $(VENV)/.train
	$(BIN)/python -m benchmarks.circuit --workdir=runs/circuit --figure=docs/images/circuit.png

# Barriers, sharpness at rewirings, what trains at which rate: docs/landscape.md.
study-landscape: $(VENV)/.train
	$(BIN)/python -m benchmarks.landscape --figures=docs/images

# 15 runs of about 150 s on 2 quiet cores.
compare-vision: $(VENV)/.train
	$(BIN)/python scripts/compare.py --config=configs/fashion_mnist_wrn.py \
	  --methods=dense,static,rigl --sparsities=.9,.95 --seeds=3 \
	  --workdir=runs/fashion_mnist_wrn --records=results/fashion_mnist_wrn
	cp runs/fashion_mnist_wrn/learning_curves.png docs/images/fashion_mnist_wrn_learning_curves.png
	cp runs/fashion_mnist_wrn/accuracy_against_cost.png \
	  docs/images/fashion_mnist_wrn_accuracy_against_cost.png

# 67 runs, and then seconds of a step of each form: half an hour and more on 2 quiet cores.
compare-structures: $(VENV)/.train
	$(BIN)/python scripts/compare.py --config=configs/fashion_mnist_lenet.py \
	  --methods=dense,static,rigl --sparsities=.95 --seeds=5 --structure=unstructured \
	  --structure=constant_fan_in \
	  --structure="{'name': 'block', 'rows': 16, 'cols': 16, 'pad': True}" \
	  --structure="{'name': 'block', 'rows': 32, 'cols': 32, 'pad': True}" \
	  --structure="{'name': 'block', 'rows': 8, 'cols': 64, 'pad': True}" \
	  --config.model.hidden=1024,1024 --config.method.condensed=True --config.checkpoint.every=0 \
	  --workdir=runs/fashion_mnist_mlp --records=results/fashion_mnist_mlp --nocurves
	$(BIN)/python scripts/compare.py --config=configs/tdavid_gru.py --methods=static,rigl \
	  --sparsities=.9 --seeds=3 --structure="{'name': 'block', 'rows': 16, 'cols': 16}" \
	  --structure="{'name': 'block', 'rows': 32, 'cols': 32}" \
	  --config.method.condensed=True --config.checkpoint.every=0 \
	  --workdir=runs/tdavid_gru_structures --records=results/tdavid_gru --nocurves
	$(BIN)/python benchmarks/structures.py results/fashion_mnist_mlp
	$(BIN)/python benchmarks/structures.py results/tdavid_gru --match='dense|(static|rigl)-0.9'
	$(BIN)/python docs/structured.py

test: $(VENV)/.test
	QUICK_COMPILE=1 $(BIN)/python -m pytest $(SPREAD) -m "not exact"
	$(BIN)/python -m pytest $(SPREAD) -m exact $(EXACT)

test-fast: $(VENV)/.test
	$(BIN)/python -m pytest $(SPREAD) -m "not slow"

# What a newer JAX or Python may change: selections and rewirings bit for bit, Optax's catalogue,
# trees of other libraries, PRNG flags, what compiled programs hold and what crosses devices; and
# kernels for GPUs, which JAX 0.12 interprets and 0.10 does not.
test-core: $(VENV)/.test
	$(BIN)/python -m pytest $(SPREAD) -m "not slow" tests/condensed/test_mosaic_gpu.py \
	  $(NEWEST:%=tests/core/test_%.py)

# With the oldest and the newest versions that pyproject.toml allows: the core, and a run. Old ones
# of Flax use what is deprecated in the JAX of their day.
test-matrix:
	for resolution in lowest-direct highest; do \
	  venv=.venv-$$resolution && $(PYTHON) -m venv $$venv && $$venv/bin/python -m pip install -q uv && \
	  $$venv/bin/uv pip install -q --python=$$venv/bin/python --resolution=$$resolution -e '.[test]' && \
	  $$venv/bin/python -m pytest $(SPREAD) -m "not slow" -W ignore::DeprecationWarning \
	    $(NEWEST:%=tests/core/test_%.py) \
	    tests/cli/test_commands.py || exit 1; done

lint: $(VENV)/.test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(VENV)/.train
	$(BIN)/python benchmarks/update_overhead.py
	GLIBC_TUNABLES=glibc.malloc.hugetlb=1 $(BIN)/python benchmarks/update_overhead.py --only resnet50

# The tables of docs/ that are made from sources; those of records have targets of their own.
pages: $(VENV)/.test
	for page in accelerators combinations config optimizers recipes reproduced sizes tree; do \
	  $(BIN)/python docs/$$page.py || exit 1; done

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build -q

bench-vision: $(VENV)/.train
	$(BIN)/python benchmarks/vision_step.py

bench-input: $(VENV)/.train .venv-tf/.installed
	$(BIN)/python benchmarks/input_pipeline.py --tf-python=.venv-tf/bin/python

bench-inference: $(VENV)/.train .venv-torch/.installed
	$(BIN)/python benchmarks/inference.py --torch-python=.venv-torch/bin/python

bench-recurrent: $(VENV)/.train
	$(BIN)/python benchmarks/recurrent.py

bench-condensed: $(VENV)/.train
	$(BIN)/python benchmarks/condensed.py
	$(BIN)/python benchmarks/condensed_layers.py
	$(BIN)/python benchmarks/condensed_csr.py

# Not in .venv, whose JAX has no device: with the JAX that was installed for the device.
accelerator:
	PYTHONPATH=. $(PYTHON) benchmarks/accelerator.py $(ARGS)

bigger-than-dense: $(VENV)/.train
	$(BIN)/python benchmarks/bigger_than_dense.py --figure=docs/images/bigger_than_dense.png
	$(BIN)/python benchmarks/bigger_than_dense.py --network=gpt --steps=300 --every=50 \
	  --figure=docs/images/bigger_than_dense_gpt.png

soak: $(VENV)/.train
	$(BIN)/python -m benchmarks.soak

fuzz: $(VENV)/.train
	$(BIN)/python -m benchmarks.fuzz_loaders

lock: $(VENV)/.test
	$(BIN)/python -m pip install -q uv
	$(BIN)/uv pip compile -q --universal --python-version=3.11 --no-annotate --no-header \
	  --extra=test pyproject.toml --output-file=constraints.txt

clean:
	rm -rf $(VENV) .venv-tf .venv-lowest-direct .venv-highest .venv-torch

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is not Python 3.11 or newer; try make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.train: $(VENV)/.python pyproject.toml constraints.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[train,tfds]'
	@touch $@

# TensorFlow, for the other side of one benchmark alone; what it was measured with.
.venv-tf/.installed:
	$(PYTHON) -m venv .venv-tf
	.venv-tf/bin/python -m pip install -q --disable-pip-version-check tensorflow-cpu==2.21.0
	@touch $@

# PyTorch, for the other side of one benchmark and for the test of the reader in docs/deploy.md.
# Where the index has its CPU build, 2.13.0+cpu, pip prefers that.
.venv-torch/.installed:
	$(PYTHON) -m venv .venv-torch
	.venv-torch/bin/python -m pip install -q --disable-pip-version-check \
	  torch==2.13.0 numpy safetensors
	@touch $@

$(VENV)/.docs: $(VENV)/.train
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[docs]'
	@touch $@

$(VENV)/.test: $(VENV)/.train
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@
