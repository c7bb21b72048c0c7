// `prefill.cu` for heads of DIM in groups of GROUP, with scores capped or not.
#include "ptx.h"

#include "prefill.cu"

#include <numeric>

#include "check.h"

alignas(128) thread_local unsigned char memory[machine::SHARED_BYTES + machine::GUARD_BYTES];

constexpr int KV_HEADS = 2, HEADS = KV_HEADS * GROUP, WIDTH = (HEADS + 2 * KV_HEADS) * DIM;

// Tokens in the cache before, and new ones.
struct Row { int cached, extend; };
enum Queries { ROTATED_BEFORE, TO_ROTATE, TO_NORM_AND_ROTATE };
struct Options { int blocks, page_size, section, window; Queries queries; };

// A query head, normed if there are weights, and rotated by angles `at` [cosines, sines].
static std::vector<double> rotated(const bf16 *head, const float *norm, const float *at) {
    std::vector<double> x(DIM), y(DIM);
    double squares = 0;
    for (int i = 0; i < DIM; i++) x[i] = to_float(head[i]), squares += x[i] * x[i];
    for (int i = 0; i < DIM && norm; i++) x[i] *= (norm[i] + 1) / sqrt(squares / DIM + 1e-6);
    for (int i = 0; i < DIM / 2; i++) {
        double low = x[i], high = x[i + DIM / 2], c = at[i], s = at[i + DIM / 2];
        y[i] = low * c - high * s, y[i + DIM / 2] = high * c + low * s;
    }
    return y;
}

static void check(const std::vector<Row> &rows, Options o) {
    std::vector<int> slots, query_start{0}, kv_len;
    int pages_a_row = 1;
    for (const Row &row : rows) {
        slots.push_back(int(rows.size() - 1 - slots.size()));
        query_start.push_back(query_start.back() + row.extend);
        kv_len.push_back(row.cached + row.extend);
        pages_a_row = std::max(pages_a_row, kv_len.back() / o.page_size + 1);
    }
    std::vector<int> table(rows.size() * pages_a_row);
    std::iota(table.begin(), table.end(), 0);
    std::shuffle(table.begin(), table.end(), inputs);
    auto place = [&](int row, int head, int token) {
        int page = table[slots[row] * pages_a_row + token / o.page_size];
        return ((size_t(page) * KV_HEADS + head) * o.page_size + token % o.page_size) * DIM;
    };
    auto k = unwritten<bf16>(table.size() * KV_HEADS * o.page_size * DIM), v = k;
    for (int row = 0; row < int(rows.size()); row++)
        for (int token = 0; token < kv_len[row]; token++)
            for (int head = 0; head < KV_HEADS; head++)
                for (auto *pages : {&k, &v}) {
                    auto values = random_bf16(DIM, 1.f);
                    std::copy(values.begin(), values.end(), pages->begin() + place(row, head, token));
                }
    int tokens = query_start.back(), longest = 0;
    for (const Row &row : rows) longest = std::max(longest, row.extend);
    auto qkv_later = random_bf16(size_t(tokens) * WIDTH, 1.f), qkv = unwritten<bf16>(size_t(tokens) * WIDTH);
    auto k_later = k, v_later = v;
    forget(k), forget(v);
    auto out = unwritten<bf16>(size_t(tokens) * HEADS * DIM);
    int positions = *std::max_element(kv_len.begin(), kv_len.end());
    std::vector<float> rope, norm = random_floats(DIM, 0.f, 0.3f);
    for (int position = 0; position < positions; position++)
        for (int i = 0; i < DIM; i++) {
            double angle = position * pow(10000, -2.0 * (i % (DIM / 2)) / DIM);
            rope.push_back(float(i < DIM / 2 ? cos(angle) : sin(angle)));
        }
    const float *angles = o.queries == ROTATED_BEFORE ? nullptr : rope.data();
    const float *weight = o.queries == TO_NORM_AND_ROTATE ? norm.data() : nullptr;
    Rotation rotation = {.angles = angles, .weight = weight, .eps = 1e-6f, .shift = 1.f};
    int taken = 0;
    const float scale = 1.f / sqrtf(DIM);
    Args args = {
        .qkv = qkv.data(), .k_pages = k.data(), .v_pages = v.data(), .out = out.data(),
        .slots = slots.data(), .query_start = query_start.data(), .kv_len = kv_len.data(), .page_table = table.data(),
        .arrived = &taken, .first_row = 0, .pages_a_row = pages_a_row, .page_size = o.page_size, .q_heads = HEADS, .kv_heads = KV_HEADS,
        .splits = 1, .splits_wanted = 1, .page_shift = __builtin_ctz(o.page_size), .window = o.window,
        .scale = scale, .soft_cap = 3.f,
    };
    int items = (longest * GROUP + 127) / 128 * int(rows.size()) * KV_HEADS;
    auto map = [&](const std::vector<bf16> &pages) {
        return TensorMap{pages.data(), int(pages.size() / DIM), DIM, std::min(o.page_size, TILE)};
    };
    machine::run({
        .blocks = std::min(o.blocks, items), .cluster = 1, .threads = 384,
        .memory = [] { return memory; },
        .previous = [&] { qkv = qkv_later, k = k_later, v = v_later; },
        .kernel = [&] { prefill(map(k), map(v), args, rotation, {items, int(rows.size()), o.section}, int(k.size() / DIM)); },
    });
    if (taken) fail("the count of items is left for the next step");
    for (int row = 0; row < int(rows.size()); row++)
        for (int token = 0; token < rows[row].extend; token++) {
            int at = rows[row].cached + token;
            std::vector<double> got, want(HEADS * DIM);
            const bf16 *q = &qkv[size_t(query_start[row] + token) * WIDTH];
            for (int i = 0; i < HEADS * DIM; i++) got.push_back(to_float(out[size_t(query_start[row] + token) * HEADS * DIM + i]));
            for (int head = 0; head < HEADS; head++) {
                std::vector<double> query;
                for (int i = 0; i < DIM; i++) query.push_back(to_float(q[head * DIM + i]));
                if (angles) query = rotated(q + head * DIM, weight, angles + size_t(at) * DIM);
                double sum = 0;
                for (int other = o.window > 0 ? std::max(0, at + 1 - o.window) : 0; other <= at; other++) {
                    size_t from = place(row, head / GROUP, other);
                    double score = 0;
                    for (int i = 0; i < DIM; i++) score += query[i] * to_float(k[from + i]) * scale;
                    if (SOFT_CAP) score = 3 * tanh(score / 3);
                    sum += exp(score);
                    for (int i = 0; i < DIM; i++) want[head * DIM + i] += exp(score) * to_float(v[from + i]);
                }
                for (int i = 0; i < DIM; i++) want[head * DIM + i] /= sum;
            }
            check_close("attention", got, want);
        }
}

int main(int count, char **seeds) {
    return with_seeds(count, seeds, [] {
        check({{0, 1}, {0, 9}, {0, 64}, {40, 3}}, {.blocks = 3, .page_size = 8, .section = 3, .queries = TO_NORM_AND_ROTATE});
        check({{0, 300}, {131, 70}, {0, 0}}, {.blocks = 2, .page_size = 16, .section = 1, .queries = TO_NORM_AND_ROTATE});
        check({{0, 260}, {5, 1}}, {.blocks = 5, .page_size = 32, .section = 2, .window = 70, .queries = TO_ROTATE});
        check({{250, 150}}, {.blocks = 2, .page_size = 256, .section = 1});
    });
}
