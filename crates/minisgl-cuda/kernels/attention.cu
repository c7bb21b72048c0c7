// softmax(scale · q·kᵀ) · v over a row's pages, causal, grouped queries.
//
// A warp owns a tile of 16 (token, head of the group) pairs and reads K and V 16 tokens at a time,
// 16 bytes a lane, straight into mma fragments: for K the order of dimensions inside a chunk of 32
// is permuted as it is for q; for V a lane's 8 consecutive dimensions are column g of 8 products.
// Grid: x = kv head + kv_heads · tile of queries, y = split of the context, z = row.
//
// DECODE: the tile is one token's group, the block's warps and `splits` blocks share the context.
// The last block of a (row, head) merges the splits' partial sums.
// Otherwise each warp has a tile of its own and walks the whole context.

#if !EXACT
#define CHUNKS ((DIM + 31) / 32)
#define GROUPS ((DIM + 63) / 64)
// Groups of up to 8 leave the tile's second half empty.
#ifndef HALVES
#define HALVES 2
#endif
#define MOST_SPLITS 64
// Warps that leave their sums in shared memory side by side.
#define SLOTS (HALVES * DIM > 128 ? 1 : 4)
#define MIN_BLOCKS (DIM <= 128 ? 2 : 1)

struct Args {
    const bf16 *qkv; const bf16 *k_pages; const bf16 *v_pages; bf16 *out;
    const int *slots; const int *query_start; const int *kv_len; const int *page_table;
    float *partial; int *arrived;
    int first_row, pages_a_row, page_size, q_heads, kv_heads, splits, splits_wanted, page_shift, window;
    float scale, soft_cap;
};

__device__ __forceinline__ float score(const Args &a, float s) {
    s *= a.scale;
    return a.soft_cap > 0.f ? a.soft_cap * tanhf(s / a.soft_cap) : s;
}

