// `head.cu`: logits of up to ROWS rows of x, and what it says of each tile of them.
#include "ptx.h"

#include "ring.cuh"
#include "head.cu"

#include "check.h"

alignas(128) thread_local unsigned char memory[machine::SHARED_BYTES + machine::GUARD_BYTES];

static void check(int rows, int n, int k, int blocks, int stages) {
    int tiles = (n + TILE - 1) / TILE;
    std::vector<bf16> x = unwritten<bf16>(rows * k), x_later = random_bf16(rows * k, 1.f), w = random_bf16(size_t(n) * k, 1.f / sqrtf(k));
    // Columns that are often a tile's highest and have the same logits: of one thread, of one row's threads.
    for (int first = 0; first + 100 < n; first += TILE) {
        for (int i = 0; i < k; i++) w[size_t(first + 33) * k + i] = to_bf16(4 * to_float(w[size_t(first + 33) * k + i]));
        for (int column : {41, 94}) std::copy_n(&w[size_t(first + 33) * k], k, &w[size_t(first + column) * k]);
    }
    std::vector<float> logits = unwritten<float>(size_t(rows) * n), temperature;
    std::vector<float4> survey = unwritten<float4>(size_t(rows) * tiles);
    for (int row = 0; row < rows; row++) temperature.push_back(row % 3 * 0.5f);
    Args args = {
        .temperature = temperature.data(), .logits = logits.data(), .survey = survey.data(),
        .rows = rows, .n_total = n, .k_total = k, .stages = stages,
    };
    TensorMap w_map = {w.data(), n, k, TILE, 1}, x_map = {x.data(), rows, k, rows};
    machine::run({
        .blocks = blocks, .cluster = 1, .threads = (TEAMS + 1) * TEAM,
        .memory = [] { return memory; },
        .previous = [&] { x = x_later; },
        .kernel = [&] { head(w_map, x_map, args); },
    });
    for (int row = 0; row < rows; row++) {
        std::vector<double> got, want;
        for (int column = 0; column < n; column++) {
            double sum = 0;
            for (int i = 0; i < k; i++) sum += to_float(x_later[row * k + i]) * to_float(w[size_t(column) * k + i]);
            want.push_back(sum), got.push_back(logits[size_t(row) * n + column]);
        }
        check_close("logit", got, want, 1e-4);
        for (int tile = 0; tile < tiles; tile++) {
            const float *from = &logits[size_t(row) * n + tile * TILE], *end = from + std::min(TILE, n - tile * TILE);
            const float *best = std::max_element(from, end);
            float sum = 0;
            for (const float *x = from; x < end && temperature[row] > 0; x++) sum += expf((*x - *best) / temperature[row]);
            float4 said = survey[size_t(row) * tiles + tile];
            int index = int(best - &logits[size_t(row) * n]);
            bool is_right = said.x == *best && __float_as_int(said.y) == index && fabsf(said.z - sum) <= 1e-4f * sum;
            if (!is_right) fail("tile %d of row %d: %g at %d, sum %g, and not %g at %d, %g", tile, row, said.x, __float_as_int(said.y), said.z, *best, index, sum);
        }
    }
}

int main(int count, char **seeds) {
    return with_seeds(count, seeds, [] {
        // More stages than a tile has steps, as many and fewer; k that ends inside a step; a last tile that is cut, and
        // blocks that walk more tiles than others.
        check(ROWS, 3 * TILE - 40, 264, 2, 4);
        check(ROWS - 7, 2 * TILE, 192, 1, 3);
        check(17, TILE + 8, 72, 2, 3);
        check(ROWS - 47, TILE - 8, 584, 1, 4);
    });
}
