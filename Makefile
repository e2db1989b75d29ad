# Two commands on a fresh machine with Python 3.11+, pip and make:
#   make demo    install core and the three plugins, and run the main job on the bundled model, offline
#   make test    the same set-up, then every test of every package, in random order
#   make test-long   the same with all cases of the sweeps, of which the tests take a sample otherwise
#
# PYTHON chooses the interpreter, VENV the virtual environment.

PYTHON ?= python3
VENV ?= .venv
# The newest torch that the tests ran with. TORCH=torch takes whatever is newest.
TORCH ?= torch==2.13.0
TRANSFORMERS ?= transformers

# What builds the packages, once for all of them: pip would install it anew for each.
BACKEND := "hatchling>=1.26" "editables>=0.5"
PACKAGES := "./core[testing]" ./plugins/gpt2 ./plugins/qwen2 ./plugins/gemma
# What `make test` runs: folders, and options of pytest.
TESTS ?= core plugins/gpt2 plugins/qwen2 plugins/gemma plugins/gguf plugins/serve plugins/auto plugins/ray tests
# A process for each core, four at most: each of them imports torch and transformers.
PARALLEL ?= --numprocesses logical --maxprocesses 4 --dist worksteal
# The files with tests that need no torch.
LIGHT = $(shell grep -rl "mark.light" core/tests --include="test_*.py")
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: demo test test-long test-alone test-light lint types docs bench clean

demo: $(VENV)/installed
	$(BIN)/splitlearn demo
	@echo "To go on here: . $(BIN)/activate"

# What is imported in hundreds of processes is compiled once.
unexport PYTHONDONTWRITEBYTECODE
# Tiny tensors gain nothing from threads, which spin for each other on a busy machine.
test test-long test-alone test-light: export OMP_NUM_THREADS ?= 1

test: $(VENV)/tools
	$(BIN)/python -m pytest $(PARALLEL) $(TESTS)

# All cases: 100,000 broken headers, a kill at each access to a file, the kit under every combination.
test-long: export LONG_TESTS = 1
test-long: $(VENV)/pyright test

# Each test in a process of its own, so that none needs what another one did.
test-alone: $(VENV)/tools
	$(BIN)/python -m pytest -p tests.alone $(PARALLEL) $(TESTS)

# What needs no torch, in an environment without it: VENV must be one of its own.
test-light: $(VENV)/light
	$(BIN)/python -m pytest $(PARALLEL) -m "light and not heavy" $(LIGHT)

lint: $(VENV)/tools
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/tools
	$(BIN)/mypy core/src plugins/gpt2/src plugins/qwen2/src plugins/gemma/src plugins/gguf/src plugins/serve/src plugins/auto/src plugins/ray/src
	$(BIN)/python -m pytest "tests/test_documents.py::test_python_in_documents_has_no_type_errors[mypy]"

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
	$(PIP) install --quiet "$(TORCH)" $(BACKEND)
	$(PIP) install --quiet --no-build-isolation "$(TRANSFORMERS)" $(addprefix -e ,$(PACKAGES))
	touch $@

$(VENV)/tools: $(VENV)/installed tests/requirements.txt tests/newest-requirements.txt
	$(PIP) install --quiet --no-build-isolation -e "./plugins/gguf[verify]" -e ./plugins/serve -e ./plugins/auto -e ./plugins/ray -r tests/requirements.txt -r tests/newest-requirements.txt
	touch $@

$(VENV)/light: core/pyproject.toml tests/requirements.txt tests/light_requirements.py Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python tests/light_requirements.py > $(VENV)/light.txt
	$(PIP) install --quiet -r $(VENV)/light.txt
	$(PIP) install --quiet --no-deps --no-build-isolation $(addprefix -e ,$(PACKAGES))
	touch $@

# The second checker of the documents' Python, and Node.js, which it is written for.
$(VENV)/pyright: $(VENV)/tools
	$(PIP) install --quiet "pyright[nodejs]>=1.1.405"
	touch $@
