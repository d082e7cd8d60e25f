# Every target makes the virtual environment it needs; `make help` lists them.
PYTHON ?= $(firstword $(foreach p,python3 python3.12 python3.11 python3.10,$(if $(shell $(p) -c $(supported) 2>/dev/null && echo yes),$(p))))
PAIRS ?= 2000
OUT ?= demo

supported := 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))'
bin := .venv/bin
install := $(bin)/python -m pip install -qq --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help demo test check format bench bench-capfilt bench-engines bench-inference bench-faults train-tiny-clip train-tiny-blip clean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(firstword $(MAKEFILE_LIST)) | awk -F':.*## ' '{printf "  make %-18s%s\n", $$1, $$2}'

demo: .venv/.ready ## URL list to training data on a small procedural web; PAIRS=2000 OUT=demo
	$(bin)/pairmill demo --pairs $(PAIRS) --out $(OUT)

test: .venv/.ready-dev ## all tests, in two processes; ARGS="-k funnel" for some, ARGS=-n0 in one process
	$(bin)/python -m pytest -n 2 --dist loadgroup $(ARGS)

check: .venv/.ready-dev ## format, lint, types, import directions; changes nothing
	$(bin)/ruff format --check .
	$(bin)/ruff check .
	$(bin)/mypy
	$(bin)/lint-imports --no-cache

format: .venv/.ready-dev ## format the code and mend what ruff can mend
	$(bin)/ruff format .
	$(bin)/ruff check --fix .

bench: .venv/.ready-dev ## all benchmarks: a table each, and a dated JSON in benchmarks/results
	$(bin)/python benchmarks/run.py $(ARGS)

train-tiny-clip: .venv/.ready ## train the shipped model anew into out/clip-tiny
	$(bin)/pairmill train clip pairmill/weights/clip-tiny/train.yaml --set out=out/clip-tiny

train-tiny-blip: .venv/.ready ## train the shipped captioner and filter anew into out/, on one core each
	$(bin)/pairmill train captioner pairmill/weights/captioner-tiny/train.yaml & captioner=$$!; \
	$(bin)/pairmill train captioner pairmill/weights/itm-tiny/pretrain.yaml && \
	$(bin)/pairmill train filter pairmill/weights/itm-tiny/train.yaml && wait $$captioner

bench-capfilt: .venv/.ready-dev ## does training on what CapFilt mended beat training on what came? Three seeds
	$(bin)/python -m benchmarks.capfilt $(ARGS)

bench-engines: .venv/.ready-dev ## local, Ray and Beam side by side: overhead, memory, growth; ARGS="--rows 2000,20000,100000"
	$(bin)/python -m benchmarks.engines $(ARGS)

bench-inference: .venv/.ready-dev ## CLIP, captioner and matching head of real size against the plain loops of their libraries
	$(bin)/python -m benchmarks.inference $(ARGS)

bench-faults: .venv/.ready-dev ## nodes, workers and drivers killed at random times, ten runs of each: is the result the same?
	$(bin)/python -m benchmarks.faults $(ARGS)

clean: ## remove the environment, caches and the demo
	rm -rf .venv build dist demo *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/.ready: requirements.txt pyproject.toml
	@test -n "$(PYTHON)" || { echo "pairmill needs Python 3.10, 3.11 or 3.12, and found none of them; install one, or name it: make PYTHON=/path/to/python3.12 ..." >&2; exit 1; }
	@command -v $(PYTHON) >/dev/null || { echo "there is no $(PYTHON); name a Python 3.10, 3.11 or 3.12: make PYTHON=/path/to/python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c $(supported) || { echo "$(PYTHON) is `$(PYTHON) -V 2>&1`; pairmill needs Python 3.10, 3.11 or 3.12: make PYTHON=python3.12 ..." >&2; exit 1; }
	@echo "Setting up .venv from requirements.txt (the first time takes some minutes)" >&2
	@test -x $(bin)/python || $(PYTHON) -m venv .venv || { rm -rf .venv; echo "$(PYTHON) cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@$(install) -r requirements.txt
	@$(install) --no-deps --no-build-isolation --editable .
	@touch $@

.venv/.ready-dev: .venv/.ready requirements-dev.txt
	@$(install) -r requirements-dev.txt
	@touch $@
