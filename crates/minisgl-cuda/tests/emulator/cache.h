// A KV cache of rows of one new token each, and attention over it in f64. Included behind
// `attention_tile.cuh`; GROUP query heads a KV head.
#pragma once

#include <numeric>

#include "check.h"

constexpr int PAGE_SHIFT = 5, PAGE = 1 << PAGE_SHIFT, PAGES_A_ROW = 32, KV_HEADS = 2;

struct Cache {
    int rows;
    // Tokens with the new one, slots in the page table, and where the new token goes, in tokens.
    std::vector<int> lens, slots, table, store_at;
    // [pages, KV_HEADS, PAGE, DIM], and as they were.
    std::vector<bf16> k, v, k_before, v_before;
    // Cosines, and behind them sines.
    std::vector<float> rope;

    // `prefixes`: of rows, the first of which has the pages that all have for their first tokens.
    struct Prefix { std::vector<int> rows; int tokens; };
    Cache(const std::vector<int> &lens, const std::vector<Prefix> &prefixes = {}) : rows(int(lens.size())), lens(lens) {
        for (int row = 0; row < rows; row++) slots.push_back(rows - 1 - row);
        table.resize(rows * PAGES_A_ROW);
        std::iota(table.begin(), table.end(), 0);
        std::shuffle(table.begin(), table.end(), inputs);
        for (const Prefix &prefix : prefixes)
            for (int row : prefix.rows)
                for (int i = 0; i < prefix.tokens / PAGE; i++)
                    table[slots[row] * PAGES_A_ROW + i] = table[slots[prefix.rows[0]] * PAGES_A_ROW + i];
        k = v = unwritten<bf16>(table.size() * KV_HEADS * PAGE * DIM);
        for (int row = 0; row < rows; row++) {
            int last = lens[row] - 1;
            store_at.push_back(last < 0 ? -1 : page(row, last) * PAGE + last % PAGE);
            for (int token = 0; token < last; token++)
                for (int head = 0; head < KV_HEADS; head++)
                    for (auto *pages : {&k, &v}) {
                        auto values = random_bf16(DIM, 1.f);
                        std::copy(values.begin(), values.end(), pages->begin() + place(row, head, token));
                    }
        }
        k_before = k, v_before = v;
        for (int position = 0; position < PAGES_A_ROW * PAGE; position++)
            for (int i = 0; i < DIM; i++) {
                double angle = position * pow(10000, -2.0 * (i % (DIM / 2)) / DIM);
                rope.push_back(float(i < DIM / 2 ? cos(angle) : sin(angle)));
            }
    }

    int page(int row, int token) const { return table[slots[row] * PAGES_A_ROW + token / PAGE]; }
    size_t place(int row, int head, int token) const {
        return ((size_t(page(row, token)) * KV_HEADS + head) * PAGE + token % PAGE) * DIM;
    }
    TensorMap map(const std::vector<bf16> &pages) const { return {pages.data(), int(pages.size() / DIM), DIM}; }
    TensorMap half_map(const std::vector<bf16> &pages) const {
        return {.from = pages.data(), .rows = int(pages.size() / DIM), .columns = DIM, .box_rows = 8, .box_parts = 1};
    }

    // A head of the row's new token, normed if there are weights, and rotated.
    void rotate(int row, double *head, const float *norm) const {
        double squares = 0;
        for (int i = 0; i < DIM; i++) squares += head[i] * head[i];
        for (int i = 0; i < DIM && norm; i++) head[i] *= norm[i] / sqrt(squares / DIM + 1e-6);
        const float *angles = &rope[size_t(lens[row] - 1) * DIM];
        for (int i = 0; i < DIM / 2; i++) {
            double low = head[i], high = head[i + DIM / 2], c = angles[i], s = angles[i + DIM / 2];
            head[i] = low * c - high * s, head[i + DIM / 2] = high * c + low * s;
        }
    }

    // The row's attention. `qkv`: its query heads, and the k and v of each KV head.
    std::vector<double> attend(int row, std::vector<double> qkv, const float *q_norm, const float *k_norm, Scores scores) const {
        int q_heads = KV_HEADS * GROUP, last = lens[row] - 1;
        std::vector<double> out(q_heads * DIM);
        if (last < 0) return out;
        for (int head = 0; head < q_heads + KV_HEADS; head++) rotate(row, &qkv[head * DIM], head < q_heads ? q_norm : k_norm);
        const double *new_k = &qkv[q_heads * DIM], *new_v = new_k + KV_HEADS * DIM;
        check_stored(row, new_k, new_v);
        for (int head = 0; head < q_heads; head++) {
            int kv_head = head / GROUP;
            double sum = 0;
            for (int token = scores.window > 0 ? std::max(0, last + 1 - scores.window) : 0; token <= last; token++) {
                size_t at = token < last ? place(row, kv_head, token) : 0;
                auto of = [&](const std::vector<bf16> &before, const double *fresh, int i) {
                    return token < last ? to_float(before[at + i]) : fresh[kv_head * DIM + i];
                };
                double score = 0;
                for (int i = 0; i < DIM; i++) score += qkv[head * DIM + i] * of(k_before, new_k, i) * scores.scale;
                if (scores.soft_cap > 0) score = scores.soft_cap * tanh(score / scores.soft_cap);
                sum += exp(score);
                for (int i = 0; i < DIM; i++) out[head * DIM + i] += exp(score) * of(v_before, new_v, i);
            }
            for (int i = 0; i < DIM; i++) out[head * DIM + i] /= sum;
        }
        return out;
    }

    void check_stored(int row, const double *new_k, const double *new_v) const {
        for (int head = 0; head < KV_HEADS; head++)
            for (auto [pages, fresh] : {std::pair(&k, new_k), std::pair(&v, new_v)}) {
                std::vector<double> got, want(fresh + head * DIM, fresh + (head + 1) * DIM);
                for (int i = 0; i < DIM; i++) got.push_back(to_float((*pages)[place(row, head, lens[row] - 1) + i]));
                check_close("stored in the cache", got, want);
            }
    }

    // That nothing but the new tokens was written. Called last.
    void check_untouched() {
        for (int row = 0; row < rows; row++)
            for (int head = 0; head < KV_HEADS && lens[row] > 0; head++)
                for (int i = 0; i < DIM; i++) {
                    size_t at = place(row, head, lens[row] - 1) + i;
                    k[at] = k_before[at], v[at] = v_before[at];
                }
        size_t bytes = k.size() * sizeof(bf16);
        if (memcmp(k.data(), k_before.data(), bytes) || memcmp(v.data(), v_before.data(), bytes))
            fail("an earlier token's K or V was written");
    }
};
