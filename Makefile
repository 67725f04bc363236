# Every target first sets up what it needs, on a fresh machine too; PYTHON and TORCH choose the interpreter and the build,
# as in `make test TORCH=torch==2.13.0`.
PYTHON ?= python3
TORCH ?= torch
VENV ?= .venv
# `make check RESOLUTION=lowest-direct VENV=.venv-lowest` takes the lowest versions that pyproject.toml names
RESOLUTION ?= highest
PYTEST_ARGS ?=
GPU_ARGS ?=
# tests that run at a time, on one thread each; as many as there are cores
WORKERS ?= $(shell $(PYTHON) -c "import os; print(os.cpu_count())")

BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo comfy gpu check test lint venv clean

# glibc keeps freed memory for the next training step instead of handing it back: 1.25x faster steps on a CPU
demo: export MALLOC_MMAP_THRESHOLD_ = 4294967296
demo: export MALLOC_TRIM_THRESHOLD_ = 17179869184
demo: export MALLOC_TOP_PAD_ = 1073741824
demo: venv
	$(BIN)/python -m phased_consistency.trainer.demo

# ComfyUI with the pack and the demo base: $COMFYUI_PATH, else comfy-cli's, which is installed where there is none
comfy: venv
	$(BIN)/python -m phased_consistency.trainer.comfy

# on a machine with a CUDA GPU: every promise that is made of one, as a table; GPU_ARGS are options of `pcm bench-gpu`
gpu: venv
	$(BIN)/python -m phased_consistency.trainer bench-gpu $(GPU_ARGS)

# what is fast (tests/conftest.py), between two edits
check: export OMP_NUM_THREADS = 1
check: lint
	$(BIN)/python -m pytest -n $(WORKERS) -m "not slow and not host and not web" $(PYTEST_ARGS)

# everything
test: export OMP_NUM_THREADS = 1
test: lint
	$(BIN)/python -m pytest -n $(WORKERS) $(PYTEST_ARGS)

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

venv: $(READY)

$(READY): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
ifeq ($(RESOLUTION),highest)
	$(BIN)/python -m pip install "$(TORCH)"
	$(BIN)/python -m pip install -e ".[train,test]"
else
	$(BIN)/python -m pip install uv
	$(BIN)/uv pip install --python $(BIN)/python --resolution $(RESOLUTION) -e ".[train,test]"
endif
	touch $(READY)

clean:
	rm -rf $(VENV) build out/demo phased_consistency.egg-info .pytest_cache .ruff_cache
