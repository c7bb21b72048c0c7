// `stream.cu`: HALVES eights of rows, TILES eights of columns a tile, GATED, NORM, OUT_F32.
#include "ptx.h"

#include "stream.cu"

#include "product.h"

alignas(128) thread_local unsigned char memory[machine::SHARED_BYTES + machine::GUARD_BYTES];

struct Options { int blocks, stages; bool add, bias; int gelu; };

static void check(int rows, int n, int k, Options o) {
    Operands p(rows, n, k, o.add, o.gelu);
    auto norm = random_floats(k, 0.f, 0.1f);
    std::vector<float> logits = unwritten<float>(OUT_F32 ? p.out.size() : 0);
    Args args = {
        .x = p.x.data(), .w = p.w.data(), .norm = norm.data(), .bias = o.bias ? p.bias.data() : nullptr,
        .out = (O *)(OUT_F32 ? (void *)logits.data() : (void *)p.out.data()),
        .rows = rows, .n_total = n, .k_total = k, .stages = o.stages, .add_to = p.add && !OUT_F32, .gelu = o.gelu,
        .eps = 1e-2f, .shift = 1.f,
    };
    if (NORM) p.weigh(norm, args.shift);
    machine::run({
        .blocks = o.blocks, .cluster = 1, .threads = 32 * (WARPS + 1),
        .memory = [] { return memory; },
        .previous = [&] { p.begin(); },
        .kernel = [&] { stream(args); },
    });
    if (OUT_F32) p.add = false;
    for (size_t i = 0; i < logits.size(); i++) p.out[i] = to_bf16(logits[i]);
    p.check(o.bias, args.eps);
}

int main(int count, char **seeds) {
    return with_seeds(count, seeds, [] {
        // k of a stage and of several, which end inside of one; more stages than steps and fewer; a tile a block, the last one cut,
        // and several.
        int rows = 8 * HALVES;
        check(rows, 4 * COLUMNS + 4, 264, {.blocks = 5, .stages = 2, .add = true, .bias = true, .gelu = 0});
        check(rows - 3, 5 * COLUMNS, 1544, {.blocks = 2, .stages = 2, .add = false, .bias = true, .gelu = 1});
        check(rows - 7, 3 * COLUMNS, 2568, {.blocks = 3, .stages = 3, .add = true, .bias = false, .gelu = 0});
    });
}
