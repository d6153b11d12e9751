#!/usr/bin/env bash
# Runs a script on the ranks of one machine or several:   PYTHON=python3 bash launch/run_ranks.sh SCRIPT FLAGS
#
# One machine      nothing more to say
# Several          HOSTFILE=launch/hostfile, started on the first of them: reaches the others over ssh, see
#                  launch/hostfile.example
# Several, by hand NNODES=2 NODE_RANK=0 MASTER_ADDR=node-1 MASTER_PORT=29500, the same command on each of them with its
#                  own NODE_RANK; LAUNCHER is torchrun then
# In a slurm step  of several tasks each task is a rank, without a launcher: srun --ntasks-per-node=8 bash launch/train.sh
#
# NPROC            number of ranks of this machine; default: one per GPU, 2 on a machine without
# LAUNCHER         deepspeed (default), torchrun, or python for one rank without a launcher
# MASTER_PORT      default: a free one
# SHUTDOWN_GRACE   seconds from TERM to KILL for ranks that outlive their launcher or this script; default 60
#
# TERM, INT, HUP and USR2 go on to all ranks, USR1 as USR2, and the exit code is the one of rank 0: launch/supervise.py.
# Whatever is killed, this script too, no process of the job is left on any machine: launch/guard.py.
set -euo pipefail
: "${PYTHON:?names the Python interpreter; start launch/train.sh or launch/evaluate.sh}"
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
script="$1"
shift
if [[ " $* " == *" --help "* ]]; then exec "$PYTHON" "$script" "$@"; fi

fail() {
    echo "error: $*" >&2
    exit 2
}

if [ -n "${SLURM_STEP_ID:-}" ] && [ "${SLURM_STEP_NUM_TASKS:-1}" -gt 1 ] && [ -z "${LAUNCHER:-}" ]; then
    if [ -z "${MASTER_ADDR:-}" ]; then
        MASTER_ADDR="$(scontrol show hostnames "$SLURM_STEP_NODELIST" 2>/dev/null | sed -n 1p)" ||
            fail "no MASTER_ADDR and no scontrol that names the nodes; export MASTER_ADDR before srun"
    fi
    export MASTER_ADDR MASTER_PORT="${MASTER_PORT:-$((10000 + SLURM_JOB_ID % 20000))}" # below what systems hand out
    exec "$PYTHON" "$script" "$@"
fi

flag_value() { # NAME FLAGS: the last value of --NAME VALUE or --NAME=VALUE
    local name="--$1" value="" previous=""
    for word in "${@:2}"; do
        if [ "$previous" = "$name" ]; then value="$word"; fi
        if [[ "$word" == "$name="* ]]; then value="${word#*=}"; fi
        previous="$word"
    done
    echo "$value"
}

output_dir="$(flag_value output_dir "$@")"
config="$(flag_value config "$@")"
if [ -z "$output_dir" ] && [ -f "$config" ]; then
    output_dir="$(sed -n "s/^output_dir:[[:space:]]*//p" "$config" | tr -d "\"'")"
fi
status_file="${output_dir:+$output_dir/exit_status.json}"
if [[ " $*" =~ " --dry_run"|" --debug" ]]; then status_file=""; fi # which leave the run directory alone
grace="${SHUTDOWN_GRACE:-60}"

if [ -n "${HOSTFILE:-}" ]; then
    exec "$PYTHON" "$here/on_hosts.py" "$HOSTFILE" "$status_file" "$grace" "$script" "$@"
fi

nodes="${NNODES:-1}" node="${NODE_RANK:-0}"
if [ "$nodes" -gt 1 ]; then
    : "${LAUNCHER:=torchrun}" "${MASTER_PORT:=29500}"
    [ -n "${MASTER_ADDR:-}" ] || fail "NNODES=$nodes but no MASTER_ADDR; set it to the address of the machine with NODE_RANK=0"
    [ -n "${NODE_RANK:-}" ] && [ "$node" -lt "$nodes" ] ||
        fail "NODE_RANK=${NODE_RANK:-}; each of NNODES=$nodes machines takes its own, from 0 to $((nodes - 1))"
fi
gpus=0
if [ -e /dev/nvidia0 ] || command -v nvidia-smi >/dev/null; then
    gpus="$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')"
fi
if [ "$gpus" -eq 0 ]; then export DS_ACCELERATOR=cpu; fi
NPROC="${NPROC:-$((gpus > 0 ? gpus : 2))}"
cores="$(nproc)"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores > NPROC ? cores / NPROC : 1))}"
bind='import socket, sys; s, port = socket.socket(), int(sys.argv[1]) # one whose last user is just gone is free
s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, port > 0); s.bind(("", port)); print(s.getsockname()[1])'
port="${MASTER_PORT:-0}" address="${MASTER_ADDR:-127.0.0.1}"
if [ "$nodes" -eq 1 ]; then address=127.0.0.1; fi
if [ "$node" -eq 0 ] && ! port="$("$PYTHON" -c "$bind" "$port" 2>/dev/null)"; then
    fail "MASTER_PORT=${MASTER_PORT:-} is in use or no port; leave it out and a free one is taken"
fi

world() { # RANKS_OF_EACH_MACHINE: as deepspeed's launcher on each machine reads it
    local slots host=0 text=""
    for slots in ${1//,/ }; do
        text+="${text:+, }\"node-$((host++))\": [$(seq -s , 0 $((slots - 1)))]"
    done
    base64 -w 0 <<<"{$text}" | tr '+/' '-_'
}

devices=(--num_gpus "$NPROC")
if [ "$gpus" -gt 0 ] && [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then # --num_gpus would count from 0 again
    devices=(--include "localhost:$(cut -d , -f "-$NPROC" <<<"$CUDA_VISIBLE_DEVICES")")
    if [[ "$CUDA_VISIBLE_DEVICES" == *[!0-9,]* ]]; then : "${LAUNCHER:=torchrun}"; fi # deepspeed knows no UUIDs
fi
case "${LAUNCHER:=deepspeed}/$((nodes > 1))" in
    deepspeed/0)
        command=("$PYTHON" -m deepspeed.launcher.runner -q --hostfile /dev/null "${devices[@]}" --no_local_rank
            --master_addr "$address" --master_port "$port") ;;
    deepspeed/1) # what deepspeed --hostfile starts on each machine
        slots="${SLOTS:-$(printf "$NPROC,%.0s" $(seq "$nodes"))}"
        command=("$PYTHON" -u -m deepspeed.launcher.launch "--world_info=$(world "$slots")" --node_rank "$node"
            --master_addr "$address" --master_port "$port" --no_local_rank --quiet) ;;
    torchrun/?)
        command=("$PYTHON" -m torch.distributed.run --nnodes "$nodes" --node-rank "$node" --nproc-per-node "$NPROC"
            --master-addr "$address" --master-port "$port" --) ;; # without -- it reads abbreviations out of FLAGS
    python/0)
        command=(env RANK=0 LOCAL_RANK=0 WORLD_SIZE=1 MASTER_ADDR="$address" MASTER_PORT="$port" "$PYTHON") ;;
    *)
        fail "LAUNCHER=$LAUNCHER is not deepspeed, torchrun or python${NNODES:+ (one machine only)}" ;;
esac
unset RANK LOCAL_RANK WORLD_SIZE MASTER_ADDR MASTER_PORT
exec "$PYTHON" "$here/supervise.py" --status "$status_file" --node_rank "$node" --grace "$grace" ${CONTROL:+--control} \
    -- "${command[@]}" "$script" "$@"
