// `resident.cu`: plain, NORM, GATED, OUT_F32; up to ROWS rows, sums of SLOTS tiles under way.
#include "ptx.h"

#include "product_tile.cuh"
#include "resident.cu"

#include "check.h"

constexpr int SIDES = GATED ? 2 : 1;
alignas(128) thread_local unsigned char memory[machine::SHARED_BYTES + machine::GUARD_BYTES];

struct Options { int clusters, stages; bool add, bias; int gelu; };

static void check(int rows, int n, int k, Options o) {
    // Gated products are never added to what is there.
    if (GATED) o.add = false;
    const bool is_normed = NORM;
    auto x_later = random_bf16(rows * k, 1.f), x = unwritten<bf16>(rows * k);
    auto w = random_bf16(size_t(SIDES) * n * k, 1.f / sqrtf(k));
    auto norm = random_floats(k, 0.5f, 0.1f), bias = random_floats(SIDES * n, 0.f, 1.f);
    std::vector<O> before, out = unwritten<O>(rows * n);
    for (float value : random_floats(rows * n, 0.f, 1.f)) before.push_back(from_float<O>(value));
    Args args = {
        .output = {.bias = o.bias ? bias.data() : nullptr, .out = out.data(), .rows = rows, .n_total = n, .add_to = o.add, .gelu = o.gelu},
        .norm = norm.data(), .k_total = k, .stages = o.stages, .eps = 1e-6f, .shift = 0.5f,
    };
    TensorMap w_map = {w.data(), SIDES * n, k, TILE, SIDES}, x_map = {x.data(), rows, k, ROWS};
    machine::run({
        .blocks = BLOCKS * o.clusters, .cluster = BLOCKS, .threads = THREADS,
        .memory = [] { return memory; },
        .previous = [&] { x = x_later, o.add ? void(out = before) : forget(out); },
        .kernel = [&] { resident(w_map, x_map, args); },
    });
    for (int row = 0; row < rows; row++) {
        double squares = 0;
        for (int i = 0; i < k; i++) squares += pow(to_float(x_later[row * k + i]), 2);
        double factor = is_normed ? 1 / sqrt(squares / k + 1e-6) : 1;
        std::vector<double> got, want;
        for (int column = 0; column < n; column++) {
            double sums[2] = {};
            for (int side = 0; side < SIDES; side++) {
                for (int i = 0; i < k; i++)
                    sums[side] += to_float(x_later[row * k + i]) * (is_normed ? norm[i] + 0.5 : 1) * to_float(w[(size_t(side) * n + column) * k + i]);
                sums[side] = sums[side] * factor + (o.bias ? bias[side * n + column] : 0);
            }
            double value = GATED ? activate(sums[0], o.gelu) * sums[1] : sums[0];
            want.push_back(value + (o.add ? to_float(before[row * n + column]) : 0));
            got.push_back(to_float(out[row * n + column]));
        }
        // A side's noise counts as often as the other side is large.
        double noise = sizeof(O) == 4 && !NORM ? 1e-5 : GATED ? 3 * BF16_NOISE : BF16_NOISE;
        check_close("product", got, want, noise);
    }
}

int main(int count, char **seeds) {
    return with_seeds(count, seeds, [] {
        // Blocks with one step and with several, k that ends inside a step or with one; rings that are larger than a
        // tile's steps and smaller; one tile and many; clusters that have no tile as often as others.
        check(ROWS, 3 * COLUMNS + 8, 520, {.clusters = 2, .stages = 3, .add = true, .bias = true, .gelu = 0});
        check(ROWS - 7, 7 * COLUMNS - 24, 1160, {.clusters = 1, .stages = 5, .add = false, .bias = true, .gelu = 1});
        check(9, 16, 1536, {.clusters = 1, .stages = 2, .add = true, .bias = false, .gelu = 1});
        check(ROWS - 3, 5 * COLUMNS, 904, {.clusters = 2, .stages = 8, .add = false, .bias = false, .gelu = 0});
    });
}
