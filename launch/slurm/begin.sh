#!/usr/bin/env bash
# What every job of launch/slurm begins with; the job scripts source it:   . "$root/launch/slurm/begin.sh"
# It names the job in its log, tells whether the code is what it was at the submission, and finds "$PYTHON".
echo "== $(date '+%F %T') job $SLURM_JOB_ID (start $((${SLURM_RESTART_COUNT:-0} + 1))) on $SLURM_JOB_NODELIST"
code_now="$(git -C "$root" describe --always --dirty --abbrev=40 --exclude='*' 2>/dev/null || true)"
if [ -n "$code_now" ] && [ "$code_now" != "$code" ]; then
    echo "warning: submitted with the code at ${code:-an unknown commit}, this start runs it at $code_now" >&2
fi
. "$root/launch/setup.sh" run
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$SLURM_CPUS_PER_TASK}"
