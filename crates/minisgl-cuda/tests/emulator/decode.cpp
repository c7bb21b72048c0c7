// `decode.cu` for heads of DIM in groups of GROUP; SOFT_CAP: with capped scores; CASCADE: for rows that share pages.
#include "ptx.h"

#define HALVES (CASCADE ? 2 : (GROUP + 7) / 8)

#include "attention_tile.cuh"
#include "decode_work.cuh"
#include "decode.cu"

#include "cache.h"

alignas(128) thread_local unsigned char memory[machine::SHARED_BYTES + machine::GUARD_BYTES];

struct Options { int blocks; Wait wait; Scores scores; };

static void check(const std::vector<int> &lens, const std::vector<Cache::Prefix> &prefixes, Options o) {
    const int rows = int(lens.size()), q_heads = KV_HEADS * GROUP, width = (q_heads + 2 * KV_HEADS) * DIM;
    Cache cache(lens, prefixes);
    auto qkv_later = random_bf16(rows * width, 1.f), qkv = unwritten<bf16>(rows * width);
    auto out = unwritten<bf16>(rows * q_heads * DIM);
    auto q_norm = random_floats(DIM, 1.f, 0.1f), k_norm = random_floats(DIM, 1.f, 0.1f);
    auto partial = unwritten<float>(o.blocks * 2 * 16 * PARTIAL_STRIDE);
    std::vector<int> arrived((rows + prefixes.size()) * KV_HEADS * 16), joined(rows * q_heads);
    auto kv_len = o.wait == WAIT_FETCHING ? cache.lens : std::vector<int>(rows);
    auto plans = unwritten<BlockPlan>(o.blocks), plans_later = plans;
    auto entries = unwritten<Entry>(rows + prefixes.size() + 1), entries_later = entries;
    Args args = {
        .qkv = qkv.data(), .k_pages = cache.k.data(), .v_pages = cache.v.data(), .out = out.data(),
        .slots = cache.slots.data(), .kv_len = kv_len.data(), .page_table = cache.table.data(), .store_at = cache.store_at.data(),
        .rope = cache.rope.data(), .q_norm = q_norm.data(), .k_norm = k_norm.data(),
        .partial = partial.data(), .arrived = arrived.data(),
        .plan = plans.data(), .entries = entries.data(),
        .rows = rows, .pages_a_row = PAGES_A_ROW, .page_shift = PAGE_SHIFT, .q_heads = q_heads, .kv_heads = KV_HEADS,
        .stages = 2 * WARPS, .window = o.scores.window, .wait = o.wait,
        .q_eps = 1e-6f, .q_shift = 0.f, .k_eps = 1e-6f, .k_shift = 0.f,
        .scale = o.scores.scale, .soft_cap = o.scores.soft_cap,
        .ahead = 4 * FETCHERS,
    };
#if CASCADE
    const int lot_size = 16 / GROUP;
    std::vector<int> lot_rows(prefixes.size() * lot_size, -1), lot_tokens, covered(rows);
    for (size_t lot = 0; lot < prefixes.size(); lot++) {
        std::copy(prefixes[lot].rows.begin(), prefixes[lot].rows.end(), lot_rows.begin() + lot * lot_size);
        lot_tokens.push_back(prefixes[lot].tokens);
        for (int row : prefixes[lot].rows) covered[row] = prefixes[lot].tokens;
    }
    auto halves = unwritten<float>(size_t(rows) * q_heads * 2 * PARTIAL_STRIDE);
    args.lot_rows = lot_rows.data(), args.lot_tokens = lot_tokens.data(), args.covered = covered.data();
    args.halves = halves.data(), args.joined = joined.data();
    args.lots = int(prefixes.size()), args.lot_size = lot_size;
#endif
    machine::run({
        .blocks = o.blocks, .cluster = 1, .threads = PLANNED,
        .memory = [] { return memory; },
        // Until then, kernels in front may read their plan.
        .previous = [&] {
            if (memcmp(plans.data(), plans_later.data(), plans.size() * sizeof(BlockPlan))) fail("blocks are planned too early");
            if (memcmp(entries.data(), entries_later.data(), entries.size() * sizeof(Entry))) fail("entries are written too early");
            kv_len = cache.lens;
        },
        .kernel = [&] { plan(args); },
    });
    plans_later = plans, entries_later = entries;
    // Outside of a graph, the plan is no older than the kernel in front; behind a prefill, all is older than that.
    if (o.wait == WAIT_FIRST) forget(plans), forget(entries);
    if (o.wait == WAIT_LAST) qkv = qkv_later;
    machine::run({
        .blocks = o.blocks, .cluster = 1, .threads = 32 * (WARPS + FETCHERS + 1),
        .memory = [] { return memory; },
        .previous = [&] {
            if (o.wait != WAIT_LAST) qkv = qkv_later, plans = plans_later, entries = entries_later, forget(out), forget(partial);
        },
        .kernel = [&] { decode(cache.map(cache.k), cache.map(cache.v), cache.half_map(cache.k), cache.half_map(cache.v), args); },
    });
    for (int row = 0; row < rows; row++) {
        std::vector<double> made, got;
        for (int i = 0; i < width; i++) made.push_back(to_float(qkv_later[row * width + i]));
        for (int i = 0; i < q_heads * DIM; i++) got.push_back(to_float(out[row * q_heads * DIM + i]));
        auto want = cache.attend(row, made, q_norm.data(), k_norm.data(), o.scores);
        if (lens[row] > 0) check_close("attention", got, want);
    }
    cache.check_untouched();
    for (int count : arrived) if (count) fail("counts are left for the next step");
    for (int count : joined) if (count) fail("joins are left for the next step");
}

