// Attention of one token's group of query heads over tiles of 16 tokens in shared memory, by warps.
//
// A tile is [K, V][part][16] rows of 128 bytes in the 128-byte swizzle, where a part is 64 dimensions. SOFT_CAP:
// scores may have a soft cap.

#define TILE 16
#define PARTS (DIM / 64)
#define MATRIX_BYTES (TILE * DIM * 2)
#define STAGE_BYTES (2 * MATRIX_BYTES)
#define PAIRS_A_LANE (DIM / 128 + (DIM < 128))
// Padded, so that the heads' rows begin in different banks.
#define Q_STRIDE (DIM + 8)
#define SUMS_STRIDE (DIM + 4)

// How scores are made of products, and which tokens count.
struct Scores {
    float scale, soft_cap;
    int window;

    // What is multiplied with a score, or with a capped one, to make its exponential a power of 2.
    __device__ __forceinline__ float power_of_2_scale() const { return (SOFT_CAP && soft_cap > 0.f ? 1.f : scale) * 1.4426950408889634f; }
};

// A head's `DIM` numbers over a warp: lane l holds pairs l, l + 32, .. of the low half and of the high.
struct Head {
    float2 low[PAIRS_A_LANE], high[PAIRS_A_LANE], w_low[PAIRS_A_LANE], w_high[PAIRS_A_LANE], cosines[PAIRS_A_LANE], sines[PAIRS_A_LANE];

    static __device__ bool holds(int j) { return 2 * (int(threadIdx.x & 31) + 32 * j) < DIM / 2; }
    static __device__ int index(int j) { return 2 * ((threadIdx.x & 31) + 32 * j); }

    // The norm's weights and the rotation's angles, whatever the numbers are. A null weight is no norm.
    __device__ void read_factors(const float *weight, const float *angles) {
#pragma unroll
        for (int j = 0; j < PAIRS_A_LANE; j++) {
            w_low[j] = w_high[j] = cosines[j] = sines[j] = make_float2(0.f, 0.f);
            if (!holds(j)) continue;
            int i = index(j);
            if (weight) w_low[j] = *(const float2 *)(weight + i), w_high[j] = *(const float2 *)(weight + i + DIM / 2);
            cosines[j] = *(const float2 *)(angles + i), sines[j] = *(const float2 *)(angles + i + DIM / 2);
        }
    }
    // The numbers, normed.
    __device__ void read_numbers(const bf16 *from, bool is_normed, float eps, float shift) {
        float squares = 0.f;
#pragma unroll
        for (int j = 0; j < PAIRS_A_LANE; j++) {
            low[j] = high[j] = make_float2(0.f, 0.f);
            if (!holds(j)) continue;
            u32 l = *(const u32 *)(from + index(j)), h = *(const u32 *)(from + index(j) + DIM / 2);
            low[j] = make_float2(low_half(l), high_half(l)), high[j] = make_float2(low_half(h), high_half(h));
        }
        if (!is_normed) return;
#pragma unroll
        for (int j = 0; j < PAIRS_A_LANE; j++)
            squares += low[j].x * low[j].x + low[j].y * low[j].y + high[j].x * high[j].x + high[j].y * high[j].y;
        float factor = rsqrtf(warp_sum(squares) / DIM + eps);
#pragma unroll
        for (int j = 0; j < PAIRS_A_LANE; j++) {
            low[j].x *= factor * (w_low[j].x + shift), low[j].y *= factor * (w_low[j].y + shift);
            high[j].x *= factor * (w_high[j].x + shift), high[j].y *= factor * (w_high[j].y + shift);
        }
    }
    __device__ void read(const bf16 *from, const float *weight, float eps, float shift, const float *angles) {
        read_factors(weight, angles);
        read_numbers(from, weight, eps, shift);
    }
    // Packed as it is written: the low half's pair j, and the high half's.
    __device__ uint2 rotated(int j) const {
        float2 c = cosines[j], s = sines[j];
        return make_uint2(pack(low[j].x * c.x - high[j].x * s.x, low[j].y * c.y - high[j].y * s.y),
                          pack(high[j].x * c.x + low[j].x * s.x, high[j].y * c.y + low[j].y * s.y));
    }
};

