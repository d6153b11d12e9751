#!/usr/bin/env bash
# Runs a script on the ranks of a slurm job and ends the job as they ended; train.sbatch and evaluate.sbatch source it:
#
#     run_ranks OUTPUT_DIR SRUN_OPTION SCRIPT FLAGS
#
# The exit code is the one that rank 0 leaves in OUTPUT_DIR/exit_status.json, else srun's. After 75 (stopped by a signal,
# the same command goes on) the job is requeued, unless it was cancelled, or MAX_BARREN starts in a row left nothing
# behind: no checkpoint, no shard, nothing decoded. Slurm itself requeues a job whose node failed.
MAX_BARREN=3

progress() { # OUTPUT_DIR: changes with what a stopped start leaves to the next
    { ls -Rs "$1/checkpoints" "$1/shards" "$1/parts" 2>/dev/null || true; } | cksum
}

run_ranks() {
    local out="$1" before code=0 status
    log="$folder/$step-$SLURM_JOB_ID"
    before="$(progress "$out")"
    rm -f "$out/exit_status.json"
    unset RANK LOCAL_RANK WORLD_SIZE # of whoever submitted the job
    MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)"
    MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000)) # below the ports that systems hand out
    export MASTER_ADDR MASTER_PORT
    srun "$2" --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" --input=none --open-mode=append \
        --output="$log-rank%t.log" "$PYTHON" "${@:3}" || code=$?
    status="$(sed -n 's/.*"exit_code": \([0-9]*\).*/\1/p' "$out/exit_status.json" 2>/dev/null || true)"
    if [ -n "$status" ]; then
        sed -n 's/.*"message": /ended: /p' "$out/exit_status.json"
        code="$status"
    elif [ "$code" -eq 0 ]; then
        code=1
    fi
    if [ "$code" -eq 75 ]; then requeue "$before" "$(progress "$out")"; fi
    if [ "$code" -ne 0 ]; then echo "error: exit code $code; the ranks' logs: $log-rank*.log" >&2; fi
    exit "$code"
}

requeue() { # PROGRESS_BEFORE PROGRESS_NOW: does not return where the job is requeued
    local barren=0
    if [ "$(squeue --noheader --jobs "$SLURM_JOB_ID" --format %T)" != RUNNING ]; then
        echo "cancelled: not requeued; submitting the run again goes on" >&2
        return
    fi
    if [ "$1" = "$2" ]; then barren=$(($(cat "$log.barren" 2>/dev/null || echo 0) + 1)); fi
    echo "$barren" >"$log.barren"
    if [ "$barren" -ge "$MAX_BARREN" ]; then
        echo "error: $barren starts in a row left no checkpoint; not requeued: give more --time or a lower save_steps" >&2
        return
    fi
    echo "requeued"
    scontrol requeue "$SLURM_JOB_ID" && exit 75
}
