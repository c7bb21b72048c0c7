// A product with few rows of x, and what it should give. Included behind a kernel that is GATED or not, with NORM or
// without.
#pragma once

#include "check.h"

constexpr int SIDES = GATED ? 2 : 1;

struct Operands {
    int rows, n, k;
    bool add;
    int gelu;
    std::vector<bf16> x, w, out;
    std::vector<float> bias;
    // What the kernel in front leaves behind.
    std::vector<bf16> x_later, before;
    // What x is multiplied with behind its norm.
    std::vector<float> norm;

    // Gated products are never added to what is there.
    Operands(int rows, int n, int k, bool add, int gelu)
        : rows(rows), n(n), k(k), add(add && !GATED), gelu(gelu), x(unwritten<bf16>(rows * k)),
          w(random_bf16(size_t(SIDES) * n * k, 1.f / sqrtf(k))), out(unwritten<bf16>(rows * n)),
          bias(random_floats(SIDES * n, 0.f, 1.f)), x_later(random_bf16(rows * k, 1.f)), before(random_bf16(rows * n, 1.f)), norm(k, 1.f) {}

    void weigh(const std::vector<float> &weights, float shift) {
        for (int i = 0; i < k; i++) norm[i] = weights[i] + shift;
    }

    // The end of the kernel in front.
    void begin() { x = x_later, add ? void(out = before) : forget(out); }

    void check(bool has_bias, float eps) const {
        for (int row = 0; row < rows; row++) {
            std::vector<double> got, want;
            double squares = 0;
            for (int i = 0; i < k; i++) squares += to_float(x_later[row * k + i]) * to_float(x_later[row * k + i]);
            double factor = NORM ? 1 / sqrt(squares / k + eps) : 1;
            for (int column = 0; column < n; column++) {
                double sums[2] = {};
                for (int side = 0; side < SIDES; side++) {
                    for (int i = 0; i < k; i++) sums[side] += to_float(x_later[row * k + i]) * norm[i] * to_float(w[(size_t(side) * n + column) * k + i]);
                    sums[side] = factor * sums[side] + (has_bias ? bias[side * n + column] : 0);
                }
                double value = GATED ? activate(sums[0], gelu) * sums[1] : sums[0];
                want.push_back(value + (add ? to_float(before[row * n + column]) : 0));
                got.push_back(to_float(out[row * n + column]));
            }
            // A side's noise counts as often as the other side is large.
            check_close("product", got, want, GATED ? 3 * BF16_NOISE : BF16_NOISE);
        }
    }
};