// Where 16 bytes of a tile's matrix lie.
__device__ __forceinline__ u32 in_tile(int row, int chunk) {
    return chunk / 8 * TILE * 128 + row * 128 + ((chunk ^ row) & 7) * 16;
}

// Where a token's k and v come from and go to in the cache; null: nowhere.
struct NewToken { const bf16 *k; const bf16 *v; bf16 *k_to; bf16 *v_to; const float *norm; const float *angles; float eps, shift; };

// The new token's k and v, normed and rotated, into the cache and into row `row` of the tile at `tile`;
// what is behind it there becomes zeros, since 0 · NaN is NaN. A whole warp.
__device__ __forceinline__ void add_token(const NewToken &n, int row, u32 tile) {
    int lane = threadIdx.x & 31;
    Head head;
    u32 value[PAIRS_A_LANE][2] = {};
#pragma unroll
    for (int j = 0; j < PAIRS_A_LANE; j++)
        if (Head::holds(j)) value[j][0] = *(const u32 *)(n.v + Head::index(j)), value[j][1] = *(const u32 *)(n.v + Head::index(j) + DIM / 2);
    head.read(n.k, n.norm, n.eps, n.shift, n.angles);
#pragma unroll
    for (int j = 0; j < PAIRS_A_LANE; j++) {
        if (!Head::holds(j)) continue;
        uint2 x = head.rotated(j);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int i = Head::index(j) + half * DIM / 2;
            u32 rotated = half ? x.y : x.x, at = tile + in_tile(row, i / 8) + i % 8 * 2;
            store_shared(at, rotated), store_shared(at + MATRIX_BYTES, value[j][half]);
            if (n.k_to) *(u32 *)(n.k_to + i) = rotated, *(u32 *)(n.v_to + i) = value[j][half];
        }
    }
    for (int i = lane; i < (TILE - 1 - row) * (DIM / 8); i += 32)
        store_shared(tile + MATRIX_BYTES + in_tile(row + 1 + i / (DIM / 8), i % (DIM / 8)), make_uint4(0, 0, 0, 0));
    // The copy engine may overwrite this only behind it.
    publish_shared();
    __syncwarp();
}

// A unit's q as the second factor of products, whose first one is a tile: a product's columns are 8 heads. Columns behind
// the group may be anything: a column of the sums is of its own column of q alone.
struct Queries {
    u32 low[DIM / 16][HALVES], high[DIM / 16][HALVES];

    __device__ __forceinline__ void load(const bf16 *from) {
        int lane = threadIdx.x & 31;
        u32 r[4];
#pragma unroll
        for (int h = 0; h < HALVES; h++) {
            u32 address = shared_address(from + ((lane & 7) + 8 * h) * Q_STRIDE + (lane >> 3) * 8);
#pragma unroll
            for (int i = 0; i < DIM / 16; i += 2) {
                load_matrices(r, address + i * 32);
                low[i][h] = r[0], high[i][h] = r[1], low[i + 1][h] = r[2], high[i + 1][h] = r[3];
            }
        }
    }
};

// A warp's sums over its tiles of a unit: V transposed times weights, so that few heads take few registers. Lane (g, t)
// holds o[h][j][2r + e], top[h][e] and its part of sum[h][e]: dimension 16j + g + 8r, head 8h + 2t + e.
struct Sums {
    float o[HALVES][DIM / 16][4], top[HALVES][2], sum[HALVES][2];

    __device__ void clear() {
#pragma unroll
        for (int h = 0; h < HALVES; h++) {
#pragma unroll
            for (int j = 0; j < DIM / 16; j++) o[h][j][0] = o[h][j][1] = o[h][j][2] = o[h][j][3] = 0.f;
            top[h][0] = top[h][1] = -infinity(), sum[h][0] = sum[h][1] = 0.f;
        }
    }

