# Two commands on a fresh machine with Python 3.11+, pip and make:
#   make demo    install core and the three plugins, and run the main job on the bundled model, offline
#   make test    the same set-up, then every test of every package
#
# PYTHON chooses the interpreter, VENV the virtual environment.

PYTHON ?= python3
VENV ?= .venv
# The newest torch that the tests ran with. TORCH=torch takes whatever is newest.
TORCH ?= torch==2.13.0
TRANSFORMERS ?= transformers

PACKAGES := "./core[testing]" ./plugins/gpt2 ./plugins/qwen2 ./plugins/gemma
# What `make test` runs: folders, and options of pytest.
TESTS ?= core plugins/gpt2 plugins/qwen2 plugins/gemma plugins/gguf tests
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: demo test lint types docs bench clean

demo: $(VENV)/installed
	$(BIN)/splitlearn demo
	@echo "To go on here: . $(BIN)/activate"

test: $(VENV)/tools
	$(BIN)/python -m pytest $(TESTS)

lint: $(VENV)/tools
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/tools
	$(BIN)/mypy core/src plugins/gpt2/src plugins/qwen2/src plugins/gemma/src plugins/gguf/src

docs: $(VENV)/tools
	$(PIP) install --quiet -r docs/requirements.txt
	$(BIN)/python -m sphinx -b html -W --keep-going -q docs build/docs

bench: $(VENV)/tools
	$(PIP) install --quiet -r tests/benchmarks/requirements.txt
	$(BIN)/python tests/benchmarks/run.py

clean:
	rm -rf $(VENV)

$(VENV)/installed: $(wildcard core/pyproject.toml plugins/*/pyproject.toml) Makefile
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet "$(TORCH)"
	$(PIP) install --quiet "$(TRANSFORMERS)" $(addprefix -e ,$(PACKAGES))
	touch $@

$(VENV)/tools: $(VENV)/installed tests/requirements.txt
	$(PIP) install --quiet -e "./plugins/gguf[verify]" -r tests/requirements.txt
	touch $@
