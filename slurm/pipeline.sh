#!/usr/bin/env bash
# The whole path as dependent jobs: tune the teacher, cut it, warm the student up, train it jointly, evaluate both.
#   TEACHER=Qwen/Qwen2.5-Math-7B DATA=data/train.jsonl WORK=runs/padd \
#       slurm/pipeline.sh --nodes 2 --ntasks-per-node 8 --gpus-per-node 8 --cpus-per-task 8
# Arguments are sbatch's, for the three trainings. Variables:
#   TEACHER      folder or hub id of the dense model; with TUNED=1 it is tuned already, and the first job is left out
#   DATA, WORK   the problems, a .jsonl file; the folder for runs, models and results
#   CONVERT      options of padd-convert besides teacher, output and calibration file (default: as the run files)
#   EVAL         options of padd-eval besides model and output
#   CONVERT_JOB, EVAL_JOB   options of sbatch for the conversion (default none) and the evaluations (default --gpus 1)
#   CONFIGS      folder with teacher_grpo.yaml, warmup.yaml and joint.yaml (default ds_configs/runs)
#   CLUSTER and the other variables of slurm/jobs.sh reach every job
#   DRY_RUN=1    print the jobs instead of submitting them
set -euo pipefail
cd "$(dirname "$0")/.."
: "${TEACHER:?set TEACHER to the dense model}" "${DATA:?set DATA to the problems}" "${WORK:?set WORK to a folder}"
if [[ $DATA != *.jsonl || ! -f $DATA ]]; then
    echo "error: DATA=$DATA is no .jsonl file, which the calibration reads; write the problems to one, a row per line" >&2
    exit 2
fi
convert=${CONVERT:---experts 32 --shared-experts 8 --top-k 16 --calibration-field problem,solution
    --calibration-template chat-boxed}
evaluate=${EVAL:---benchmark math500 --data-dir data --max-new-tokens 3072}
configs=${CONFIGS:-ds_configs/runs}
models=$WORK/models
previous=

# submit NAME [VARIABLE=VALUE ...] -- WORDS OF SBATCH: behind the job before it; leaves its number in `previous`.
submit() {
    local name=$1 variables=ALL
    shift
    while [ "$1" != -- ]; do variables+=",$1"; shift; done
    shift
    local command=(sbatch --parsable --kill-on-invalid-dep=yes --job-name "padd-$name" --export "$variables"
        ${previous:+--dependency "afterok:$previous"} "$@")
    if [ "${DRY_RUN:-0}" = 1 ]; then
        previous=$name
        printf '%s\n' "${command[*]}"
    else
        previous=$("${command[@]}")
        echo "$name: job $previous"
    fi
}

tuned=$TEACHER
if [ "${TUNED:-0}" != 1 ]; then
    tuned=$models/teacher
    submit teacher-grpo CONFIG="$configs/teacher_grpo.yaml" EXPORT="$tuned" -- "$@" slurm/teacher_grpo.sbatch \
        run_dir="$WORK/teacher" model.student="$TEACHER" data.source="$DATA"
fi
# shellcheck disable=SC2086 # options are meant to be split
submit convert -- ${CONVERT_JOB-} slurm/convert.sbatch --teacher "$tuned" --output "$models/converted" \
    --calibration "$DATA" --calibration-part A $convert
submit warmup CONFIG="$configs/warmup.yaml" EXPORT="$models/warmed-up" -- "$@" slurm/warmup.sbatch \
    run_dir="$WORK/warmup" model.student="$models/converted" model.teacher="$tuned" data.source="$DATA"
submit joint CONFIG="$configs/joint.yaml" EXPORT="$models/joint" -- "$@" slurm/joint.sbatch \
    run_dir="$WORK/joint" model.student="$models/warmed-up" model.teacher="$tuned" data.source="$DATA"
trained=$previous
for model in "$tuned" "$models/joint"; do
    previous=$trained
    # shellcheck disable=SC2086
    submit "eval-$(basename "$model")" -- ${EVAL_JOB---gpus 1} slurm/eval.sbatch --model "$model" \
        --output "$WORK/results/$(basename "$model").json" $evaluate
done
