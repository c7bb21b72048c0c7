// `choose` of `sample.cu`, from what is known of chunks of CHUNK logits, and `survey`, of few of them.
#include "ptx.h"

#include "sample.cu"

#include "check.h"

alignas(128) thread_local unsigned char memory[machine::SHARED_BYTES + machine::GUARD_BYTES];

// A row's parameters. With `k` so many logits are left, all others with 0.
struct Row { float temperature, top_p, min_p; int k; };

static void check(int vocab, float spread, bool has_numbers, bool is_last_use) {
    std::vector<Row> rows = {
        {0, 1, 0, 0}, {1, 1, 0, 0}, {0.6f, 1, 0, 0}, {2, 1, 0, 0}, {1, 1, 0, 5}, {1, 0.5f, 0, 0}, {1, 1, 0.3f, 0},
        // Borders among equals.
        {1, 1, 0, 2}, {0.1f, 0.3f, 0, 0},
        {0, 1, 0, 0},
    };
    // Of many logits, only some: filters look at each of them a dozen times.
    if (vocab > 100'000) rows.erase(rows.begin() + 3, rows.end() - 1);
    int count = int(rows.size()), chunks = (vocab + CHUNK - 1) / CHUNK;
    std::vector<float> logits = random_floats(size_t(count) * vocab, 0, spread);
    // The highest more than once, and far from one another; in the last row at the end alone.
    for (int row = 0; row < count; row++) {
        float *of = &logits[size_t(row) * vocab];
        of[vocab - 3] = of[vocab / 2] = of[vocab / 2 + 1] = *std::max_element(of, of + vocab);
        if (row == count - 1) of[vocab - 2] = of[vocab - 3] + 1;
    }
    if (!has_numbers) logits.assign(logits.size(), NAN);
    std::vector<float4> stats;
    std::vector<float> temperature, top_p, min_p;
    std::vector<int> top_k, position, slots, table = unwritten<int>(count), tokens = unwritten<int>(count);
    std::vector<int2> seeds;
    for (int row = 0; row < count; row++) {
        const Row &r = rows[row];
        temperature.push_back(r.temperature), top_p.push_back(r.top_p), min_p.push_back(r.min_p), top_k.push_back(r.k);
        position.push_back(100 + row), seeds.push_back({int(inputs()), 7}), slots.push_back(row % 2 ? count - 1 - row : -1);
        for (int chunk = 0; chunk < chunks; chunk++) {
            const float *from = &logits[size_t(row) * vocab + chunk * CHUNK], *end = from + std::min(CHUNK, vocab - chunk * CHUNK);
            const float *best = std::max_element(from, end);
            float sum = 0;
            for (const float *x = from; x < end && r.temperature > 0; x++) sum += expf((*x - *best) / r.temperature);
            int index = int(best - &logits[size_t(row) * vocab]);
            stats.push_back({has_numbers ? *best : -INFINITY, 0, sum, 0});
            memcpy(&stats.back().y, &index, sizeof index);
        }
    }
    if (chunks <= 4) {
        std::vector<float4> surveyed = unwritten<float4>(stats.size());
        machine::run({
            .blocks = count, .cluster = 1, .threads = 128,
            .memory = [] { return memory; },
            .previous = [] {},
            .kernel = [&] { survey(logits.data(), temperature.data(), vocab, chunks, surveyed.data()); },
        });
        for (size_t i = 0; i < stats.size() && has_numbers; i++) {
            float4 got = surveyed[i], want = stats[i];
            // Where nothing is drawn, nobody asks for sums.
            bool is_right = got.x == want.x && !memcmp(&got.y, &want.y, sizeof got.y) && (want.z == 0 || fabsf(got.z - want.z) < 1e-4f * want.z);
            if (!is_right) machine::fail("row %zu: %g, sum %g and not %g, %g", i / chunks, got.x, got.z, want.x, want.z);
        }
        stats = surveyed;
    }
    const std::vector<float> kept = logits;
    machine::run({
        .blocks = count, .cluster = 1, .threads = 1024,
        .memory = [] { return memory; },
        .previous = [] {},
        .kernel = [&] {
            choose(logits.data(), stats.data(), temperature.data(), top_k.data(), top_p.data(), min_p.data(), seeds.data(), position.data(),
                   slots.data(), vocab, chunks, CHUNK, is_last_use, table.data(), tokens.data());
        },
    });
    for (int row = 0; row < count; row++) {
        const Row &r = rows[row];
        int token = tokens[row];
        if (slots[row] >= 0 && table[slots[row]] != token) machine::fail("row %d: %d in the table and not %d", row, table[slots[row]], token);
        if (token < 0 || token >= vocab) machine::fail("row %d: %d", row, token);
        if (!has_numbers) continue;
        const float *of = &kept[size_t(row) * vocab];
        std::vector<int> order(vocab);
        for (int i = 0; i < vocab; i++) order[i] = i;
        std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return of[a] > of[b]; });
        if (r.temperature == 0) {
            if (token != order[0]) machine::fail("row %d: %d and not %d", row, token, order[0]);
            continue;
        }
        auto mass = [&](int i) { return exp(double(of[i] - of[order[0]]) / r.temperature); };
        double all = 0, kept = 0, run = 0, draw = uniform(seeds[row].x, seeds[row].y, position[row]);
        for (int i : order) all += mass(i);
        std::vector<bool> keeps(vocab);
        for (int place = 0; place < vocab; place++) {
            int i = order[place];
            keeps[i] = (r.k == 0 || place < r.k) && run < r.top_p * all && mass(i) >= r.min_p;
            run += mass(i), kept += keeps[i] ? mass(i) : 0;
        }
        double before = 0;
        for (int i = 0; i < token; i++) before += keeps[i] ? mass(i) : 0;
        bool is_right = keeps[token] && before <= (draw + 1e-5) * kept && before + mass(token) >= (draw - 1e-5) * kept;
        if (!is_right) machine::fail("row %d: %d, of %g behind %g, for %g of %g", row, token, mass(token), before, draw * kept, kept);
    }
}

int main(int count, char **seeds) {
    // Of Random123's known answers, that for zeros.
    if (uniform(0, 0, 0) != (0x6627e8d5 >> 8) / 16777216.f) machine::fail("%g is not Philox's", uniform(0, 0, 0));
    return with_seeds(count, seeds, [] {
        check(1100, 1, true, false);
        check(1100, 1, true, true);
        // More chunks than threads have for themselves.
        if (CHUNK < 512) check(2080 * CHUNK + 5, 3, true, true);
        check(CHUNK - 1, 0.1f, true, true);
        check(700, 1, false, false);
    });
}
