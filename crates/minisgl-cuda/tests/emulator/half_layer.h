// What both halves of a layer begin and end with. Included behind `half_layer.cuh`.
#pragma once

#include "check.h"

struct Stream {
    int rows, hidden, parts;
    std::vector<bf16> x, out;
    std::vector<float> added, norm, part;
    // What the kernel in front leaves behind.
    std::vector<bf16> x_later;
    std::vector<float> added_later;

    Stream(int rows, int hidden, int parts, int clusters)
        : rows(rows), hidden(hidden), parts(parts), x(unwritten<bf16>(rows * hidden)), out(x),
          added(unwritten<float>(size_t(std::max(parts, 1)) * rows * hidden)), norm(random_floats(hidden, 1.f, 0.1f)),
          part(size_t(clusters) * rows * hidden), x_later(random_bf16(x.size(), 1.f)),
          added_later(random_floats(added.size(), 0.f, 0.3f)) {}

    Residual residual() { return {x.data(), added.data(), out.data(), norm.data(), rows, hidden, parts, 1e-6f, 0.f}; }

    // The end of the kernel in front, which may have used this one's memory until now.
    void begin() { x = x_later, added = added_later, forget(out), forget(part); }

    // A row of the residual stream, normed; checks what the kernel wrote of it.
    std::vector<double> normed(int row) const {
        std::vector<double> values(hidden);
        double squares = 0;
        for (int i = 0; i < hidden; i++) {
            float sum = 0;
            for (int p = 0; p < parts; p++) sum += added_later[(size_t(p) * rows + row) * hidden + i];
            bf16 now = to_bf16(to_float(x_later[row * hidden + i]) + sum);
            if (now.bits != out[row * hidden + i].bits) fail("residual stream, row %d, column %d", row, i);
            values[i] = to_float(now), squares += values[i] * values[i];
        }
        for (int i = 0; i < hidden; i++) values[i] *= norm[i] / sqrt(squares / hidden + 1e-6);
        return values;
    }

    // The clusters' parts together.
    void check(int row, const std::vector<double> &want) const {
        std::vector<double> got(hidden);
        for (size_t at = size_t(row) * hidden; at < part.size(); at += size_t(rows) * hidden)
            for (int i = 0; i < hidden; i++) got[i] += part[at + i];
        check_close("added to the residual stream", got, want);
    }
};

// w [rows, x] · x
inline std::vector<double> product(const std::vector<bf16> &w, const std::vector<double> &x) {
    std::vector<double> out(w.size() / x.size());
    for (size_t i = 0; i < w.size(); i++) out[i / x.size()] += to_float(w[i]) * x[i % x.size()];
    return out;
}
