// `mlp.cu` with the sizes that FIRST, SECOND and CLUSTER name.
#include "ptx.h"

#include "half_layer.cuh"
#include "mlp.cu"

#include "half_layer.h"

alignas(128) thread_local unsigned char memory[machine::SHARED_BYTES + machine::GUARD_BYTES];

// `lacks`: inner features that the last cluster does not have.
static void check(int clusters, int lacks, int rows, int parts, int gelu) {
    const int hidden = HIDDEN, inner_total = INNER * clusters - lacks;
    Stream stream(rows, hidden, parts, clusters);
    auto gate_up = random_bf16(size_t(2) * inner_total * hidden, 0.05f);
    auto down = random_bf16(size_t(hidden) * inner_total, 0.05f);
    Args args = {stream.residual(), gate_up.data(), down.data(), stream.part.data(), inner_total, gelu};
    machine::run({
        .blocks = clusters * CLUSTER, .cluster = CLUSTER, .threads = THREADS,
        .memory = [] { return memory; },
        .previous = [&] { stream.begin(); },
        .kernel = [&] { mlp(args); },
    });
    for (int row = 0; row < rows; row++) {
        auto both = product(gate_up, stream.normed(row));
        std::vector<double> inner_values(inner_total);
        for (int i = 0; i < inner_total; i++) inner_values[i] = activate(both[i], gelu) * both[inner_total + i];
        stream.check(row, product(down, inner_values));
    }
}

int main(int count, char **seeds) {
    return with_seeds(count, seeds, [] {
        check(1, 8, 1, 0, 0);
        check(2, 0, 3, 1, 1);
        check(3, INNER - 24, 8, 8, 0);
    });
}
