# make demo    installs, trains a standard and a GFA classifier on digits, evaluates both, writes runs/demo/report.html
# make test    installs, runs the tests
# PYTHON=python3.12 chooses the interpreter; each interpreter has a virtual environment of its own.

PYTHON ?= python3
VENV ?= .venv-$(notdir $(PYTHON))
BIN := $(VENV)/bin
DEMO ?= runs/demo

.PHONY: demo digits objectives study faults soak scaling test test-slow test-parity benchmark benchmark-steps benchmark-attacks guard lint format
.PHONY: install install-dev install-parity install-adv-lib clean

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "gfa_jax needs Python 3.11 or newer: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

install: $(VENV)/.installed

install-dev: $(VENV)/.installed-dev

demo: install
	$(BIN)/python train.py --config configs/digits_standard.py --workdir $(DEMO)/standard
	$(BIN)/python train.py --config configs/digits_gfa.py --workdir $(DEMO)/gfa
	$(BIN)/python eval.py --workdir $(DEMO)/standard
	$(BIN)/python eval.py --workdir $(DEMO)/gfa
	$(BIN)/python -m gfa_jax.evaluation.compare $(DEMO)/standard/eval $(DEMO)/gfa/eval --out $(DEMO)/report.html

# All digits recipes side by side: some fifteen minutes on 2 CPU cores.
DIGITS := standard gfa fgsm_at pgd_at gfa_at
digits: install
	for recipe in $(DIGITS); do \
	  $(BIN)/python train.py --config configs/digits_$$recipe.py --workdir runs/digits/$$recipe && \
	  $(BIN)/python eval.py --workdir runs/digits/$$recipe || exit 1; done
	$(BIN)/python -m gfa_jax.evaluation.compare $(DIGITS:%=runs/digits/%/eval) --out runs/digits/report.html

# Every objective on digits with three seeds: accuracies and step times, about an hour on 2 CPU cores.
# A stopped one goes on. ARGS='--recipes trades,mart --seeds 1' for a part.
objectives: install
	$(BIN)/python benchmarks/objectives.py --out runs/objectives $(ARGS)

# Does GFA work? Trains and judges the recipes of configs/study/cifar10.py, and writes docs/study.md from docs/study/records:
# what has a record is not made again. Hours on 2 CPU cores; a stopped one goes on, and a second one beside it shares the work.
# make study DATA_DIR=~/tensorflow_datasets ARGS='--trials gfa_input --max_seeds 1'
DATA_DIR ?= $(HOME)/tensorflow_datasets
study: install
	$(BIN)/python -m gfa_jax.study --study configs/study/cifar10.py --data_dir $(DATA_DIR) \
	  --records docs/study/records --page docs/study.md $(ARGS)

# Breaks training in many ways and resumes it: some fifteen minutes on 2 CPU cores. A stopped one goes on.
faults: install
	$(BIN)/python benchmarks/faults.py --out runs/faults $(ARGS)

# Half an hour of training, watched for memory and open files.
soak: install-dev
	$(BIN)/python benchmarks/soak.py --out runs/soak $(ARGS)

# The step compiled for pods that are not here; see docs/scaling.md.
scaling: install
	$(BIN)/python -m gfa_jax.training.scaling --config configs/cifar10_gfa.py $(ARGS)

test: install-dev
	$(BIN)/python -m pytest -n auto

test-slow: install-dev
	XLA_FLAGS= $(BIN)/python -m pytest -m slow

install-parity: install-dev
	$(BIN)/python -m pip install --quiet --editable '.[parity]'
	$(BIN)/python -m pip install --quiet --no-deps torchattacks==3.5.1  # it pins old versions of what it needs

# Optional. adv-lib imports torchvision, whose build must fit PyTorch's (both for a GPU or both for
# CPU), and visdom, whose setup needs an old setuptools.
install-adv-lib: install-parity
	$(BIN)/python -m pip install --quiet torchvision==0.28.0 tornado jsonpatch websocket-client
	echo 'setuptools<81' > $(VENV)/build-constraints.txt
	$(BIN)/python -m pip install --quiet --no-deps \
	  --build-constraint $(VENV)/build-constraints.txt visdom==0.2.4
	$(BIN)/python -m pip install --quiet --no-deps adv-lib==0.2.8

test-parity: install-parity
	XLA_FLAGS= $(BIN)/python -m pytest -m parity

# Compiled steps (ARGS='--attacks pgd,apgd-ce' for attacks); see docs/performance.md.
benchmark: install
	$(BIN)/python -m gfa_jax.benchmark --out runs/benchmark $(ARGS)

# Training steps beside the same ones in PyTorch, in turns: some minutes on 2 CPU cores.
benchmark-steps: install-parity
	$(BIN)/python benchmarks/steps.py --out runs/benchmark-steps $(ARGS)

# Compares what compiled steps need with benchmarks/guard.json; ARGS='--write True' stores new figures.
guard: install-dev
	$(BIN)/python benchmarks/guard.py $(ARGS)

# Hours on 2 CPU cores; a stopped one goes on. ARGS='--attacks apgd-ce,apgd-t --rounds 1' for a part.
benchmark-attacks: install-parity
	$(BIN)/python benchmarks/attacks.py --out runs/benchmark-attacks $(ARGS)

lint: install-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: install-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv-* build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