    // The tile's tokens are `base` and the 15 behind it.
    __device__ void add(const Scores &a, int kv_len, int base, u32 tile, const Queries &q) {
        int lane = threadIdx.x & 31, g = lane / 4;
        // Of token g + 8r and head 8h + 2t + e: x[h][2r + e].
        // Products go to two sums by turns, so that they wait less for one another.
        float turns[2][HALVES][4] = {}, (&x)[HALVES][4] = turns[0];
        u32 b[4], weights[HALVES][2];
#pragma unroll
        for (int i = 0; i < DIM / 16; i++) {
            load_matrices(b, tile + in_tile(lane & 15, 2 * i + (lane >> 4)));
#pragma unroll
            for (int h = 0; h < HALVES; h++) mma(turns[i % 2][h], b[0], b[1], b[2], b[3], q.low[i][h], q.high[i][h]);
        }
#pragma unroll
        for (int h = 0; h < HALVES; h++)
#pragma unroll
            for (int e = 0; e < 4; e++) x[h][e] += turns[1][h][e];
        float scale = a.power_of_2_scale();
        bool whole = base + TILE <= kv_len && (a.window <= 0 || base >= kv_len - a.window);
#pragma unroll
        for (int h = 0; h < HALVES; h++) {
#pragma unroll
            for (int e = 0; e < 2; e++) {
                float best = top[h][e];
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    float &y = x[h][2 * r + e];
                    if (SOFT_CAP && a.soft_cap > 0.f) y = a.soft_cap * tanhf(y * a.scale / a.soft_cap);
                    int token = base + g + 8 * r;
                    if (!whole && (token >= kv_len || (a.window > 0 && token < kv_len - a.window))) y = -infinity();
                    best = fmaxf(best, y);
                }
#pragma unroll
                for (int d = 4; d < 32; d *= 2) best = fmaxf(best, __shfl_xor_sync(~0u, best, d));
                float safe = best == -infinity() ? 0.f : best * scale, shrink = power_of_2(top[h][e] * scale - safe);
                top[h][e] = best, sum[h][e] *= shrink;
#pragma unroll
                for (int r = 0; r < 2; r++) sum[h][e] += x[h][2 * r + e] = power_of_2(x[h][2 * r + e] * scale - safe);
#pragma unroll
                for (int j = 0; j < DIM / 16; j++) o[h][j][e] *= shrink, o[h][j][2 + e] *= shrink;
            }
#pragma unroll
            for (int r = 0; r < 2; r++) weights[h][r] = transposed(pack(x[h][2 * r], x[h][2 * r + 1]));
        }
#pragma unroll
        for (int j = 0; j < DIM / 16; j++) {
            load_transposed(b, tile + MATRIX_BYTES + in_tile((lane & 7) + (lane >> 4) * 8, 2 * j + (lane >> 3 & 1)));
#pragma unroll
            for (int h = 0; h < HALVES; h++) mma(o[h][j], b[0], b[1], b[2], b[3], weights[h][0], weights[h][1]);
        }
    }

    // Leaves what there is of `heads` heads: `tops` [head] of best score, in powers of 2, and sum, and `to`
    // [head][SUMS_STRIDE].
    __device__ __forceinline__ void leave(float scale, int heads, float2 *tops, float *to) const {
        int lane = threadIdx.x & 31, g = lane / 4, t = lane & 3;
#pragma unroll
        for (int h = 0; h < HALVES; h++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
                float total = sum[h][e];
#pragma unroll
                for (int d = 4; d < 32; d *= 2) total += __shfl_xor_sync(~0u, total, d);
                int head = 8 * h + 2 * t + e;
                if (head >= heads) continue;
                if (g == 0) tops[head] = make_float2(top[h][e] * scale, total);
                float *sums = to + head * SUMS_STRIDE + g;
#pragma unroll
                for (int j = 0; j < DIM / 16; j++) sums[16 * j] = o[h][j][e], sums[16 * j + 8] = o[h][j][2 + e];
            }
    }
};