extern "C" __global__ void __launch_bounds__(128, MIN_BLOCKS) attention(const Args a) {
    let_next_start();
    wait_for_previous();
    int warp = threadIdx.x / 32, lane = threadIdx.x & 31, g = lane / 4, t = lane & 3;
    int row = a.first_row + blockIdx.z, kv_head = blockIdx.x % a.kv_heads, tile = blockIdx.x / a.kv_heads;
    int group = a.q_heads / a.kv_heads, kv_len = a.kv_len[row];
    int q_start = a.query_start[row], extend = a.query_start[row + 1] - q_start, cached = kv_len - extend;
    if (kv_len <= 0) return;
    int width = (a.q_heads + 2 * a.kv_heads) * DIM;
    int pair0 = DECODE ? 0 : (tile * 4 + warp) * 16, pairs = extend * group;
    if (!DECODE && pair0 >= pairs) return;

    int first = 0, last = kv_len, step = 16, splits = 1;
    if (DECODE) {
        int seen = a.window > 0 && a.window < kv_len ? a.window : kv_len;
        // Enough splits to fill the card, more where one row is long, none of less than 64.
        splits = min(a.splits, max(1, min(seen / 64, max(a.splits_wanted, seen / 1024))));
        if (blockIdx.y >= splits) return;
        int from = (kv_len - seen) / 16 * 16, part = ((kv_len - from + splits - 1) / splits + 15) / 16 * 16;
        first = from + blockIdx.y * part + warp * 16, last = min(kv_len, from + (int(blockIdx.y) + 1) * part), step = 64;
    } else {
        last = min(kv_len, cached + (min(pair0 + 15, pairs - 1)) / group + 1);
        if (a.window > 0) first = max(0, cached + pair0 / group - a.window + 1) / 16 * 16;
    }

    u32 q[CHUNKS][2][4] = {};  // [chunk][half of the tile]
    int at[2] = {};
#pragma unroll
    for (int h = 0; h < HALVES; h++) {
        int pair = pair0 + g + 8 * h, token = pair / group;
        at[h] = cached + token;
        const bf16 *from = a.qkv + (long long)(q_start + token) * width + (kv_head * group + pair % group) * DIM;
#pragma unroll
        for (int c = 0; c < CHUNKS; c++) {
            uint4 v = make_uint4(0, 0, 0, 0);
            if (pair < pairs && c * 32 + t * 8 < DIM) v = *(const uint4 *)(from + c * 32 + t * 8);
            q[c][h][0] = v.x, q[c][h][1] = v.y, q[c][h][2] = v.z, q[c][h][3] = v.w;
        }
    }
    float o[GROUPS][8][4] = {}, top[2] = {-infinity(), -infinity()}, sum[2] = {};
    const int *table = a.page_table + (long long)a.slots[row] * a.pages_a_row;
    // A page of 16 or more holds a whole tile: one look-up, made a tile ahead.
    bool whole = a.page_shift >= 4;
    int mask = a.page_size - 1;
    auto page_of = [&](int base) { return whole && base < last ? table[base >> a.page_shift] : 0; };
    auto offset = [&](int page_of_tile, int token) {
        token = min(token, kv_len - 1);
        int page = whole ? page_of_tile : table[token / a.page_size];
        int inside = whole ? token & mask : token % a.page_size;
        return (((long long)page * a.kv_heads + kv_head) * a.page_size + inside) * DIM;
    };
    uint4 k[2][CHUNKS], v[4][GROUPS];
    auto load_k = [&](int base, int page) {
#pragma unroll
        for (int n = 0; n < 2; n++) {
            const bf16 *from = a.k_pages + offset(page, base + n * 8 + g);
#pragma unroll
            for (int c = 0; c < CHUNKS; c++)
                k[n][c] = c * 32 + t * 8 < DIM ? *(const uint4 *)(from + c * 32 + t * 8) : make_uint4(0, 0, 0, 0);
        }
    };
    auto load_v = [&](int base, int page) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const bf16 *from = a.v_pages + offset(page, base + 2 * t + (i & 1) + (i >> 1) * 8);
#pragma unroll
            for (int d = 0; d < GROUPS; d++)
                v[i][d] = d * 64 + g * 8 < DIM ? *(const uint4 *)(from + d * 64 + g * 8) : make_uint4(0, 0, 0, 0);
        }
    };
    int page = page_of(first), ahead = page_of(first + step);
    if (first < last) load_k(first, page), load_v(first, page);
    for (int base = first; base < last; base += step) {
        // The next tile's K is on its way while this one's softmax runs, its V during the next's scores.
        bool more = base + step < last;
        page = ahead, ahead = page_of(base + 2 * step);
        float s[2][4] = {};
#pragma unroll
        for (int n = 0; n < 2; n++)
#pragma unroll
            for (int c = 0; c < CHUNKS; c++) {
                mma(s[n], q[c][0][0], q[c][1][0], q[c][0][1], q[c][1][1], k[n][c].x, k[n][c].y);
                mma(s[n], q[c][0][2], q[c][1][2], q[c][0][3], q[c][1][3], k[n][c].z, k[n][c].w);
            }
        if (more) load_k(base + step, page);
        if (HALVES == 1) s[0][2] = s[0][3] = s[1][2] = s[1][3] = 0.f;
#pragma unroll
        for (int h = 0; h < HALVES; h++) {
            float best = top[h];
#pragma unroll
            for (int n = 0; n < 2; n++)
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    int token = base + n * 8 + 2 * t + e;
                    bool seen = token < last && token <= at[h] && (a.window <= 0 || token > at[h] - a.window);
                    float &x = s[n][2 * h + e];
                    x = seen ? score(a, x) : -infinity();
                    best = fmaxf(best, x);
                }
            best = fmaxf(best, __shfl_xor_sync(~0u, best, 1));
            best = fmaxf(best, __shfl_xor_sync(~0u, best, 2));
            float safe = best == -infinity() ? 0.f : best, shrink = __expf(top[h] - safe);
            top[h] = best, sum[h] *= shrink;
#pragma unroll
            for (int d = 0; d < GROUPS; d++)
#pragma unroll
                for (int j = 0; j < 8; j++) o[d][j][2 * h] *= shrink, o[d][j][2 * h + 1] *= shrink;
#pragma unroll
            for (int n = 0; n < 2; n++)
#pragma unroll
                for (int e = 0; e < 2; e++) sum[h] += s[n][2 * h + e] = __expf(s[n][2 * h + e] - safe);
        }
        u32 p0 = pack(s[0][0], s[0][1]), p1 = pack(s[0][2], s[0][3]);
        u32 p2 = pack(s[1][0], s[1][1]), p3 = pack(s[1][2], s[1][3]);
#pragma unroll
        for (int d = 0; d < GROUPS; d++)
