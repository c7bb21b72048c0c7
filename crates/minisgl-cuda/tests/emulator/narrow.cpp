// `narrow.cu`: up to ROWS rows of x, GROUPS warpgroups a block, GATED, NORM.
#include "ptx.h"

#include "ring.cuh"
#include "narrow.cu"

#include "product.h"

alignas(128) thread_local unsigned char memory[machine::SHARED_BYTES + machine::GUARD_BYTES];

// Clusters of `blocks` divide k; single blocks walk tiles.
struct Options { int blocks, clusters, w_stages, x_stages; bool add, bias; int gelu; };

static void check(int rows, int n, int k, Options o) {
    Operands p(rows, n, k, o.add, o.gelu);
    Args args = {
        .bias = o.bias ? p.bias.data() : nullptr, .out = p.out.data(), .rows = rows, .n_total = n, .k_total = k,
        .blocks = o.blocks, .w_stages = o.w_stages, .x_stages = o.x_stages, .add_to = p.add, .gelu = o.gelu, .eps = 1e-2f,
    };
    TensorMap w = {p.w.data(), SIDES * n, k, TILE, SIDES}, x = {p.x.data(), rows, k, rows};
    machine::run({
        .blocks = o.blocks * o.clusters, .cluster = o.blocks, .threads = THREADS + 32,
        .memory = [] { return memory; },
        .previous = [&] { p.begin(); },
        .kernel = [&] { narrow(w, x, args); },
    });
    p.check(o.bias, args.eps);
}

int main(int count, char **seeds) {
    return with_seeds(count, seeds, [] {
        // A step a block and several, k that ends inside of one; more stages than steps and fewer, of w and of x; a tile a
        // cluster, the last one cut; and a block that walks more tiles than another.
        check(ROWS, 2 * COLUMNS + 8, 264, {.blocks = 2, .clusters = 3, .w_stages = 3, .x_stages = 2, .add = true, .bias = true, .gelu = 0});
        check(ROWS - 7, 2 * COLUMNS - 8, 584, {.blocks = 4, .clusters = 2, .w_stages = 2, .x_stages = 3, .add = false, .bias = true, .gelu = 1});
        check(17, COLUMNS, 512, {.blocks = 8, .clusters = 1, .w_stages = 1, .x_stages = 1, .add = true, .bias = false, .gelu = 1});
        check(ROWS - 3, 5 * COLUMNS - 8, 392, {.blocks = 1, .clusters = 2, .w_stages = 5, .x_stages = 3, .add = true, .bias = false, .gelu = 0});
    });
}
