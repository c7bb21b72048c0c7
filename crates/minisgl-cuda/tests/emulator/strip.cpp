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

#include "check.h"

constexpr int SIDES = GATED ? 2 : 1;
alignas(128) thread_local unsigned char memory[machine::SHARED_BYTES + machine::GUARD_BYTES];

struct Options { int stages; bool add, bias; int gelu; };

static void check(int rows, int n, int k, Options o) {
    // Gated products are never added to what is there.
    if (GATED) o.add = false;
    auto x_later = random_bf16(rows * k, 1.f), x = unwritten<bf16>(rows * k);
    auto w = random_bf16(size_t(SIDES) * n * k, 1.f / sqrtf(k));
    auto bias = random_floats(SIDES * n, 0.f, 1.f);
    std::vector<bf16> before = random_bf16(rows * n, 1.f), out = unwritten<bf16>(rows * n);
    Args args = {
        .bias = o.bias ? bias.data() : nullptr, .out = out.data(), .rows = rows, .n_total = n, .k_total = k,
        .stages = o.stages, .x_bytes = rows * 128, .add_to = o.add, .gelu = o.gelu, .eps = 1e-2f,
    };
    TensorMap upper = {w.data(), SIDES * n, k, UPPER * 16, SIDES}, lower = {w.data(), SIDES * n, k, LOWER * 16, SIDES};
    TensorMap x_map = {x.data(), rows, k, rows};
    int strips = (n + UNITS * COLUMNS - 1) / (UNITS * COLUMNS);
    machine::run({
        .blocks = BLOCKS * strips, .cluster = BLOCKS, .threads = THREADS,
        .memory = [] { return memory; },
        .previous = [&] { x = x_later, o.add ? void(out = before) : forget(out); },
        .kernel = [&] { KERNEL(upper, lower, x_map, args); },
    });
    for (int row = 0; row < rows; row++) {
        std::vector<double> got, want;
        double squares = 0;
        for (int i = 0; i < k; i++) squares += to_float(x_later[row * k + i]) * to_float(x_later[row * k + i]);
        double factor = NORM ? 1 / sqrt(squares / k + args.eps) : 1;
        for (int column = 0; column < n; column++) {
            double sums[2] = {};
            for (int side = 0; side < SIDES; side++) {
                for (int i = 0; i < k; i++) sums[side] += to_float(x_later[row * k + i]) * to_float(w[(size_t(side) * n + column) * k + i]);
                sums[side] = factor * sums[side] + (o.bias ? bias[side * n + column] : 0);
            }
            double value = GATED ? activate(sums[0], o.gelu) * sums[1] : sums[0];
            want.push_back(value + (o.add ? to_float(before[row * n + column]) : 0));
            got.push_back(to_float(out[row * n + column]));
        }
        // A side's noise counts as often as the other side is large.
        check_close("product", got, want, GATED ? 3 * BF16_NOISE : BF16_NOISE);
    }
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
        check(X_ROWS - 3, 4 * UNITS * COLUMNS, 392, {.stages = 4, .add = false, .bias = false, .gelu = 0});
    });
}
