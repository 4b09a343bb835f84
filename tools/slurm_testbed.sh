#!/usr/bin/env bash
# A real Slurm of two nodes on this host: tools/slurm_testbed.sh start|stop DIR
# Needs the Debian packages slurm-wlm and munge, and root. DIR keeps configuration, logs and state.
set -euo pipefail
action=${1:?start or stop}
dir=$(realpath -m "${2:?folder}")
host=$(hostname -s)
cpus=$(nproc)

stop() {
    # Jobs first: their processes would outlive the daemons.
    if [ -f "$dir/slurmctld.pid" ]; then
        export SLURM_CONF=$dir/slurm.conf
        squeue --noheader --format %A | xargs --no-run-if-empty scancel || true
        for _ in $(seq 20); do [ -n "$(squeue --noheader)" ] && sleep 1; done
    fi
    for name in slurmd-n1 slurmd-n2 slurmctld munged; do
        [ -f "$dir/$name.pid" ] && kill "$(cat "$dir/$name.pid")" 2>/dev/null || true
    done
    rm -f "$dir"/*.pid
}

start() {
    for tool in slurmctld slurmd munged; do
        command -v "$tool" >/dev/null || { echo "error: $tool not found; apt-get install slurm-wlm munge" >&2; exit 2; }
    done
    # Without the jobs of an earlier test bed.
    rm -rf "$dir/state"
    mkdir -p "$dir"/{state,spool-n1,spool-n2,munge}
    chmod 700 "$dir/munge"
    [ -f "$dir/munge/key" ] || { head -c 1024 /dev/urandom >"$dir/munge/key"; chmod 400 "$dir/munge/key"; }
    munged --force --key-file "$dir/munge/key" --socket "$dir/munge/socket" --pid-file "$dir/munged.pid" \
        --log-file "$dir/munge/log" --seed-file "$dir/munge/seed"
    cat >"$dir/slurm.conf" <<CONF
ClusterName=testbed
SlurmctldHost=$host
AuthType=auth/munge
AuthInfo=socket=$dir/munge/socket,cred_expire=5
CredType=cred/munge
SlurmUser=root
SlurmctldPort=6827
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd-%n.pid
# A requeued job waits as long as a credential lives, so that is short; KillWait is what a rank has after SIGTERM.
KillWait=10
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool-%n
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SchedulerType=sched/backfill
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
# Both nodes stand on the same processors, so each owns all of them.
NodeName=n1 NodeHostname=$host NodeAddr=127.0.0.1 Port=17001 CPUs=$cpus State=UNKNOWN
NodeName=n2 NodeHostname=$host NodeAddr=127.0.0.1 Port=17002 CPUs=$cpus State=UNKNOWN
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
CONF
    export SLURM_CONF=$dir/slurm.conf
    slurmctld
    slurmd -N n1
    slurmd -N n2
    for _ in $(seq 30); do
        [ "$(sinfo --noheader --format %T 2>/dev/null)" = idle ] && { sinfo; echo "export SLURM_CONF=$SLURM_CONF"; return; }
        sleep 1
    done
    echo "error: the nodes did not come up; see the logs in $dir" >&2
    exit 1
}

"$action"
