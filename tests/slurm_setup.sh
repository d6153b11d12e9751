#!/usr/bin/env bash
# A small slurm of this machine, for tests/test_slurm.py; as root:
#
#     bash tests/slurm_setup.sh start DIR     two nodes, n1 and n2, all files in DIR; then export SLURM_CONF=DIR/slurm.conf
#     bash tests/slurm_setup.sh stop DIR
#
# Debian's slurm-wlm and munge are installed where they are missing. Nothing outside DIR is written to: the daemons have
# ports, sockets and a munge key of their own, and the names of the nodes are in an /etc/hosts that they alone see. Exit
# code 77 and one line: it cannot be had here.
set -euo pipefail
action="$1"
dir="$(realpath -m "$2")"

cannot() {
    echo "no slurm here: $*" >&2
    exit 77
}

install() {
    if command -v slurmctld slurmd munged >/dev/null; then return; fi
    [ -n "$(command -v apt-get)" ] || cannot "slurmctld and munged are missing, and so is apt-get"
    flock /tmp/apt.lock apt-get install -qq -y --no-install-recommends slurm-wlm munge >"$dir/apt.log" 2>&1 ||
        { flock /tmp/apt.lock apt-get update -qq && flock /tmp/apt.lock \
            apt-get install -qq -y --no-install-recommends slurm-wlm munge; } >>"$dir/apt.log" 2>&1 ||
        cannot "apt-get could not install slurm-wlm and munge: $(tail -n 1 "$dir/apt.log")"
}

free_port() {
    python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

configure() { # short waits; 16 CPUs a node, whatever there is
    cat >"$dir/slurm.conf" <<END
ClusterName=test
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=$(free_port)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$dir/munge/socket,cred_expire=5
CryptoType=crypto/munge
StateSaveLocation=$dir/state
SlurmctldPidFile=$dir/slurmctld.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdSpoolDir=$dir/spool-%n
SlurmdPidFile=$dir/slurmd-%n.pid
SlurmdLogFile=$dir/slurmd-%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=bf_interval=1,sched_interval=1,sched_min_interval=0,batch_sched_delay=0
KillWait=20
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
MinJobAge=600
ReturnToService=2
GresTypes=gpu
NodeName=n1 NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 Port=$(free_port) CPUs=16 Gres=gpu:2
NodeName=n2 NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 Port=$(free_port) CPUs=16 Gres=gpu:2
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=1:00:00 State=UP PriorityTier=1 GraceTime=30
PartitionName=urgent Nodes=n1,n2 MaxTime=1:00:00 State=UP PriorityTier=9
END
    echo "Name=gpu File=/dev/null,/dev/zero" >"$dir/gres.conf" # to be counted as GPUs
    { cat /etc/hosts && echo "127.0.0.1 n1 n2"; } >"$dir/hosts"
}

start() {
    [ "$(id -u)" = 0 ] || cannot "it takes root"
    mkdir -p "$dir/state" "$dir/munge" "$dir/spool-n1" "$dir/spool-n2"
    install
    unshare --mount true 2>/dev/null || cannot "mount namespaces are not allowed"
    configure
    (umask 077 && head -c 1024 /dev/urandom >"$dir/munge/key")
    munged --force --socket="$dir/munge/socket" --key-file="$dir/munge/key" --pid-file="$dir/munge/pid" \
        --log-file="$dir/munge/log" --seed-file="$dir/munge/seed" >"$dir/start.log" 2>&1 ||
        cannot "munged: $(tail -n 1 "$dir/start.log")"
    export SLURM_CONF="$dir/slurm.conf"
    slurmctld >>"$dir/start.log" 2>&1 || cannot "slurmctld: $(tail -n 1 "$dir/start.log")"
    for node in n1 n2; do
        unshare --mount bash -c "mount --bind '$dir/hosts' /etc/hosts && exec slurmd -N $node" >>"$dir/start.log" 2>&1 ||
            cannot "slurmd $node: $(tail -n 1 "$dir/start.log")"
    done
    for _ in $(seq 60); do
        if [ "$(sinfo --noheader --format %T)" = idle ]; then return; fi
        sleep 0.5
    done
    cannot "the nodes do not answer: $(sinfo --noheader --format '%N %T %E')"
}

alive() { # PID
    grep -qs '^State:.[^Z]' "/proc/$1/status"
}

stop() {
    local pids pid
    pids="$(cat "$dir"/slurmd-n?.pid "$dir/slurmctld.pid" "$dir/munge/pid" 2>/dev/null || true)"
    for pid in $pids; do kill "$pid" 2>/dev/null || true; done
    for pid in $pids; do
        for _ in $(seq 100); do
            alive "$pid" || break
            sleep 0.1
        done
    done
}

case "$action" in
    start | stop) "$action" ;;
    *) cannot "$action is neither start nor stop" ;;
esac
