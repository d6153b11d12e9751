#!/usr/bin/env bash
# Trains on this machine:   bash launch/train.sh --model_id DIR --train_shards a,b,c --output_dir RUN ...
# On several:               HOSTFILE=launch/hostfile bash launch/train.sh --model_id DIR ...
# NPROC, LAUNCHER, other ways to several machines and the exit code are explained in launch/run_ranks.sh;
# bash launch/train.sh --help lists the flags.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
. "$here/setup.sh" run
exec bash "$here/run_ranks.sh" "$here/train.py" "$@"