int main(int count, char **seeds) {
    const float scale = 1.f / sqrtf(DIM), cap = SOFT_CAP ? 3.f : 0.f;
    return with_seeds(count, seeds, [&] {
#if CASCADE
        check({100, 120, 97, 300, 5, 33}, {{{0, 1, 3}, 96}}, {.blocks = 5, .wait = WAIT_FETCHING, .scores = {scale, 0.f, 0}});
        check({200, 210, 220, 230, 33, 0, 64}, {{{0, 1, 2, 3}, 192}, {{4, 6}, 32}}, {.blocks = 7, .wait = WAIT_FIRST, .scores = {scale, 0.f, 0}});
        check({577, 900, 577, 20}, {{{0, 1, 2}, 544}}, {.blocks = 12, .wait = WAIT_FETCHING, .scores = {scale, cap, 0}});
        check({100, 120, 97, 300, 5, 33}, {{{0, 1, 3}, 96}}, {.blocks = 5, .wait = WAIT_LAST, .scores = {scale, 0.f, 0}});
        // More tiles than are planned.
        check({577, 900, 577, 20}, {{{0, 1, 2}, 544}}, {.blocks = 1, .wait = WAIT_FETCHING, .scores = {scale, 0.f, 0}});
#else
        check({1}, {}, {.blocks = 2, .wait = WAIT_FETCHING, .scores = {scale, 0.f, 0}});
        // Last tiles of all that a new token can find in front of it: nothing, half a tile's tokens, one more.
        check({100, 33, 0, 300, 16, 17, 24, 25, 26}, {}, {.blocks = 5, .wait = WAIT_FETCHING, .scores = {scale, 0.f, 0}});
        // Units of fewer tiles than warps, one behind the other.
        check({20, 5, 40, 33, 17, 300, 16, 9}, {}, {.blocks = 2, .wait = WAIT_FETCHING, .scores = {scale, 0.f, 0}});
        check({700, 90}, {}, {.blocks = 6, .wait = WAIT_FIRST, .scores = {scale, cap, 200}});
        check({700, 90, 0, 33}, {}, {.blocks = 6, .wait = WAIT_LAST, .scores = {scale, 0.f, 0}});
        // More tiles than are planned.
        check({700, 0, 90, 900, 4}, {}, {.blocks = 2, .wait = WAIT_FETCHING, .scores = {scale, 0.f, 0}});
#endif
    });
}
