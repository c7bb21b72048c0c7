#!/bin/sh
# Mixed traffic on the server with the default model, for as many minutes as the argument says.
# Needs Linux and Python 3.11 or later, and no package.
set -eu
cd "$(dirname "$0")/.."
cargo build --release -p minisgl --bin minisgl
CLIENTS_BINARIES=$(realpath "${CARGO_TARGET_DIR:-target}")/release
CLIENTS_RUN=$(mktemp -d)
export CLIENTS_BINARIES CLIENTS_RUN PYTHONDONTWRITEBYTECODE=1
trap 'rm -rf "$CLIENTS_RUN"' EXIT
"${PYTHON:-python3}" clients/soak.py --minutes "${1:-20}"
