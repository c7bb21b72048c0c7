# Recipes for people; .ci/run is what decides.

# List the recipes.
default:
    @just --list

# Everything that must pass before a change is taken.
ci:
    .ci/run

# The tests.
test:
    cargo test --release

# Format, and show what clippy finds.
lint:
    cargo fmt --all
    cargo clippy --workspace --all-targets --release -- -D warnings

# The binary as it is shipped and measured.
dist:
    cargo build --profile dist -p minisgl

# The API's documentation, in a browser.
doc:
    cargo doc --workspace --no-deps --open

# Make the stored SmolLM2 reference again; needs a Python with torch, transformers and gguf.
reference model python="python3":
    {{python}} scripts/make_smollm2_reference.py {{model}}

# Spelling, and licences and advisories of dependencies; `cargo install typos-cli cargo-deny`.
audit:
    typos
    cargo deny check

# What HTTP, JSON and scheduling cost, on an engine that answers at once.
bench-front-end:
    scripts/bench_front_end.sh

# The CPU backend against llama.cpp; needs its binaries, and jq. `just bench-cpu build/bin model.gguf`
bench-cpu llama model *tests: dist
    scripts/bench_cpu.sh {{llama}} {{model}} {{tests}}

# Build what runs on a GPU machine without Rust: copy the repository there with target/gpu.
gpu-build:
    scripts/gpu_build.sh

# Operations, collectives and every tiny checkpoint on a GPU; there without just: scripts/gpu.py tests
gpu-test *flags: gpu-build
    scripts/gpu.py tests {{flags}}

# Start, steps, offline and online loads on a GPU: `just gpu-bench --tokenizer FOLDER`
gpu-bench *flags: gpu-build
    scripts/gpu.py bench {{flags}}

# Mixed traffic on one server for some minutes: pages must add up, and memory must not grow.
soak minutes="20":
    scripts/soak.sh {{minutes}}
