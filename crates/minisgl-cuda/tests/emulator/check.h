// Random inputs, and comparisons with what is computed in f64.
#pragma once

#include <random>

#include "ptx.h"

inline std::mt19937 inputs;

inline std::vector<float> random_floats(size_t count, float mean, float deviation) {
    std::normal_distribution<float> distribution(mean, deviation);
    std::vector<float> all(count);
    for (float &x : all) x = distribution(inputs);
    return all;
}
inline std::vector<bf16> random_bf16(size_t count, float deviation) {
    std::vector<bf16> all;
    for (float x : random_floats(count, 0.f, deviation)) all.push_back(to_bf16(x));
    return all;
}
// What memory holds that nobody has written yet.
template <typename V> void forget(std::vector<V> &memory) { memset(memory.data(), 0xff, memory.size() * sizeof(V)); }
template <typename V> std::vector<V> unwritten(size_t count) {
    std::vector<V> memory(count);
    forget(memory);
    return memory;
}

// Of sums over numbers that were rounded to bf16 on their way.
constexpr double BF16_NOISE = 0.015;

// That no number is further from the right one than `noise` times its own size and all numbers' usual one.
inline void check_close(const char *what, const std::vector<double> &got, const std::vector<double> &want, double noise = BF16_NOISE) {
    double squares = 0;
    for (double x : want) squares += x * x;
    double size = sqrt(squares / want.size());
    for (size_t i = 0; i < want.size(); i++)
        if (!(fabs(got[i] - want[i]) <= noise * (fabs(want[i]) + size)))
            fail("%s %zu of %zu is %g and not %g", what, i, want.size(), got[i], want[i]);
}

// Runs `cases` with each seed that is named on the command line.
template <typename Cases> int with_seeds(int count, char **seeds, Cases cases) {
    for (int i = 1; i < count; i++) {
        machine::set_seed(atoi(seeds[i]));
        inputs.seed(atoi(seeds[i]));
        cases();
    }
    return 0;
}