#pragma unroll
            for (int j = 0; j < 8; j++) {
                const u32 select = j & 1 ? 0x7632 : 0x5410;
                u32 b0 = __byte_perm(((const u32 *)&v[0][d])[j / 2], ((const u32 *)&v[1][d])[j / 2], select);
                u32 b1 = __byte_perm(((const u32 *)&v[2][d])[j / 2], ((const u32 *)&v[3][d])[j / 2], select);
                mma(o[d][j], p0, p1, p2, p3, b0, b1);
            }
        if (more) load_v(base + step, page);
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
        sum[h] += __shfl_xor_sync(~0u, sum[h], 1);
        sum[h] += __shfl_xor_sync(~0u, sum[h], 2);
    }
    // Lane (g, t) holds o of pairs g and g + 8 at dimensions d·64 + (2t, 2t + 1)·8 + j.
    if (!DECODE) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            int pair = pair0 + g + 8 * h;
            if (pair >= pairs) continue;
            bf16 *to = a.out + ((long long)(q_start + pair / group) * a.q_heads + kv_head * group + pair % group) * DIM;
#pragma unroll
            for (int d = 0; d < GROUPS; d++)
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    int dim = d * 64 + (2 * t + e) * 8, c = 2 * h + e;
                    if (dim < DIM)
                        *(uint4 *)(to + dim) = make_uint4(
                            pack(o[d][0][c] / sum[h], o[d][1][c] / sum[h]), pack(o[d][2][c] / sum[h], o[d][3][c] / sum[h]),
                            pack(o[d][4][c] / sum[h], o[d][5][c] / sum[h]), pack(o[d][6][c] / sum[h], o[d][7][c] / sum[h]));
                }
        }
        return;
    }
    // Merge the block's warps, then the splits: [pair][DIM sums, top, sum].
    __shared__ float parts[4][16][2];
    __shared__ float merged[SLOTS][HALVES * 8][DIM];
    if (t == 0)
        for (int h = 0; h < 2; h++) parts[warp][g + 8 * h][0] = top[h], parts[warp][g + 8 * h][1] = sum[h];
    __syncthreads();
    for (int turn = 0; turn < 4 / SLOTS; turn++) {
        if (turn == warp / SLOTS) {
#pragma unroll
            for (int h = 0; h < HALVES; h++) {
                int pair = g + 8 * h;
                float best = fmaxf(fmaxf(parts[0][pair][0], parts[1][pair][0]), fmaxf(parts[2][pair][0], parts[3][pair][0]));
                float factor = top[h] == -infinity() ? 0.f : __expf(top[h] - best);
#pragma unroll
                for (int d = 0; d < GROUPS; d++)
#pragma unroll
                    for (int e = 0; e < 2; e++) {
                        int dim = d * 64 + (2 * t + e) * 8;
                        if (dim >= DIM) continue;
                        float4 *to = (float4 *)&merged[warp % SLOTS][pair][dim];
#pragma unroll
                        for (int q4 = 0; q4 < 2; q4++) {
                            float4 v = make_float4(o[d][4 * q4][2 * h + e] * factor, o[d][4 * q4 + 1][2 * h + e] * factor,
                                                   o[d][4 * q4 + 2][2 * h + e] * factor, o[d][4 * q4 + 3][2 * h + e] * factor);
                            if (SLOTS < 4 && turn > 0) {
                                float4 old = to[q4];
                                v.x += old.x, v.y += old.y, v.z += old.z, v.w += old.w;
                            }
                            to[q4] = v;
                        }
                    }
            }
        }
        __syncthreads();
    }
    long long unit = (long long)row * a.kv_heads + kv_head;
    __shared__ int is_last;
    bf16 *to = a.out + ((long long)q_start * a.q_heads + kv_head * group) * DIM;
    float *mine = a.partial + ((unit * a.splits + blockIdx.y) * 16) * (DIM + 2);
    for (int i = threadIdx.x; i < group * DIM; i += 128) {
        int pair = i / DIM;
        float best = -infinity(), total = 0.f;
        for (int w = 0; w < 4; w++) best = fmaxf(best, parts[w][pair][0]);
        for (int w = 0; w < 4; w++)
            if (parts[w][pair][0] != -infinity()) total += parts[w][pair][1] * __expf(parts[w][pair][0] - best);
        float value = 0.f;
        for (int w = 0; w < SLOTS; w++) value += merged[w][pair][i % DIM];
        if (splits == 1) { to[i] = from_float<bf16>(value / total); continue; }
        mine[pair * (DIM + 2) + i % DIM] = value;
        if (i % DIM == 0) mine[pair * (DIM + 2) + DIM] = best, mine[pair * (DIM + 2) + DIM + 1] = total;
    }
    if (splits == 1) return;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) is_last = atomicAdd(a.arrived + unit, 1) == splits - 1;
    __syncthreads();
    if (!is_last) return;
    __threadfence();
    const float *all = a.partial + unit * a.splits * 16 * (DIM + 2);
    __shared__ float factors[MOST_SPLITS][16];
    for (int i = threadIdx.x; i < splits * 16; i += 128)
        factors[i / 16][i & 15] = (i & 15) < group ? __ldcg(all + i * (DIM + 2) + DIM) : 0.f;
    __syncthreads();
    for (int pair = threadIdx.x; pair < group; pair += 128) {
        float best = -infinity(), total = 0.f;
        for (int s = 0; s < splits; s++) best = fmaxf(best, factors[s][pair]);
#pragma unroll 4
        for (int s = 0; s < splits; s++) total += (factors[s][pair] = __expf(factors[s][pair] - best)) * __ldcg(all + (s * 16 + pair) * (DIM + 2) + DIM + 1);
        for (int s = 0; s < splits; s++) factors[s][pair] /= total;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < group * DIM; i += 128) {
        int pair = i / DIM;
        float value = 0.f;
#pragma unroll 8
        for (int s = 0; s < splits; s++)
            if (factors[s][pair] > 0.f) value += factors[s][pair] * __ldcg(all + (s * 16 + pair) * (DIM + 2) + i % DIM);
        to[i] = from_float<bf16>(value);
    }
    if (threadIdx.x == 0) a.arrived[unit] = 0;
}

