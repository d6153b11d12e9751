#!/usr/bin/env bash
# Runs a script on NPROC ranks of this machine:   PYTHON=python3 bash launch/run_ranks.sh SCRIPT FLAGS
#
# NPROC            number of ranks; default: one per GPU, 2 on a machine without
# LAUNCHER         deepspeed (default), torchrun, or python for one rank without a launcher
# MASTER_PORT      default: a free one
# SHUTDOWN_GRACE   seconds from TERM to KILL for ranks that outlive their launcher; default 60
#
# TERM, INT, HUP and USR2 go on to the ranks, and not to the launcher, which would kill or orphan them; USR1 goes on
# as USR2. The exit code is the one that rank 0 leaves in OUTPUT_DIR/exit_status.json, because torchrun turns every
# failure into 1 and deepspeed calls a killed job a success. Without that file it is 75 for a job that a signal ended
# while it started, else the launcher's, but never 0.
set -euo pipefail
: "${PYTHON:?names the Python interpreter; start launch/train.sh or launch/evaluate.sh}"
script="$1"
shift
if [[ " $* " == *" --help "* ]]; then exec "$PYTHON" "$script" "$@"; fi

# Launchers put ranks into sessions of their own, and a rank whose launcher died has lost its parent: what all
# processes of this job keep is a mark in their environment.
mark="VOXTRAL_DIST_JOB=$$-$(date +%s%N)"

processes() { # all of this job
    grep -lzsxF "$mark" /proc/[0-9]*/environ | tr -dc '0-9\n' || true
}

is_rank() { # PID
    grep -qzsxF "$mark" "/proc/$1/environ" && grep -qzs '^RANK=' "/proc/$1/environ"
}

ranks() { # without the helper processes that ranks start
    local pid
    for pid in $(processes); do
        if is_rank "$pid" && ! is_rank "$(sed -n 's/^PPid:\t//p' "/proc/$pid/status")"; then echo "$pid"; fi
    done 2>/dev/null
}

stopped=""
pass_on() { # SIGNAL: to the ranks, or to the launcher before there are any
    local pids
    stopped=yes
    pids="$(ranks)"
    kill -s "$1" ${pids:-$! $(processes)} 2>/dev/null || true
}

wait_until_gone() { # SECONDS
    local tick
    for ((tick = 0; tick < 5 * $1; tick++)); do
        if [ -z "$(processes)" ]; then return 0; fi
        sleep 0.2
    done
    return 1
}

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
if [ -n "$status_file" ]; then rm -f "$status_file"; fi

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
if ! port="$("$PYTHON" -c "$bind" "${MASTER_PORT:-0}" 2>/dev/null)"; then
    echo "error: MASTER_PORT=${MASTER_PORT:-} is in use or no port; leave it out and a free one is taken" >&2
    exit 2
fi
unset RANK LOCAL_RANK WORLD_SIZE MASTER_ADDR MASTER_PORT

devices=(--num_gpus "$NPROC")
if [ "$gpus" -gt 0 ] && [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then # --num_gpus would count from 0 again
    devices=(--include "localhost:$(cut -d , -f "-$NPROC" <<<"$CUDA_VISIBLE_DEVICES")")
    if [[ "$CUDA_VISIBLE_DEVICES" == *[!0-9,]* ]]; then : "${LAUNCHER:=torchrun}"; fi # deepspeed knows no UUIDs
fi
case "${LAUNCHER:=deepspeed}" in
    deepspeed)
        command=("$PYTHON" -m deepspeed.launcher.runner -q --hostfile /dev/null "${devices[@]}" --no_local_rank
            --master_addr 127.0.0.1 --master_port "$port") ;;
    torchrun)
        command=("$PYTHON" -m torch.distributed.run --nnodes 1 --nproc-per-node "$NPROC"
            --master-addr 127.0.0.1 --master-port "$port" --) ;; # without -- it reads abbreviations out of FLAGS
    python)
        command=(env RANK=0 LOCAL_RANK=0 WORLD_SIZE=1 MASTER_ADDR=127.0.0.1 MASTER_PORT="$port" "$PYTHON") ;;
    *)
        echo "error: LAUNCHER=$LAUNCHER is not deepspeed, torchrun or python" >&2
        exit 2 ;;
esac

for signal in TERM INT HUP USR2; do trap "pass_on $signal" "$signal"; done
trap "pass_on USR2" USR1
set -m # a process group of its own: Ctrl-C then reaches this script alone
env "$mark" "${command[@]}" "$script" "$@" </dev/null &
set +m
launcher=$!
set +e
while kill -0 "$launcher" 2>/dev/null; do wait "$launcher"; done # a signal ends wait early
wait "$launcher"
code=$?

orphans=""
if ! wait_until_gone 1; then
    orphans="$(ranks)"
    echo "error: the launcher is gone (exit code $code) and left processes; ending them" >&2
    pass_on TERM
    stopped=""
    wait_until_gone "${SHUTDOWN_GRACE:-60}" || kill -s KILL $(processes) 2>/dev/null
    wait_until_gone 5
fi
if [ -f "$status_file" ]; then
    code="$(sed -n 's/.*"exit_code"[[:space:]]*:[[:space:]]*\([0-9]\{1,3\}\).*/\1/p' "$status_file")"
    exit "${code:-1}"
fi
if [ -n "$stopped" ] && [ -n "$status_file" ]; then exit 75; fi
if [ "$code" -eq 0 ] && [ -n "$status_file$orphans" ]; then
    echo "error: the launcher reports success but rank 0 left no ${status_file:-exit code}; taken as a failure" >&2
    exit 1
fi
exit "$code"
