#!/usr/bin/env bash
# Sets up what the tests need and runs them; the last line is pytest's summary.
#
#     bash launch/test.sh                            lint, types and the fast tier (no GPU, no network, no weights)
#     bash launch/test.sh --all                      the slow tier too
#     bash launch/test.sh tests/test_plan.py -k mix  only these tests, without lint and types
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
tier=(-m "not slow")
arguments=()
for argument in "$@"; do
    if [ "$argument" = --all ]; then tier=(); else arguments+=("$argument"); fi
done
. "$root/launch/setup.sh" dev
cd "$root"

export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
TORCH_EXTENSIONS_DIR="$(mktemp -d)" # a stale lock in the user's own folder would hang DeepSpeed
export TORCH_EXTENSIONS_DIR
trap 'rm -rf "$TORCH_EXTENSIONS_DIR"' EXIT
unset DS_ACCELERATOR
nvidia-smi -L >/dev/null 2>&1 || export DS_ACCELERATOR=cpu

failed=0 parallel=()
if [ "${#arguments[@]}" -eq 0 ]; then
    parallel=(-n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder) # a process per core; the tests of a file share their runs
    "$PYTHON" -m ruff check . || failed=1
    "$PYTHON" -m ruff format --check . || failed=1
    "$PYTHON" -m mypy || failed=1
fi
"$PYTHON" -m pytest "${tier[@]}" "${parallel[@]}" "${arguments[@]}" || failed=1
exit "$failed"
