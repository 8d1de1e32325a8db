# Every target sets up what it needs in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready

# Each file of tests in one of three processes, in the order that conftest.py gives: for two cores,
# as a third of the time is waiting.
SIDE_BY_SIDE := -n 3 --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help setup demo test check-all bench lint format clean wheels fuzz native-tests

help: ## show the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

setup: $(STAMP) ## make .venv with the nine distributions and the tools

$(STAMP): constraints.txt requirements-dev.txt requirements-nodeps.txt proto/setup.py kernels/setup.py scripts/system-packages $(wildcard kernels/native/*) dataplane/CMakeLists.txt $(wildcard dataplane/native/*/*.cc dataplane/native/*/*.h) $(wildcard proto/*/*.proto proto/*/*/*.proto) $(wildcard */pyproject.toml deploy/ray/pyproject.toml)
	scripts/system-packages
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -r requirements-dev.txt \
		-e ./proto -e ./kernels -e ./dataplane -e ./client -e ./lens -e './export[transformers]' -e ./server -e ./loadtest -e ./deploy/ray
	$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt -r requirements-nodeps.txt
	@$(BIN)/python -c "import attnserve_kernels as k; print('kernels:', k.instruction_set() or 'without operators: a C++ compiler is needed to build them')"
	@touch $@

demo: $(STAMP) ## export two models, serve them, call them, load-test them
	$(BIN)/python demo.py

test: $(STAMP) ## the tests, in three processes (about 6 minutes on 2 cores, then 5)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" $(SIDE_BY_SIDE)

check-all: lint test ## lint, all tests, the longest included, and the C++ under sanitizers
	scripts/native-tests all
	scripts/sanitized-server-tests
	$(BIN)/python -m pytest -m slow
	$(BIN)/python benchmarks/architecture_sweep.py --table docs/checkpoints.md

native-tests: $(STAMP) ## the C++ tests
	scripts/native-tests plain

fuzz: $(STAMP) ## the fuzz targets, FUZZ_SECONDS each (60)
	scripts/fuzz

wheels: $(STAMP) ## self-contained wheels of all distributions, in dist/
	scripts/wheels

bench: $(STAMP) ## the benchmarks; figures in reports/
	$(BIN)/python benchmarks/serving.py --json reports/serving.json --plots reports/serving
	$(BIN)/python benchmarks/dataplane.py --json reports/dataplane.json
	$(BIN)/python benchmarks/kernels.py --json reports/kernels.json --plots reports/kernels
	$(BIN)/python benchmarks/tokens.py --json reports/tokens.json
	$(BIN)/python benchmarks/decode.py --json reports/decode.json

lint: $(STAMP) ## ruff, mypy, clang-format and clang-tidy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	scripts/lint-native

format: $(STAMP) ## let ruff and clang-format format, and ruff fix
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	find dataplane/native -name '*.cc' -o -name '*.h' | xargs $(BIN)/clang-format -i

clean: ## remove everything made here
	rm -rf $(VENV) build dataplane/build dist models reports .pytest_cache .mypy_cache .ruff_cache .hypothesis
