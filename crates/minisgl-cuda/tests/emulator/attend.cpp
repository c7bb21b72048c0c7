// `attend.cu` for heads of DIM in groups of GROUP, and residual streams as wide as SECOND says.
#include "ptx.h"

#define CLUSTER 8
#define HALVES ((GROUP + 7) / 8)
#define SOFT_CAP 0
#define FIRST ((GROUP + 2) * DIM / 16 / CLUSTER)

#include "attention_tile.cuh"
#include "half_layer.cuh"
#include "attend.cu"

#include "cache.h"
#include "half_layer.h"

alignas(128) thread_local unsigned char unaligned[machine::SHARED_BYTES + machine::GUARD_BYTES];

struct Options { bool normed, bias, early; int parts; Scores scores; };

static void check(const std::vector<int> &lens, Options o) {
    const int hidden = SECOND * 16 * CLUSTER, rows = int(lens.size()), q_heads = KV_HEADS * GROUP;
    Cache cache(lens);
    Stream stream(rows, hidden, o.parts, KV_HEADS);
    auto qkv = random_bf16(size_t(q_heads + 2 * KV_HEADS) * DIM * hidden, 1.f / sqrtf(hidden));
    auto out = random_bf16(size_t(hidden) * q_heads * DIM, 0.05f);
    auto bias = random_floats((q_heads + 2 * KV_HEADS) * DIM, 0.f, 1.f);
    auto q_norm = random_floats(DIM, 1.f, 0.1f), k_norm = random_floats(DIM, 1.f, 0.1f);
    // Where they are not older than the kernel in front, it writes them.
    auto kv_len = o.early ? cache.lens : std::vector<int>(rows);
    Args args = {
        .residual = stream.residual(),
        .qkv = qkv.data(), .bias = o.bias ? bias.data() : nullptr, .out = out.data(), .part = stream.part.data(),
        .k_pages = cache.k.data(), .v_pages = cache.v.data(),
        .slots = cache.slots.data(), .kv_len = kv_len.data(), .page_table = cache.table.data(), .store_at = cache.store_at.data(),
        .rope = cache.rope.data(), .q_norm = o.normed ? q_norm.data() : nullptr, .k_norm = o.normed ? k_norm.data() : nullptr,
        .kv_heads = KV_HEADS, .pages_a_row = PAGES_A_ROW, .page_shift = PAGE_SHIFT, .early = o.early,
        .q_eps = 1e-6f, .q_shift = 0.f, .k_eps = 1e-6f, .k_shift = 0.f,
        .scores = o.scores,
    };
    machine::run({
        .blocks = KV_HEADS * CLUSTER, .cluster = CLUSTER, .threads = THREADS + 32,
        .memory = [] { return unaligned; },
        .previous = [&] { stream.begin(), kv_len = cache.lens; },
        .kernel = [&] { attend(cache.map(cache.k), cache.map(cache.v), args); },
    });
    for (int row = 0; row < rows; row++) {
        auto made = product(qkv, stream.normed(row));
        for (size_t i = 0; i < made.size() && o.bias; i++) made[i] += bias[i];
        stream.check(row, product(out, cache.attend(row, made, args.q_norm, args.k_norm, o.scores)));
    }
    cache.check_untouched();
}

int main(int count, char **seeds) {
    const float scale = 1.f / sqrtf(DIM);
    return with_seeds(count, seeds, [&] {
        check({1}, {.normed = true, .early = false, .parts = 0, .scores = {scale, 0.f, 0}});
        check({900, 16, 17, 0, 33, 700, 15, 64}, {.normed = true, .early = true, .parts = 3, .scores = {scale, 0.f, 0}});
        check({400, 1000}, {.bias = true, .early = false, .parts = 1, .scores = {scale, 0.f, 64}});
        check({90, 0, 31}, {.normed = true, .bias = true, .early = true, .parts = 8, .scores = {scale, 0.f, 0}});
    });
}
