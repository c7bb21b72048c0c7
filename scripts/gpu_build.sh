#!/bin/sh
# Builds what scripts/gpu.py runs on a machine with GPUs but without Rust or network: the binary, and
# tests and examples that need a GPU, all without symbols, in target/gpu.
set -eu
cd "$(dirname "$0")/.."
target=${CARGO_TARGET_DIR:-target}
out=$target/gpu
rm -rf "$out"
mkdir -p "$out"

cargo build --profile dist -p minisgl --bin minisgl
cp "$target/dist/minisgl" "$out/"
cargo test --release --no-run --workspace --test ops --test half_layers --test collective --test cards \
    --test models --test real_model 2>&1 | tee "$out/build.log"
sed -n 's|.*Executable tests/\([^./]*\).* (\(.*\))|\1 \2|p' "$out/build.log" |
    while read -r name path; do cp "$path" "$out/$name"; done
cargo build --release --workspace --example decode_step --example products --example exchange
for name in decode_step products exchange; do
    cp "$target/release/examples/$name" "$out/"
done
rm "$out/build.log"
strip "$out"/*
git describe --always --dirty >"$out/commit"
ls -l "$out"
