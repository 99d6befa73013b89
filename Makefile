# Every target creates .venv on first use. Needs Python >= 3.11 and make.
#   make demo    train a small transformer on real files, write demo.html (about a minute)
#   make test    the whole test suite
#   make docs    the documentation, built into site/
# To test on a GPU, use the environment that has its torch: `make test VENV=/path CONSTRAINTS=`.

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints-cpu.txt
PY := $(VENV)/bin/python
READY := $(VENV)/.flexattn-ready

.PHONY: demo test lint bench docs clean

demo: $(READY)
	$(PY) -m examples.demo

test: $(READY)
	$(PY) -m pytest

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m mypy

bench: $(READY)
	$(PY) -m benchmarks.run --suite cpu

docs: $(READY)
	$(PY) -m mkdocs build --strict

clean:
	rm -rf $(VENV) build dist site demo.html

$(READY): pyproject.toml $(CONSTRAINTS)
	@test -x $(PY) || $(PYTHON) -c 'import sys; v = sys.version_info; \
	    sys.exit(v < (3, 11) and "flexattn needs Python 3.11 or newer, this is %d.%d: try make PYTHON=python3.12" % v[:2])'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install $(addprefix -c ,$(CONSTRAINTS)) -e '.[dev]'
	@touch $@
