# What the jobs have in common; sourced by them, from the folder that they were submitted in.
#
# In a training one task is one rank: --nodes and --ntasks-per-node (GPUs of a node) decide how many. Variables:
#   PADD_PYTHON    python of the environment (default .venv/bin/python)
#   PADD_LOGS      where the ranks' logs go (default slurm-logs/NAME-ID/rank-N.log)
#   OMP_NUM_THREADS, HF_HUB_OFFLINE   default: --cpus-per-task or 1, and 1
#   CLUSTER        cluster file, such as ds_configs/clusters/h100.yaml: padd-plan --validate then stands before the
#                  training, on the job's nodes and ranks, and a run that cannot fit is refused before anything loads
#   SERVER_NODES   so many of the job's nodes, the last ones, are servers of rollouts instead (default 0); the run says
#                  by vllm.exchange or vllm.transport how weights reach them
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
        command+=(--nodes "$((SLURM_JOB_NUM_NODES - servers))")
        command+=(--devices-per-node "$((SLURM_NTASKS / SLURM_JOB_NUM_NODES))")
    fi
    if [ "$servers" != 0 ]; then command+=(--server-nodes "$servers"); fi
    # Not the options of train.py.
    for argument in "${@:2}"; do if [[ $argument != --* ]]; then command+=("$argument"); fi; done
    echo "# ${command[*]}"
    "${command[@]}"
}

# joined WORDS: with commas between them.
joined() {
    local IFS=,
    echo "$*"
}

# serve NODES RUN.yaml ARGUMENTS: servers on these nodes, in the background; returns when $logs/servers.txt lists them.
serve() {
    local urls=$logs/servers code=0 serving
    rm -rf "$urls" "$logs/servers.txt"
    mkdir -p "$urls"
    # One task for a node, with all of it.
    # shellcheck disable=SC2016 # each task has its own number
    srun --nodes="$servers" --ntasks="$servers" --ntasks-per-node=1 --nodelist="$1" --kill-on-bad-exit=1 \
        --cpus-per-task="$((SLURM_NTASKS / SLURM_JOB_NUM_NODES * ${SLURM_CPUS_PER_TASK:-1}))" \
        --open-mode=append --output="$logs/serve-%t.log" \
        bash -c 'exec "$@" --urls "$0/$SLURM_PROCID"' "$urls" \
        "$python" -m padd_ds.serve --config "${@:2}" --logs "$logs" &
    serving=$!
    # However this script ends, its servers do.
    # shellcheck disable=SC2064 # the number is this one
    trap "kill $serving 2>/dev/null; wait $serving || true" EXIT
    until [ "$(find "$urls" -name '[0-9]*' | wc -l)" = "$servers" ]; do
        if ! kill -0 "$serving" 2>/dev/null; then
            wait "$serving" || code=$?
            echo "$(date -Is) no servers; the last lines of their logs:" >&2
            tail -n 3 "$logs"/serve-*.log >&2
            exit "$code"
        fi
        sleep 1
    done
    cat "$urls"/* >"$logs/servers.txt"
}

# train RUN.yaml ARGUMENTS: a rank per task.
train() {
    local nodes config run_dir code=0 servers=${SERVER_NODES:-0}
    local logs=${PADD_LOGS:-slurm-logs/${SLURM_JOB_NAME:-NAME}-${SLURM_JOB_ID:-ID}}
    if [ "$servers" != 0 ]; then set -- "$@" rollout.engine=vllm vllm.servers="$logs/servers.txt"; fi
    local train=("$python" padd_ds/train.py --config "$@" --resume-or-start)
    if [ "${DRY_RUN:-0}" = 1 ]; then
        echo "# ${SLURM_JOB_NUM_NODES:-?} nodes, ${SLURM_NTASKS_PER_NODE:-?} ranks on each"
        if [ "$servers" != 0 ]; then
            echo "# the last $servers of them serve: srun $python -m padd_ds.serve --config $* --logs $logs"
        fi
        echo "# srun ${train[*]}"
        if [ -n "${EXPORT:-}" ]; then echo "# padd-export, to $EXPORT"; fi
        "$python" padd_ds/train.py --config "$@" --show-config
        plan "$@"
        return
    fi
    if [ -z "${SLURM_NTASKS:-}" ]; then
        echo "error: how many ranks? give sbatch --ntasks-per-node, the GPUs of a node" >&2
        exit 2
    fi
    # Checks the configuration before any rank starts.
    config=$("$python" padd_ds/train.py --config "$@" --show-config)
    # The YAML alone: DeepSpeed's JSON follows it.
    run_dir=$(sed '/^# /,$d' <<<"$config" | "$python" -c 'import sys, yaml; print(yaml.safe_load(sys.stdin)["run_dir"])')
    plan "$@"
    mkdir -p "$logs"
    # Left by an earlier stop: should this attempt crash, it must not look stopped.
    rm -f "$run_dir/stopped.json"
    mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    local training=$((${#nodes[@]} - servers))
    if [ "$training" -lt 1 ]; then
        echo "error: SERVER_NODES $servers leaves none of the job's ${#nodes[@]} nodes for training; ask for more" >&2
        exit 2
    fi
    local ranks=$((SLURM_NTASKS / ${#nodes[@]} * training))
    MASTER_ADDR=${MASTER_ADDR:-$(scontrol show node "${nodes[0]}" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')}
    # A port by job keeps two jobs on one node apart.
    MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}
    export MASTER_ADDR MASTER_PORT
    echo "$(date -Is) attempt $((${SLURM_RESTART_COUNT:-0} + 1)), $ranks ranks on $SLURM_JOB_NODELIST, logs in $logs"
    # srun does not take this from sbatch.
    local step=(${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"})
    if [ "$servers" != 0 ]; then
        serve "$(joined "${nodes[@]:training}")" "$@"
        step+=(--nodes="$training" --ntasks="$ranks" --nodelist="$(joined "${nodes[@]:0:training}")")
    fi
    srun ${step[@]+"${step[@]}"} --kill-on-bad-exit=1 --open-mode=append --output="$logs/rank-%t.log" "${train[@]}" || code=$?
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
