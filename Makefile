# Two commands for a newcomer: `make demo` and `make test`. The environment is made once, in .venv.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
PY := .venv/bin/python
STAMP := .venv/.installed

.PHONY: install demo test test-slow fuzz research gpu check bench base clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Windtunnel needs Python 3.11 or newer: make PYTHON=/path/to/python3.11")'
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --quiet --constraint constraints.txt --editable '.[train,dev]'
	touch $(STAMP)

demo: install
	.venv/bin/windtunnel demo

# Two processes on two cores: threads of their own would only wait for each other.
test test-slow research: export OMP_NUM_THREADS = 1

test: install
	$(PY) -m pytest --numprocesses 2

test-slow: install
	$(PY) -m pytest --numprocesses 2 -m slow

# Ten minutes for each kind of file that people bring; coverage-guided where atheris is installed.
fuzz: install
	for name in config rows events tokenizer; do $(PY) -m tests.fuzz $$name --minutes 10 || exit 1; done

# How well the memory plan's formulas hold: every model on a dry run, every way of running a layer.
research: install
	$(PY) -m pytest --numprocesses 2 tests/research

# Six minutes on a CUDA card; leaves a report that can be committed.
gpu: install
	WINDTUNNEL_GPU_REPORT=presets/measured $(PY) -m pytest -m gpu tests/gpu

check: install
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports
	$(PY) -m pytest tests/test_house.py
	$(PY) -m tests.install.resolve

bench: install
	$(PY) -m tests.bench

base: install
	$(PY) -m tests.make.demo_base

clean:
	rm -rf .venv build dist
