# What the jobs have in common; sourced by them, from the folder that they were submitted in.
#
# In a training one task is one rank: --nodes and --ntasks-per-node (GPUs of a node) decide how many. Variables:
#   PADD_PYTHON    python of the environment (default .venv/bin/python)
#   PADD_LOGS      where the ranks' logs go (default slurm-logs/NAME-ID/rank-N.log)
#   OMP_NUM_THREADS, HF_HUB_OFFLINE   default: --cpus-per-task or 1, and 1
#   CLUSTER        cluster file, such as ds_configs/clusters/h100.yaml: padd-plan --validate then stands before the
#                  training, on the job's nodes and ranks, and a run that cannot fit is refused before anything loads
#   EXPORT         folder for the finished run as a Hugging Face checkpoint (default: none is written)
#   MASTER_ADDR    how the nodes reach the first one (default: its address in Slurm), MASTER_PORT likewise
#   DRY_RUN=1      print what would run and the resolved configuration, with or without Slurm
# A run that a signal stops saves itself and is put back in the queue; the same job then goes on.

python=${PADD_PYTHON:-.venv/bin/python}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}} HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}

# single MODULE ARGUMENTS: one process of one of the other commands.
single() {
    local command=("$python" -m "$@")
    if [ "${DRY_RUN:-0}" = 1 ]; then echo "# ${command[*]}"; else exec "${command[@]}"; fi
}

# plan RUN.yaml ARGUMENTS: code 2 where CLUSTER is set and the run cannot fit there.
plan() {
    local argument command=("$python" -m padd_ds.plan --config "$1" --cluster "${CLUSTER:-}" --validate)
    if [ -z "${CLUSTER:-}" ]; then return; fi
    if [ -n "${SLURM_NTASKS:-}" ]; then
        command+=(--nodes "$SLURM_JOB_NUM_NODES" --devices-per-node "$((SLURM_NTASKS / SLURM_JOB_NUM_NODES))")
    fi
    # Not the options of train.py.
    for argument in "${@:2}"; do if [[ $argument != --* ]]; then command+=("$argument"); fi; done
    echo "# ${command[*]}"
    "${command[@]}"
}

# train RUN.yaml ARGUMENTS: a rank per task.
train() {
    local logs first run_dir code=0
    local train=("$python" padd_ds/train.py --config "$@" --resume-or-start)
    if [ "${DRY_RUN:-0}" = 1 ]; then
        echo "# ${SLURM_JOB_NUM_NODES:-?} nodes, ${SLURM_NTASKS_PER_NODE:-?} ranks on each"
        echo "# srun ${train[*]}"
        if [ -n "${EXPORT:-}" ]; then echo "# padd-export, to $EXPORT"; fi
        "$python" padd_ds/train.py --config "$@" --show-config
        plan "$@"
        return
    fi
    # Checks the configuration before any rank starts.
    run_dir=$("$python" padd_ds/train.py --config "$@" --show-config | sed -n "s/^run_dir: //p")
    plan "$@"
    logs=${PADD_LOGS:-slurm-logs/$SLURM_JOB_NAME-$SLURM_JOB_ID}
    mkdir -p "$logs"
    # Left by an earlier stop: should this attempt crash, it must not look stopped.
    rm -f "$run_dir/stopped.json"
    first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    MASTER_ADDR=${MASTER_ADDR:-$(scontrol show node "$first" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')}
    # A port by job keeps two jobs on one node apart.
    MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}
    export MASTER_ADDR MASTER_PORT
    echo "$(date -Is) attempt $((${SLURM_RESTART_COUNT:-0} + 1)), $SLURM_NTASKS ranks on $SLURM_JOB_NODELIST, logs in $logs"
    srun --kill-on-bad-exit=1 --open-mode=append --output="$logs/rank-%t.log" "${train[@]}" || code=$?
    # Not the code: ranks that were a little late to end are killed, and srun then tells of that.
    if [ "$code" != 0 ] && [ -e "$run_dir/stopped.json" ]; then
        echo "$(date -Is) stopped and saved; back in the queue"
        scontrol requeue "$SLURM_JOB_ID"
        exit 0
    elif [ "$code" != 0 ]; then
        echo "$(date -Is) ended with exit code $code; the last lines of the logs:" >&2
        tail -n 3 "$logs"/rank-*.log >&2
        exit "$code"
    elif [ -n "${EXPORT:-}" ]; then
        "$python" -m padd_ds.export --run "$run_dir" --output "$EXPORT" --overwrite
    fi
}