#else
// The exact mode: f32 throughout, a warp a (token, query head), one key at a time.
struct Args {
    const float *qkv; const float *k_pages; const float *v_pages; float *out;
    const int *slots; const int *query_start; const int *kv_len; const int *page_table;
    float *partial; int *arrived;
    int first_row, pages_a_row, page_size, q_heads, kv_heads, splits, splits_wanted, page_shift, window;
    float scale, soft_cap;
};
extern "C" __global__ void attention(const Args a) {
    let_next_start();
    wait_for_previous();
    int row = a.first_row + blockIdx.z, lane = threadIdx.x & 31;
    int kv_len = a.kv_len[row], q_start = a.query_start[row], extend = a.query_start[row + 1] - q_start;
    int item = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    int token = item / a.q_heads, head = item % a.q_heads, kv_head = head / (a.q_heads / a.kv_heads);
    if (kv_len <= 0 || token >= extend) return;
    const float *from = a.qkv + (long long)(q_start + token) * (a.q_heads + 2 * a.kv_heads) * DIM + head * DIM;
    const int per_lane = (DIM + 31) / 32;
    float q[per_lane], o[per_lane] = {}, top = -infinity(), sum = 0.f;
    for (int i = 0; i < per_lane; i++) q[i] = lane + 32 * i < DIM ? from[lane + 32 * i] : 0.f;
    int at = kv_len - extend + token, first = a.window > 0 ? max(0, at - a.window + 1) : 0;
    const int *table = a.page_table + (long long)a.slots[row] * a.pages_a_row;
    for (int p = first; p <= at; p++) {
        long long offset = (((long long)table[p / a.page_size] * a.kv_heads + kv_head) * a.page_size + p % a.page_size) * DIM;
        float s = 0.f;
        for (int i = 0; i < per_lane; i++) if (lane + 32 * i < DIM) s += q[i] * a.k_pages[offset + lane + 32 * i];
        s = warp_sum(s) * a.scale;
        if (a.soft_cap > 0.f) s = a.soft_cap * tanhf(s / a.soft_cap);
        float best = fmaxf(top, s), shrink = expf(top - best), weight = expf(s - best);
        top = best, sum = sum * shrink + weight;
        for (int i = 0; i < per_lane; i++)
            o[i] = o[i] * shrink + (lane + 32 * i < DIM ? weight * a.v_pages[offset + lane + 32 * i] : 0.f);
    }
    float *to = a.out + ((long long)(q_start + token) * a.q_heads + head) * DIM;
    for (int i = 0; i < per_lane; i++) if (lane + 32 * i < DIM) to[lane + 32 * i] = o[i] / sum;
}
#endif
