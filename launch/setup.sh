#!/usr/bin/env bash
# Makes the Python environment .venv, once. The other scripts source it and then use "$PYTHON":
#
#     . launch/setup.sh run      what training and evaluation need
#     . launch/setup.sh dev      also what launch/test.sh needs
#
# A torch >= 2.11 that python3 already has is kept. Without one, torch 2.13.0 is installed.
# All other versions are in launch/constraints.txt. A second call finds its stamp and installs nothing.
#
# VOXTRAL_DIST_PYTHON=/path/to/python uses that interpreter as it is and installs nothing (clusters, containers).
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="$ROOT/.venv"

fail() {
    echo "error: $*" >&2
    exit 2
}

is_supported() { # PYTHON
    "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 14))' 2>/dev/null
}

find_python() { # prints the first supported interpreter on PATH
    local name
    for name in python3 python3.13 python3.12 python3.11 python3.10; do
        if is_supported "$name"; then
            command -v "$name"
            return
        fi
    done
    fail "no Python from 3.10 to 3.13 on PATH (python3: $(python3 -V 2>&1)); install one or set VOXTRAL_DIST_PYTHON"
}

torch_folders() { # PYTHON: its version, then the folders of its torch >= 2.11; nothing without one
    "$1" - 2>/dev/null <<'PYTHON' || true
import pathlib, sys, sysconfig
import torch
if torch.__version__ >= "2.11":
    paths = sysconfig.get_paths()
    folders = [str(pathlib.Path(torch.__file__).parents[1]), paths["purelib"], paths["platlib"]]
    print("%d.%d" % sys.version_info[:2], *dict.fromkeys(folders), sep="\n")
PYTHON
}

fingerprint() { # of everything that decides what is installed
    cat "$ROOT/setup.cfg" "$ROOT/launch/constraints.txt" - <<<"$("$VENV/bin/python" -VV 2>&1)" | sha256sum
}

is_installed() { # run|dev
    [ -x "$VENV/bin/python" ] && [ "$(cat "$VENV/installed-$1" 2>/dev/null)" = "$(fingerprint)" ]
}

make_venv() { # keeps one that works, whoever made it
    local python
    if ! "$VENV/bin/python" -c '' 2>/dev/null; then
        python="$(find_python)"
        "$python" -c 'import ensurepip, venv' 2>/dev/null ||
            fail "$python cannot make environments (no ensurepip): install python3-venv, or without root run" \
                "'$python -m pip install --user virtualenv && $python -m virtualenv .venv', and start again"
        echo "setup: making $VENV with $("$python" -V)" >&2
        find "$VENV" -mindepth 1 -maxdepth 1 ! -name setup.lock -exec rm -rf {} +
        "$python" -m venv "$VENV"
    fi
    is_supported "$VENV/bin/python" ||
        fail "$VENV has $("$VENV/bin/python" -V), not 3.10 to 3.13; remove that folder and start again"
    "$VENV/bin/python" -m pip --version >/dev/null 2>&1 || "$VENV/bin/python" -m ensurepip >/dev/null ||
        fail "$VENV has no pip; remove that folder and start again"
}

make_torch() { # keeps the torch outside the environment when it is new enough
    local found version purelib
    if [ -n "$(torch_folders "$VENV/bin/python")" ]; then return; fi
    found="$(torch_folders "$(find_python)")"
    version="$("$VENV/bin/python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')"
    if [ "${found%%$'\n'*}" = "$version" ]; then
        found="${found#*$'\n'}"
        echo "setup: keeping the torch in ${found%%$'\n'*}" >&2
        purelib="$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
        echo "$found" >"$purelib/torch_outside.pth"
    else
        echo "setup: installing torch 2.13.0 (several minutes)" >&2
        pip_install torch==2.13.0
    fi
}

pip_install() {
    PIP_ROOT_USER_ACTION=ignore "$VENV/bin/python" -m pip install -q --disable-pip-version-check --no-input "$@"
}

install() { # run|dev
    local extra=""
    if is_installed "$1"; then return; fi # by another call, while this one waited for the lock
    make_venv
    make_torch
    echo "setup: installing the packages of launch/constraints.txt (a few minutes)" >&2
    if [ "$1" = dev ]; then extra="[dev]"; fi
    pip_install --constraint "$ROOT/launch/constraints.txt" --editable "$ROOT$extra"
    fingerprint >"$VENV/installed-run.tmp"
    cp "$VENV/installed-run.tmp" "$VENV/installed-$1"
    mv "$VENV/installed-run.tmp" "$VENV/installed-run"
}

if [ -n "${VOXTRAL_DIST_PYTHON:-}" ]; then
    PYTHON="$(command -v "$VOXTRAL_DIST_PYTHON")" || fail "VOXTRAL_DIST_PYTHON=$VOXTRAL_DIST_PYTHON cannot be run"
    export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
else
    if ! is_installed "${1:-run}"; then
        mkdir -p "$VENV"
        (
            flock 9
            install "${1:-run}"
        ) 9>"$VENV/setup.lock"
    fi
    PYTHON="$VENV/bin/python"
fi
export PYTHON PATH="$(dirname "$PYTHON"):$PATH"
