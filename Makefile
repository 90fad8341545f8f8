# make demo: set up .venv and run the main job on the embedded target. make test: set up and test.
# PYTHON picks the interpreter (3.11). TORCH_INDEX names a package index with CPU builds of torch: without one, PyPI's
# torch brings gigabytes of CUDA along (a plain `make demo TORCH_INDEX=<PyTorch's CPU wheel index>` avoids it).
# make gpu-test: what only a GPU shows, in minutes on a free H200, with the two environments of the README's "On a GPU"
# (GPU_PYTHON also needs pytest, pytest-xdist, hypothesis, psutil). Without a GPU the same tests are rehearsed by
# `make gpu-test GPU_TEST=rehearsal GPU_PYTHON=.venv/bin/python BRIDGE_PYTHON=.venv/bin/python GPU_TEST_ARGS=`.
PYTHON ?= python3.11
export TORCH_INDEX ?=
REQ := feature_bridge/requirements
PIP := .venv/bin/pip install --quiet --disable-pip-version-check
PYTEST_ARGS ?= -n 2 --dist loadfile
GPU_PYTHON ?= trainer/bin/python
BRIDGE_PYTHON ?= bridge/bin/python
GPU_TEST ?= gpu
GPU_TEST_ARGS ?= -n 5 --dist loadfile --timeout 290

.PHONY: demo test gpu-test lint setup clean

demo: setup
	.venv/bin/python -m jaxdraft.train --config tiny_qwen35vl.py $(ARGS)

test: setup lint
	.venv/bin/python -m pytest $(PYTEST_ARGS)

gpu-test:
	JAXDRAFT_GPU_TEST=$(GPU_TEST) JAXDRAFT_BRIDGE_PYTHON=$(BRIDGE_PYTHON) \
	    $(GPU_PYTHON) -m pytest -m gpu $(GPU_TEST_ARGS) tests/gpu

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/lint-imports

setup: .venv/.ready

.venv/.ready: pyproject.toml Makefile $(wildcard $(REQ)/*.txt) tests/peers.txt
	$(PYTHON) -m venv .venv
	$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch==2.13.0
	$(PIP) -c $(REQ)/constraints-py311.txt -r $(REQ)/cpu.txt -e '.[test]'
	$(PIP) --no-deps -r $(REQ)/cpu-no-deps.txt -r tests/peers.txt
	touch $@

clean:
	rm -rf .venv runs .cache
