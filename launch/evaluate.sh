#!/usr/bin/env bash
# Scores on this machine:   bash launch/evaluate.sh --model_id DIR --lora_dir RUN --val_shards a,b,c ...
# On several:               HOSTFILE=launch/hostfile bash launch/evaluate.sh --model_id DIR ...
# NPROC, LAUNCHER, other ways to several machines and the exit code are explained in launch/run_ranks.sh;
# bash launch/evaluate.sh --help lists the flags.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
. "$here/setup.sh" run
exec bash "$here/run_ranks.sh" "$here/evaluate.py" "$@"
