// `strip.cu`, `strip_short.cu` if SHORT, or `strip_tall.cu` of 128 rows: X_ROWS rows of x, strips of UNITS units, clusters of BLOCKS, GATED, NORM.
#include "ptx.h"

#include "ring.cuh"
#include "strip.cuh"
#if X_ROWS == 128
#include "strip_tall.cu"
#define KERNEL strip_tall
#elif SHORT
#include "strip_short.cu"
#define KERNEL strip_short
#else
#include "strip.cu"
#define KERNEL strip
#endif

#include "product.h"

alignas(128) thread_local unsigned char memory[machine::SHARED_BYTES + machine::GUARD_BYTES];

struct Options { int stages; bool add, bias; int gelu; };

static void check(int rows, int n, int k, Options o) {
    Operands p(rows, n, k, o.add, o.gelu);
    int lots = (rows + X_ROWS - 1) / X_ROWS, lot_rows = (rows + lots - 1) / lots;
    int strips = (n + UNITS * COLUMNS - 1) / (UNITS * COLUMNS);
    Args args = {
        .bias = o.bias ? p.bias.data() : nullptr, .out = p.out.data(), .rows = rows, .n_total = n, .k_total = k,
        .stages = o.stages, .x_bytes = lot_rows * 128, .add_to = p.add, .gelu = o.gelu, .strips = strips, .lot_rows = lot_rows, .eps = 1e-2f, .inverse_k = 1.f / k,
    };
    TensorMap w = {p.w.data(), SIDES * n, k, UNITS * 16, SIDES}, x = {p.x.data(), rows, k, lot_rows};
    machine::run({
        .blocks = BLOCKS * strips * lots, .cluster = BLOCKS, .threads = THREADS,
        .memory = [] { return memory; },
        .previous = [&] { p.begin(); },
        .kernel = [&] { KERNEL(w, x, args); },
    });
    p.check(o.bias, args.eps);
}

int main(int count, char **seeds) {
    return with_seeds(count, seeds, [] {
        // By turns, warpgroups have stages of their own.
        int some = SHORT ? 6 : 5;
        // Blocks with one step and with several, k that ends inside a step or with one; rings that are larger than a
        // block's steps and smaller; one strip and several, the last one whole, cut or of less than a unit.
        check(X_ROWS, 2 * UNITS * COLUMNS + 8, 264, {.stages = some, .add = true, .bias = true, .gelu = 0});
        check(X_ROWS - 7, 3 * UNITS * COLUMNS - 8, 584, {.stages = 4, .add = false, .bias = true, .gelu = 1});
        check(9, UNITS * COLUMNS, 512, {.stages = some, .add = true, .bias = false, .gelu = 1});
        if (X_ROWS == 128) check(2 * X_ROWS - 11, 3 * UNITS * COLUMNS - 8, 392, {.stages = 4, .add = true, .bias = true, .gelu = 0});
        check(X_ROWS - 3, 4 * UNITS * COLUMNS, 392, {.stages = 4, .add = false, .bias = false, .gelu = 0});
    });
}
