# make venv | kernels | demo | test | test-all | test-ray | test-oldest | test-newest | check | docs | site | dist | image | format | lock. Each does its own set-up.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PACKAGES := $(VENV)/.packages
READY := $(VENV)/.ready
ADAPTERS := integrations/langchain integrations/llamaindex integrations/llamaindex-llms
MANIFESTS := pyproject.toml $(ADAPTERS:%=%/pyproject.toml)
EDITABLE := -e . $(ADAPTERS:%=-e %)
TYPED := grating_core integrations/langchain/langchain_grating integrations/llamaindex/llama_index \
	integrations/llamaindex-llms/llama_index kernels/grating_kernels benchmarks
KERNELS := kernels/CMakeLists.txt kernels/pyproject.toml $(wildcard kernels/src/* kernels/grating_kernels/*.py)
# What depends on the neighbours most: the contract with them, layers made of torch's functions, scores, tokens and texts equal to
# transformers', GGUF files, the lab's models, both adapters, the server, its tools and its spans.
CONTRACT := tests/contract tests/core/layers tests/core/engine tests/core/memory/test_parity.py tests/core/lab \
	tests/core/models/test_families.py tests/core/models/test_decoders.py tests/core/models/test_real_decoder.py \
	tests/core/text/test_settled.py tests/core/test_generation.py tests/core/serving tests/core/test_telemetry.py tests/langchain tests/llamaindex tests/llamaindex_llms
# A worker for each processor with one thread each: threads of several processes on the same processors spin.
WORKERS := -n auto --dist worksteal
ALONE := OMP_NUM_THREADS=1
# The variable silences a notice about the theme's successor.
MKDOCS := NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs

.PHONY: venv kernels demo test test-all test-ray test-oldest test-newest check docs site dist image format lock bench-deps benchmarks benchmarks-docs clean

venv: $(READY)

# requirements.lock is complete, so nothing is resolved here: the same versions next year. torch comes first, by itself.
$(PACKAGES): $(MANIFESTS) requirements.lock constraints.txt scripts/install_torch.sh hatch_build.py
	@echo "Setting up $(VENV) (about two minutes the first time) ..."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -qq --upgrade pip
	scripts/install_torch.sh $(VENV)
	$(BIN)/python -m pip install -qq --no-deps --require-hashes -r requirements.lock
	$(BIN)/python -m pip install -qq --no-deps --no-build-isolation $(EDITABLE)
	@touch $@

# Everything works without the kernels, so nothing fails where they cannot be built.
$(READY): $(PACKAGES) $(KERNELS) scripts/install_kernels.sh
	@scripts/install_kernels.sh $(VENV) || true
	@touch $@

# Builds the kernels anew, and fails where there is a compiler that cannot compile them.
kernels: $(PACKAGES)
	@scripts/install_kernels.sh $(VENV)
	@touch $(READY)

# Anew from the ranges in the pyproject.toml files: the newest versions that they allow.
lock: $(READY)
	UV=$(BIN)/uv scripts/resolve.sh requirements.lock --universal --generate-hashes --upgrade --group dev --group model

demo: $(READY)
	$(BIN)/grating demo

test: $(READY)
	$(ALONE) $(BIN)/python -m pytest -m "not slow" $(WORKERS)

# With made-up inputs that are new every time.
test-all: $(READY)
	$(ALONE) $(BIN)/python -m pytest $(WORKERS) --hypothesis-profile=fresh
	$(MAKE) --no-print-directory test-ray

# What runs on Ray, in an environment of its own: Ray brings thirty packages and hundreds of MB.
test-ray: $(READY)
	$(PYTHON) -m venv .venv-ray
	UV=$(BIN)/uv scripts/install_torch.sh .venv-ray
	$(BIN)/uv pip install --quiet --python .venv-ray --constraint requirements.lock --group test -e '.[demo,ray,telemetry]' \
		$$(find $(VENV) -maxdepth 2 -path '*/kernels/*.whl')
	$(ALONE) .venv-ray/bin/python -m pytest tests/core/serving/test_ray.py

# The contract with the lowest and with the newest versions allowed, each in an environment of its own.
test-oldest: RESOLUTION := lowest-direct
test-newest: RESOLUTION := highest
test-oldest test-newest: ENVIRONMENT = .venv-$(@:test-%=%)
test-oldest test-newest: $(READY)
	$(PYTHON) -m venv $(ENVIRONMENT)
	UV=$(BIN)/uv scripts/install_torch.sh $(ENVIRONMENT) $(@:test-%=%)
	UV=$(BIN)/uv scripts/resolve.sh $(ENVIRONMENT)/requirements.txt --upgrade --resolution $(RESOLUTION) \
		--group test --group model
	@# Copies: nltk, which LlamaIndex uses, refuses to read data that is a hard link into uv's cache.
	$(BIN)/uv pip install --quiet --link-mode copy --python $(ENVIRONMENT) --no-deps -r $(ENVIRONMENT)/requirements.txt $(EDITABLE) \
		$$(find $(VENV) -maxdepth 2 -path '*/kernels/*.whl')
	$(ALONE) $(ENVIRONMENT)/bin/python -m pytest -m "not slow" $(WORKERS) $(CONTRACT)

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy $(TYPED)
	$(MAKE) --no-print-directory site

# The documentation, built anew whenever something is saved.
docs: $(READY)
	$(MKDOCS) serve

# The same as files in site/.
site: $(READY)
	$(MKDOCS) build --strict

# What a release uploads, in dist/: a source distribution and a wheel of each distribution, and the source distribution of the kernels.
# Their wheels are built on each platform (.github/workflows/kernels.yml).
dist: $(READY)
	rm -rf dist
	for from in . $(ADAPTERS); do (cd $$from && "$(CURDIR)/$(BIN)/python" -m hatchling build --directory "$(CURDIR)/dist") || exit; done
	$(BIN)/uv build --quiet --sdist --no-build-isolation --python $(BIN)/python --no-create-gitignore --out-dir dist kernels

# The server as an image for Docker, which needs nothing of what is here.
image:
	docker build --tag grating .

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The peers that benchmarks/ compares with. llama.cpp is compiled here, for this processor: ten minutes on two cores.
bench-deps: TILES := -include $(CURDIR)/benchmarks/tile_configuration.h
bench-deps: $(READY)
	CMAKE_ARGS="-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF" CFLAGS="$(TILES)" CXXFLAGS="$(TILES)" $(BIN)/uv pip install --quiet --python $(VENV) --group bench

# All that docs/benchmarks/ shows, measured anew, in about two hours on two cores. DATA has collections in BEIR layout.
benchmarks: bench-deps
	$(BIN)/python -m benchmarks.latency --data $(DATA)
	$(BIN)/python -m benchmarks.latency --data $(DATA) --model smollm2-135m --requests 2 --timed 1 --rounds 2
	$(BIN)/python -m benchmarks.cold
	$(BIN)/python -m benchmarks.pruning --data $(DATA)
	$(BIN)/python -m benchmarks.promise --collection $(DATA)/cranfield --collection $(DATA)/cisi --collection $(DATA)/locomo
	$(BIN)/python -m benchmarks.probabilities --data $(DATA)
	$(BIN)/python -m benchmarks.deadline --data $(DATA)
	$(BIN)/python -m benchmarks.memory
	$(BIN)/python -m benchmarks.memory --model bundled:ms-marco-minilm-l12
	$(BIN)/python -m benchmarks.passes --model bundled:ms-marco-minilm-l12
	$(BIN)/python -m benchmarks.passes
	$(BIN)/python -m benchmarks.serve --data $(DATA)
	$(BIN)/python -m benchmarks.applications --data $(DATA)
	$(BIN)/python -m benchmarks.generation
	$(BIN)/python -m benchmarks.quantised --data $(DATA)
	$(BIN)/python -m benchmarks.quantised --data $(DATA) --model smollm2-135m-bf16
	$(BIN)/python -m benchmarks.streaming resident
	$(BIN)/python -m benchmarks.streaming disk
	$(BIN)/python -m benchmarks.streaming slow-disk
	$(BIN)/python -m benchmarks.simulated
	$(BIN)/python -m benchmarks.perplexity methods --data $(DATA)
	$(BIN)/python -m benchmarks.perplexity caches --data $(DATA)
	$(BIN)/python -m benchmarks.perplexity columns --data $(DATA)
	$(MAKE) --no-print-directory benchmarks-docs

# The pages and figures of docs/benchmarks/, from benchmarks/results/.
benchmarks-docs: $(READY)
	$(BIN)/python -m benchmarks.render

clean:
	rm -rf $(VENV) .venv-oldest .venv-newest .venv-ray .pytest_cache .mypy_cache .ruff_cache site dist
