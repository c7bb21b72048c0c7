// `wide.cu`: plain, NORM, GATED; STAGES units of a warp's weights under way.
#include "ptx.h"

#include "wide.cu"

#include "check.h"

alignas(128) thread_local unsigned char memory[machine::SHARED_BYTES + machine::GUARD_BYTES];

struct Options { int blocks, clusters; bool add, bias; int gelu; };

static void check(int rows, int n, int k, Options o) {
    const bool is_normed = NORM;
    auto x_later = random_bf16(rows * k, 1.f), x = unwritten<bf16>(rows * k);
    auto w = random_bf16(size_t(SIDES) * n * k, 1.f / sqrtf(k));
    auto norm = random_floats(k, 0.5f, 0.1f), bias = random_floats(SIDES * n, 0.f, 1.f);
    std::vector<O> before, out = unwritten<O>(rows * n);
    for (float value : random_floats(rows * n, 0.f, 1.f)) before.push_back(from_float<O>(value));
    Args args = {
        .x = x.data(), .w = w.data(), .norm = norm.data(), .bias = o.bias ? bias.data() : nullptr, .out = out.data(),
        .rows = rows, .n_total = n, .k_total = k, .blocks = o.blocks, .add_to = o.add, .gelu = o.gelu,
        .eps = 1e-6f, .shift = 0.5f,
    };
    machine::run({
        .blocks = o.blocks * o.clusters, .cluster = o.blocks, .threads = 32 * (WARPS + 1),
        .memory = [] { return memory; },
        .previous = [&] { x = x_later, o.add ? void(out = before) : forget(out); },
        .kernel = [&] { wide(args); },
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
        // Few k and many tiles, k that ends inside a unit, blocks without any k.
        check(1, 139, 1096, {.blocks = 1, .clusters = 2, .add = true, .bias = false, .gelu = 1});
        check(8, 72, 2056, {.blocks = 2, .clusters = 1, .add = false, .bias = true, .gelu = 0});
        check(3, 171, 4104, {.blocks = 4, .clusters = 2, .add = true, .bias = true, .gelu = 1});
        check(2, 72, 8, {.blocks = 4, .clusters = 2, .add = false, .bias = false, .gelu = 0});
    });
}
