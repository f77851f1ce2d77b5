# make demo      train on real text on two processes, the average kept on the shards
# make test      lint, then every kind of test: what CI runs
# make test-all  the same, with every row of every table: before a release, and before a large change is called done
# make lint      ruff, and mypy --strict on the package
# make docs      the site, in build/site; a broken link or a name without a docstring fails
# make matrix    the oldest, the pinned and the newest versions, the wheel alone, the site: noxfile.py (hours, many GB)
# make table     the README's table of versions, from what `make matrix` left
# make dist      wheel and sdist, in dist/
# make gpu       what only a GPU can show, in at most six minutes: tests/gpu; without one it says so
# make bench     what an update costs beside what else a user could pick
# make clean     back to a fresh clone
#
# Each makes what it needs of the environment first, in .venv, with the versions of constraints.txt. Choose the
# interpreter with PYTHON=python3.12, and pass arguments to pytest with PYTEST_ARGS="-k fsdp". Two workers share the
# tests; WORKERS=0 runs them in one process, which Ctrl-C and a debugger like better.

PYTHON ?= python3
WORKERS ?= 2
PYTEST_ARGS ?=
# of `make matrix`: SESSIONS="-s oldest", say; by default all that noxfile.py lists
SESSIONS ?=
# Tests start hundreds of processes: none of them should compile again what another has.
export PYTHONDONTWRITEBYTECODE :=
BIN := .venv/bin
READY := .venv/.ready
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

# What DeepSpeed compiles has paths of this environment in it: it lives and dies with it.
export TORCH_EXTENSIONS_DIR := $(CURDIR)/.venv/torch_extensions

.PHONY: setup demo test test-all lint docs matrix table dist gpu bench clean

demo: $(READY)
	$(BIN)/torchrun --standalone --nproc_per_node=2 examples/text_fsdp2.py

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --durations=20 $(PYTEST_ARGS)

test-all: lint docs
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --all --durations=20 $(PYTEST_ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(BIN)/python
	$(BIN)/python -m tests.unit.test_docstrings
	$(INSTALL) mkdocs-material 'mkdocstrings[python]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict  # with --quiet no warning is counted, and nothing fails

matrix: $(BIN)/python
	$(INSTALL) nox
	$(BIN)/nox $(SESSIONS)

table: $(BIN)/python
	$(BIN)/python -m tests.matrix --write

dist: $(BIN)/python
	$(INSTALL) build
	$(BIN)/python -m build

gpu: $(READY)
	$(BIN)/python -m tests.gpu

bench: $(READY)
	$(BIN)/python -m sharded_avg.benchmark

setup: $(READY)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python >= 3.10 is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv

# DeepSpeed's build imports torch, so it comes after torch and without build isolation; it compiles its ops at first use.
$(READY): pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) torch numpy setuptools wheel ninja
	DS_BUILD_OPS=0 $(INSTALL) --no-build-isolation deepspeed
	$(INSTALL) --no-build-isolation --editable '.[dev]'
	@touch $@

clean:
	rm -rf .venv .nox build dist runs lightning_logs *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
