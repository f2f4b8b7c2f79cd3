# Each target sets up what it needs, in an environment of its own.

PYTHON ?= python3
VENV   ?= .venv
# What the tests were last run with; any torch that pyproject.toml allows will do: make test TORCH="torch torchvision"
TORCH  ?= torch==2.14.1 torchvision==0.29.1
BIN    := $(VENV)/bin

.PHONY: demo test lint clean

demo: $(VENV)/train.done
	$(BIN)/python -m grkan.train.compare --config configs/demo.yaml --output runs/demo

# One thread a worker: the tests are many and small.
test: $(VENV)/test.done
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

lint: $(VENV)/lint.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/torch.done:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade "setuptools>=77" wheel
	$(BIN)/pip install --quiet $(TORCH)
	touch $@

# An editable install with one extra: train.done, test.done, lint.done.
$(VENV)/%.done: $(VENV)/torch.done pyproject.toml
	$(BIN)/pip install --quiet --no-build-isolation --editable ".[$*]"
	touch $@
