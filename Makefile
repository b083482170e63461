# make install                                                  .venv with the pinned packages and the command beats-ray
# make demo [DATA=DIR|s3://...|gs://...] [BUDGET=minutes] [OUTPUT=DIR]   the whole chain on this machine
# make test | test-slow | test-gpu [PYTHON=...] | check | audit  tests, checks, known vulnerabilities of the pins
# make bench-gpu [PYTHON=...] | bench-guard                      speed on a GPU; speed and memory beside others', against stored ratios
# Every target makes .venv by itself, from the exact pins of constraints.txt, and again only when those change.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo test test-slow test-gpu bench-gpu bench-guard check audit format lock clean

UV_VERSION := 0.13.9
PIP_AUDIT_VERSION := 2.10.1
BIN := .venv/bin
STAMP := .venv/installed
# The first interpreter that is new enough; 3.11 is the tested one.
FIND_PYTHON := for name in python3.11 python3 python3.12 python3.13 python3.14; do \
	  if "$$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then echo "$$name"; exit 0; fi; done; \
	echo "no Python 3.11 or newer found; install python3.11 with its venv module" >&2; exit 1

BUDGET ?=
DATA ?=
OUTPUT ?=

help:
	@sed -n 's/^# //p' Makefile | head -5

install: $(STAMP)

demo: $(STAMP)
	@$(BIN)/beats-ray demo $(if $(DATA),--data "$(DATA)") $(if $(BUDGET),--budget "$(BUDGET)") $(if $(OUTPUT),--output "$(OUTPUT)")

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m "(unit or ray) and not slow"

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow --timeout 3600

# GPU machines often bring their own torch: name its interpreter with PYTHON.
ifdef PYTHON
test-gpu:
	PYTHONPATH=. $(PYTHON) -m pytest -m gpu

bench-gpu:
	@PYTHONPATH=. $(PYTHON) -m beats_ray bench gpu
else
test-gpu: $(STAMP)
	$(BIN)/python -m pytest -m gpu

bench-gpu: $(STAMP)
	@$(BIN)/beats-ray bench gpu
endif

bench-guard: $(STAMP)
	@$(BIN)/beats-ray bench guard

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy beats_ray
	$(BIN)/codespell
	$(BIN)/uv pip check --quiet --python $(BIN)/python

# A report, never a failure: it needs PyPI's vulnerability data, which not every mirror serves.
audit: $(STAMP)
	-$(BIN)/uv tool run --quiet pip-audit==$(PIP_AUDIT_VERSION) --no-deps --disable-pip -r constraints.txt

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# New pins: the newest versions that pyproject.toml allows.
lock: $(STAMP)
	$(BIN)/uv pip compile --quiet --upgrade --extra dev --python-version 3.11 --no-emit-index-url \
	  --custom-compile-command "make lock" pyproject.toml -o constraints.txt

# uv installs five times as fast as pip. Like pip it follows a configured mirror, unlike pip no additional index or
# folder: torch must be the CUDA build of the pinned release, which torchaudio links against.
$(STAMP): pyproject.toml constraints.txt
	@python=$$($(FIND_PYTHON)); \
	test -x $(BIN)/python || "$$python" -m venv .venv; \
	echo "installing $$(grep -c '==' constraints.txt) pinned packages into .venv ..."; \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION); \
	mirror=$$($(BIN)/python -m pip config list | sed -n "s/^[^=]*[.]index-url='\(.*\)'$$/\1/p" | tail -n 1); \
	if [ -n "$$mirror" ] && [ -z "$${UV_DEFAULT_INDEX:-}" ]; then export UV_DEFAULT_INDEX="$$mirror"; fi; \
	export VIRTUAL_ENV="$$PWD/.venv" UV_HTTP_TIMEOUT=300; \
	$(BIN)/uv pip install --quiet --link-mode hardlink --compile-bytecode -r constraints.txt; \
	$(BIN)/uv pip install --quiet --no-deps --no-build-isolation --editable .; \
	touch $(STAMP)

# Results under runs/ stay.
clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
