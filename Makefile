# Everything runs from .venv, which these targets create; a fresh machine needs Python >= 3.11 and make.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
STAMP := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help install demo test lint format types unit fuzz torture proto bench results conformance clean

help: ## Show this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | sort | awk -F'\t' '{printf "  make %-12s %s\n", $$1, $$2}'

install: $(STAMP) ## Create .venv with the project, torch (CPU) and the tools

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade -c constraints.txt pip
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench,hf,server]' --group dev
	@touch $(STAMP)

demo: $(STAMP) ## Train tables on disk on this machine's own text, against the zero-table control
	$(BIN)/engram-store demo

test: lint types unit ## Lint, types and every test

lint: $(STAMP) ## ruff: style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP) ## Let ruff rewrite the formatting
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(STAMP) ## mypy, strict
	$(BIN)/mypy

TEST_WORKERS ?= 2
unit: $(STAMP) ## pytest, with TEST_WORKERS (2) processes
	$(BIN)/pytest -q -n $(TEST_WORKERS) --dist worksteal

FUZZ_SECONDS ?= 60
fuzz: $(STAMP) ## Search every parser of outside bytes for bugs, FUZZ_SECONDS (60) each
	$(BIN)/python -m tests.fuzz fuzz --seconds $(FUZZ_SECONDS) $(FUZZ_TARGETS)

CRASH_IMAGES ?= 1000000
torture: $(STAMP) ## The long versions, for hours: CRASH_IMAGES (a million) images, every fault, kill and power cut
	$(BIN)/python -m tests.crash.torture --images $(CRASH_IMAGES)
	$(BIN)/pytest -q -m torture -o faulthandler_timeout=0 tests/crash

proto: $(STAMP) ## Generate engram_store/v1 from proto/ again
	$(BIN)/python -m grpc_tools.protoc -Iproto --python_out=. --pyi_out=. --grpc_python_out=. --mypy_grpc_out=. \
		--plugin=protoc-gen-mypy_grpc=$(BIN)/protoc-gen-mypy_grpc proto/engram_store/v1/store.proto

BENCHES := window update growth cold ipc writes recover train hitrate
bench: $(STAMP) ## Speed, cold reads, recovery and bytes written, each beside its references
	for bench in $(BENCHES); do $(BIN)/engram-store bench $$bench || exit 1; done

RESULTS_DIR ?= build/results
results: $(STAMP) ## The experiments of docs/results.md anew, for hours, and its tables and plots
	$(BIN)/python -m benchmarks.shape --records $(RESULTS_DIR)/shape.jsonl run --dir $(RESULTS_DIR)
	cp $(RESULTS_DIR)/shape.jsonl benchmarks/results/shape.jsonl
	$(BIN)/python -m benchmarks.shape report

conformance: $(STAMP) ## Every golden vector of the published recipes
	$(BIN)/engram-store conformance tests/golden

clean: ## Remove .venv and caches
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist
