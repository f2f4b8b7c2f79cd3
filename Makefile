# Each target sets up what it needs, in an environment of its own.

PYTHON ?= python3
VENV   ?= .venv
# What the tests were last run with; any torch that pyproject.toml allows will do: make test TORCH="torch torchvision"
TORCH  ?= torch==2.14.1 torchvision==0.29.1
BIN    := $(VENV)/bin

.PHONY: demo test test-oldest lint docs dist bench bars families sanitize gpu clean

demo: $(VENV)/train.done
	$(BIN)/grkan compare --config configs/demo.yaml --output runs/demo

# One thread a worker: the tests are many and small. A file stays in one worker, which then makes what its tests share once.
# pytest-xdist hangs if it replaces a crashed worker.
test: $(VENV)/test.done
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --max-worker-restart 0 --durations 10

# With the oldest versions that pyproject.toml allows: make test-oldest PYTHON=python3.10
OLDEST := .venv-oldest
test-oldest: $(OLDEST)/test.done
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -n 2 --dist loadfile --max-worker-restart 0 --durations 10

lint: $(VENV)/lint.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site, in build/docs.
docs: $(VENV)/docs.done
	$(BIN)/python -m sphinx -W --keep-going --quiet -b html docs build/docs

# What a release uploads, in dist, and whether it may.
dist: $(VENV)/release.done
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*
	if [ "$$(uname)" = Linux ]; then $(BIN)/auditwheel show dist/*.whl; fi

# Rivals side by side; nothing else should run meanwhile. docs/benchmarks.md explains the tables.
bench: $(VENV)/train.done
	mkdir -p build
	for suite in ops layers models; do $(BIN)/grkan bench $$suite --json build/bench-$$suite.json || exit; done

# The figures against benchmarks/bars.yaml: measured now, or those of files: make bars JSON="build/bench-*.json"
JSON ?=
bars: $(VENV)/train.done
	$(BIN)/python benchmarks/bars.py $(JSON)

# Every transformer family of timm and transformers, converted; takes about an hour. docs/families.md explains the table.
# What is in the file is not done again: make families ONLY="--only 'timm/*'"
FAMILIES := build/families.json
families: $(VENV)/test.done
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python benchmarks/families.py --json $(FAMILIES) $(ONLY)
	$(BIN)/python benchmarks/families.py --json $(FAMILIES) --table

# On a machine with a GPU: what the machine is, the tests of the GPU kernels, and their times; all in one file to send.
GPU_REPORT := build/gpu-report.txt
gpu: $(VENV)/test.done
	$(BIN)/python -c 'import sys, torch; torch.cuda.is_available() or sys.exit("make gpu: PyTorch finds no GPU")'
	mkdir -p build
	$(BIN)/python -m torch.utils.collect_env > $(GPU_REPORT)  # GPU, driver, torch, triton
	status=0; $(BIN)/python -m pytest -m gpu >> $(GPU_REPORT) 2>&1 || status=$$?; \
		for suite in ops layers models; do \
			$(BIN)/grkan bench $$suite --device cuda >> $(GPU_REPORT) 2>&1 || status=$$?; done; \
		cat $(GPU_REPORT); exit $$status

# The kernel's tests once more, with the address and undefined-behaviour sanitizers watching it. Takes some ten minutes.
SANITIZED := build/sanitized
SANITIZERS := -fsanitize=address,undefined -fno-sanitize-recover=undefined
sanitize: $(VENV)/test.done
	rm -rf $(SANITIZED)
	$(BIN)/pip install --quiet "setuptools>=77"
	CXXFLAGS="$(SANITIZERS) -fno-omit-frame-pointer" LDFLAGS="$(SANITIZERS)" $(BIN)/python setup.py --quiet build \
		--build-base $(SANITIZED)/objects --build-lib $(SANITIZED)/lib
	nm -D $(SANITIZED)/lib/grkan/libgrkan.so | grep -q __asan_report  # or nothing would be watched
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
		PYTHONPATH=$(SANITIZED)/lib OMP_NUM_THREADS=2 \
		$(BIN)/python -m pytest tests/rational/test_cpu.py tests/rational/test_reference.py tests/rational/test_op.py \
		tests/export/test_library.py \
		-k "not compile and not export and not opcheck" -p no:cacheprovider

clean:
	rm -rf $(VENV) $(OLDEST) build dist src/*.egg-info src/grkan/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/torch.done:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(TORCH)
	touch $@

# An editable install with one extra: train.done, test.done, lint.done, docs.done, release.done.
$(VENV)/%.done: $(VENV)/torch.done pyproject.toml setup.py $(wildcard csrc/*)
	$(BIN)/pip install --quiet --editable ".[$*]"
	touch $@

# uv can choose the lowest version of whatever pyproject.toml names; pip cannot.
$(OLDEST)/test.done: pyproject.toml setup.py $(wildcard csrc/*)
	$(PYTHON) -m venv --clear $(OLDEST)
	$(OLDEST)/bin/pip install --quiet uv
	$(OLDEST)/bin/uv pip install --quiet --python $(OLDEST) --resolution lowest-direct -r pyproject.toml --extra test
	$(OLDEST)/bin/uv pip install --quiet --python $(OLDEST) --no-deps --editable .
	touch $@
