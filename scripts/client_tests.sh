#!/usr/bin/env bash
# Runs the tests in clients/: real clients against the server, with the real small model and with
# an engine that always says the same. Arguments go to pytest (-k litellm, -x, …).
#
# Each folder there has an environment of its own, for its clients do not all agree on what they
# need. It is made here, from pinned versions, and kept until they change.
set -euo pipefail
cd "$(dirname "$0")/.."

target=$(realpath -m "${CARGO_TARGET_DIR:-target}")
python=${PYTHON:-python3}
export CLIENTS_BINARIES=$target/release
CLIENTS_RUN=$(mktemp -d)
export CLIENTS_RUN
# Compiled Python lies there, too, and only the plugins of pytest that are named are loaded.
export PYTHONPYCACHEPREFIX=$target/client-venvs/pycache PYTEST_DISABLE_PLUGIN_AUTOLOAD=1

# No client looks for anything outside of this machine.
export LITELLM_LOCAL_MODEL_COST_MAP=True

# Whatever happens to the tests, the servers that they started end: each has a file named after
# its process id for as long as it runs.
tests=
finish() {
    [ -z "$tests" ] || kill "$tests" 2>/dev/null || true
    for file in "$CLIENTS_RUN"/*.pid; do
        [ ! -e "$file" ] || kill "$(basename "$file" .pid)" 2>/dev/null || true
    done
    rm -rf "$CLIENTS_RUN"
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# The environment of a folder; its name holds what it was made from.
environment() {
    local key venv
    key=$(cat "$1/requirements.txt" <("$python" --version) | sha256sum | cut -c1-12)
    venv=$target/client-venvs/$(basename "$1")-$key
    if [ ! -e "$venv/complete" ]; then
        echo "making $venv" >&2
        rm -rf "$target/client-venvs/$(basename "$1")"-*
        "$python" -m venv "$venv" >&2 &&
            "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps \
                --no-compile --requirement "$1/requirements.txt" >&2 &&
            touch "$venv/complete" || return 1
    fi
    echo "$venv"
}

if ! "$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))'; then
    echo "SKIPPED: the clients need Python 3.11 or later with venv; PYTHON can name one"
    exit 0
fi

cargo build --release --workspace --bin minisgl --example fake_server

failed=0
for folder in clients/*/; do
    folder=${folder%/}
    [ -e "$folder/requirements.txt" ] || continue
    if ! venv=$(environment "$folder"); then
        echo "SKIPPED: the clients of $folder could not be installed"
        continue
    fi
    echo "-- $folder"
    "$venv/bin/python" -m pytest -q -p no:cacheprovider --disable-warnings --durations=5 "$folder" "$@" &
    tests=$!
    code=0
    wait "$tests" || code=$?
    tests=
    # 5: no test of this folder was asked for.
    [ "$code" = 0 ] || [ "$code" = 5 ] || failed=1
done
exit "$failed"
