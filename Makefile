# Needs Python 3.11 and make. Everything lands in .venv/ and var/ below this folder.
PYTHON ?= python3.11
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export MPLCONFIGDIR := $(CURDIR)/var/matplotlib

.PHONY: install quickstart test chaos lint bench lock clean

install: .venv/.installed

.venv/.installed: requirements.lock pyproject.toml
	@echo "installing the locked dependencies into .venv (a few minutes) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/pip install --quiet --requirement requirements.lock
	@$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

quickstart: install
	@$(BIN)/python -m deployments.quickstart

# Two processes: most tests wait for a cluster of their own. A file stays in one, so that its tests share theirs.
test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

# Every fault at every stage; `make test` runs a short form of each.
chaos: install
	$(BIN)/python -m pytest tests/chaos -m "chaos or not chaos"

lint: install
	$(BIN)/ruff check .
	$(BIN)/mypy

# Runs the benchmarks and writes their figures into docs/benchmarks.md.
bench: install
	$(BIN)/python -m benchmarks.tables --quick

# Resolve anew; torch keeps its pin, because an open range may pull accelerator packages that nobody asked for.
lock: install
	$(BIN)/pip install --quiet --upgrade --upgrade-strategy eager torch==2.13.0 --editable '.[embedded,peft,test]'
	@echo '# Every package of an install of plora-ray[embedded,peft,test], pinned. Made by `make lock`.' > requirements.lock
	$(BIN)/pip freeze --all --exclude pip --exclude-editable | sed 's/+cpu$$//' >> requirements.lock

clean:
	rm -rf var build dist *.egg-info
