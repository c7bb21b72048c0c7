#!/bin/sh
# The CPU backend against llama.cpp on this machine, one GGUF file, as many threads on either side:
#
#   scripts/bench_cpu.sh LLAMA_BIN MODEL.gguf [TEST…]
#
# LLAMA_BIN is the folder with llama-bench and llama-batched-bench. TEST is decode-CONTEXT,
# prefill-TOKENS or batch-REQUESTS (128 tokens in, 128 out). Every round runs ours, then theirs, so
# that a machine whose speed changes changes it for both; a line shows the medians of both, and the
# median of the rounds' ratios, lowest and highest beside it.
#
# ROUNDS (3), THREADS (all processors), MINISGL (the dist build), and UNDER, a command that every
# measurement runs under, such as "nice -n -10", come from the environment. Needs jq.
set -eu
here=$(cd "$(dirname "$0")/.." && pwd)
llama=$1 model=$2
shift 2
[ $# -gt 0 ] || set -- decode-0 decode-1024 prefill-512 prefill-2048 batch-8 batch-32
rounds=${ROUNDS:-3} threads=${THREADS:-$(nproc)} under=${UNDER:-}
minisgl=${MINISGL:-${CARGO_TARGET_DIR:-$here/target}/dist/minisgl}

# Tokens a second of `minisgl bench steps`.
ours() {
    $under "$minisgl" bench steps --device cpu --threads "$threads" --model "$model" --json "$@"
}

# Tokens a second of one test, on this side and on that.
measure() {
    number=${2#*-}
    case $1-${2%-*} in
    # A context of one token is the least there is.
    ours-decode)
        ours --batch 1 --context $((number > 0 ? number : 1)) --prefill-prompts 0 |
            jq '.decode[0].tokens_per_s'
        ;;
    ours-prefill)
        ours --batch 1 --steps 1 --context 1 --prefill-prompts 1 --prefill-len "$number" |
            jq .prefill.tokens_per_s
        ;;
    ours-batch)
        ours --batch "$number" --context 128 --prefill-prompts 0 | jq '.decode[0].tokens_per_s'
        ;;
    theirs-decode) theirs -p 0 -n 128 -d "$number" ;;
    theirs-prefill) theirs -p "$number" -n 0 ;;
    theirs-batch)
        $under "$llama/llama-batched-bench" -m "$model" -t "$threads" -npp 128 -ntg 128 \
            -npl "$number" -c $((256 * number)) --output-format jsonl 2>/dev/null |
            sed -n '/^{/p' | jq .speed_tg
        ;;
    *) echo "$2 is no test" >&2 && exit 2 ;;
    esac
}

theirs() {
    $under "$llama/llama-bench" -m "$model" -t "$threads" -r 2 -o json "$@" 2>/dev/null |
        jq '.[0].avg_ts'
}

medians='
function middle(list, sorted, i, j, x) {
    for (i = 1; i <= NR; i++) sorted[i] = list[i]
    for (i = 2; i <= NR; i++) {
        x = sorted[i]
        for (j = i; j > 1 && sorted[j - 1] > x; j--) sorted[j] = sorted[j - 1]
        sorted[j] = x
    }
    low = sorted[1]; high = sorted[NR]
    return (sorted[int((NR + 1) / 2)] + sorted[int((NR + 2) / 2)]) / 2
}
{ ours[NR] = $1; theirs[NR] = $2; ratio[NR] = $1 / $2 }
END {
    a = middle(ours); b = middle(theirs); r = middle(ratio)
    printf "| %s | %s | %.0f | %.0f | %.2f (%.2f–%.2f) |\n", file, test, a, b, r, low, high
}'

echo "| file | test | minisgl, tokens/s | llama.cpp, tokens/s | ratio |"
echo "|---|---|---|---|---|"
for test; do
    for _ in $(seq "$rounds"); do
        echo "$(measure ours "$test") $(measure theirs "$test")"
    done | awk -v test="$test" -v file="$(basename "$model" .gguf)" "$medians"
done
