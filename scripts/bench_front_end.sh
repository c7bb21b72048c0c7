#!/bin/sh
# What the front end costs: the server on an engine without a model, and a load beside it on the same
# cores. Linux: the server's memory is read from /proc.
set -eu
cd "$(dirname "$0")/.."
target=${CARGO_TARGET_DIR:-target}/release
cargo build --release -p minisgl -p minisgl-server --bin minisgl --example fake_server

log=$(mktemp)
server=
trap 'kill $server; rm -f "$log"' EXIT

# A server whose steps take so many microseconds, at $url.
start() {
    : >"$log"
    "$target/examples/fake_server" --port 0 --endless --step-us "$1" 2>"$log" &
    server=$!
    until url=$(sed -n 's/^Ready: //p' "$log") && [ -n "$url" ]; do sleep 0.1; done
}
load() {
    "$target/minisgl" bench serve --base-url "$url" --endpoint completions --id-end 128 \
        --input-len 16 "$@"
}
memory_kib() { sed -n 's/^VmHWM:[^0-9]*\([0-9]*\).*/\1/p' /proc/$server/status; }

echo "An engine that answers at once, one stream at a time:"
start 0
load --concurrency 1 --num-requests 2000 --output-len 16
echo "256 streams at once:"
load --concurrency 256 --num-requests 1024 --output-len 2000

for tokens in 2000 4000; do
    kill $server
    wait $server
    echo "An engine with a step each 2 ms, so that tokens come one by one; 256 streams of $tokens:"
    start 2000
    load --concurrency 1 --num-requests 20 --output-len 16 >/dev/null
    before=$(memory_kib)
    load --concurrency 256 --num-requests 256 --output-len "$tokens"
    after=$(memory_kib)
    echo "Memory of the server: $before KiB before, $after KiB at its highest:"
    echo "$(((after - before) * 1024 / 256)) bytes a stream"
done
