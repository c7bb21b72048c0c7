// softmax(scale · q·kᵀ) · v of rows with several queries, on compute capability 9.0: FlashAttention
// (Dao et al., 2022; Shah et al., 2024) over pages.
//
// An item is 128 (token, head of the group) pairs of one row and KV head, the last tokens first: they
// see most. Blocks walk the items. A warp fetches K and V in tiles of 128 tokens, page by page, two
// tiles of each ahead; the two warpgroups take 64 pairs each, from the last tile they see to the
// first. While a tile's softmax runs, the product of the one before with V is under way.
// In shared memory: Q [warpgroup][part][64], K and V [stage][part][128], all rows of 128 bytes in the
// 128-byte swizzle, where a part is 64 dimensions.

#define TILE 128
#define PARTS (DIM / 64)
#define TILE_BYTES (TILE * DIM * 2)
#define QUERY_BYTES (64 * DIM * 2)
#define STAGES 2

struct Args {
    const bf16 *qkv; const bf16 *k_pages; const bf16 *v_pages; bf16 *out;
    const int *slots; const int *query_start; const int *kv_len; const int *page_table;
    float *partial; int *arrived;
    int first_row, pages_a_row, page_size, q_heads, kv_heads, splits, splits_wanted, page_shift, window;
    float scale, soft_cap;
};

// One item, as every role sees it.
struct Item {
    int row, kv_head, kv_len, q_start, cached, pair0, pairs, first_tile, last_tile;
    __device__ bool find(const Args &a, int index, int rows) {
        kv_head = index % a.kv_heads, row = a.first_row + index / a.kv_heads % rows;
        kv_len = a.kv_len[row], q_start = a.query_start[row];
        int extend = a.query_start[row + 1] - q_start, group = a.q_heads / a.kv_heads;
        cached = kv_len - extend, pairs = extend * group;
        int block = (pairs + 127) / 128 - 1 - index / (a.kv_heads * rows);
        if (kv_len <= 0 || block < 0) return false;
        pair0 = block * 128;
        last_tile = (cached + (min(pair0 + 127, pairs - 1)) / group) / TILE;
        first_tile = a.window > 0 ? max(0, cached + pair0 / group - a.window + 1) / TILE : 0;
        return true;
    }
};

// What goes round: a stage, and the parity of its phase.
struct Turn {
    u32 count = 0;
    __device__ u32 stage() const { return count % STAGES; }
    __device__ u32 parity() const { return count / STAGES & 1; }
};

struct Barriers { u32 k_full, k_free, v_full, v_free; };

__device__ __forceinline__ void fetch(const Args &a, const Item &item, const TensorMap &map, int tile, int nowhere,
                                      u32 to, u32 full, u32 free, Turn &turn) {
    int lane = threadIdx.x & 31, box = min(a.page_size, TILE), boxes = TILE / box;
    const int *table = a.page_table + (long long)a.slots[item.row] * a.pages_a_row;
    int y[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        int token = tile * TILE + (lane + 32 * i) / PARTS * box;
        // Pages behind the end are read as zeros.
        y[i] = nowhere;
        if (lane + 32 * i < boxes * PARTS && token < item.kv_len)
            y[i] = (table[token >> a.page_shift] * a.kv_heads + item.kv_head) * a.page_size + (token & (a.page_size - 1));
    }
    u32 barrier = full + turn.stage() * 8;
    barrier_wait(free + turn.stage() * 8, turn.parity() ^ 1);
    if (lane == 0) barrier_expect(barrier, TILE_BYTES);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 2; i++) {
        int op = lane + 32 * i, part = op % PARTS;
        if (op < boxes * PARTS)
            fetch_box(to + turn.stage() * TILE_BYTES + part * TILE * 128 + op / PARTS * box * 128, map, barrier, part * 64, y[i]);
    }
    turn.count++;
}

// Scores of masked tokens become −∞.
__device__ __forceinline__ void mask(const Args &a, float (&s)[64], int base, const int (&at)[2]) {
    int t = threadIdx.x & 3;
#pragma unroll
    for (int i = 0; i < 64; i++) {
        int token = base + i / 4 * 8 + 2 * t + (i & 1), mine = at[i >> 1 & 1];
        if (token > mine || (a.window > 0 && token <= mine - a.window)) s[i] = -infinity();
    }
}

// Scores become weights relative to the best so far; `shrink` is what the old sums are worth.
__device__ __forceinline__ void soften(float (&s)[64], float (&top)[2], float (&sum)[2], float (&shrink)[2], float scale) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float best = top[h];
#pragma unroll
        for (int i = 0; i < 32; i++) best = fmaxf(best, s[i / 2 * 4 + 2 * h + (i & 1)]);
        best = fmaxf(best, __shfl_xor_sync(~0u, best, 1));
        best = fmaxf(best, __shfl_xor_sync(~0u, best, 2));
        float safe = best == -infinity() ? 0.f : best * scale;
        shrink[h] = power_of_2(top[h] * scale - safe);
        top[h] = best, sum[h] *= shrink[h];
#pragma unroll
        for (int i = 0; i < 32; i++) {
            float &x = s[i / 2 * 4 + 2 * h + (i & 1)];
            x = power_of_2(x * scale - safe);
            sum[h] += x;
        }
    }
}

__device__ __forceinline__ void scores(float (&s)[64], u32 q, u32 k) {
#pragma unroll
    for (int i = 0; i < DIM / 16; i++)
        Product<TILE>::shared<0>(s, factor(q + i / 4 * 64 * 128 + i % 4 * 32), factor(k + i / 4 * TILE * 128 + i % 4 * 32), i > 0);
    products_commit();
}

__device__ __forceinline__ void weighted_values(float (&o)[DIM / 2], const u32 (&p)[32], u32 v) {
#pragma unroll
    for (int i = 0; i < TILE / 16; i++) Product<DIM>::registers<1>(o, p + 4 * i, factor(v + i * 2048, TILE * 128), 1);
    products_commit();
}

// A tile's scores as 8 factors of the product with V.
__device__ __forceinline__ void pack_weights(u32 (&p)[32], const float (&s)[64]) {
#pragma unroll
    for (int i = 0; i < 32; i++) p[i] = pack(s[2 * i], s[2 * i + 1]);
}

// The rows of the last page behind the sequence's end hold anything at all, and 0 · NaN is NaN.
__device__ __forceinline__ void clear_end(const Args &a, u32 v, int from, int group) {
    int to = min(TILE, (from + a.page_size - 1) / a.page_size * a.page_size);
    for (int i = (threadIdx.x & 127); i < (to - from) * DIM / 8; i += 128) {
        int row = from + i / (DIM / 8), chunk = i % (DIM / 8);
        u32 address = v + chunk / 8 * TILE * 128 + row * 128 + chunk % 8 * 16;
        asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" :: "r"(address), "r"(0) : "memory");
    }
    publish_shared();
    named_barrier(1 + group, 128);
}

// A warpgroup's part of an item: 64 pairs from `item.pair0 + 64 · warpgroup`.
__device__ __forceinline__ void attend(const Args &a, const Item &item, int warpgroup, u32 q, u32 k, u32 v, const Barriers &barriers, Turn &k_turn, Turn &v_turn) {
    int thread = threadIdx.x & 127, lane = threadIdx.x & 31, g = lane / 4, t = lane & 3;
    int group = a.q_heads / a.kv_heads, pair0 = item.pair0 + 64 * warpgroup;
    long long width = (long long)(a.q_heads + 2 * a.kv_heads) * DIM;
    named_barrier(1 + warpgroup, 128);
#pragma unroll
    for (int j = 0; j < DIM / 16; j++) {
        int i = thread + 128 * j, row = i / (DIM / 8), chunk = i % (DIM / 8), pair = pair0 + row;
        uint4 x = make_uint4(0, 0, 0, 0);
        if (pair < item.pairs)
            x = *(const uint4 *)(a.qkv + (item.q_start + pair / group) * width + (item.kv_head * group + pair % group) * DIM + chunk * 8);
        u32 to = q + chunk / 8 * 64 * 128 + row * 128 + ((chunk ^ row) & 7) * 16;
        asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" :: "r"(to), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w) : "memory");
    }
    publish_shared();
    named_barrier(1 + warpgroup, 128);

    int at[2], row0 = thread / 32 * 16 + g;
#pragma unroll
    for (int h = 0; h < 2; h++) at[h] = item.cached + min(pair0 + row0 + 8 * h, item.pairs - 1) / group;
    int at_first = item.cached + min(pair0, item.pairs - 1) / group, at_last = item.cached + min(pair0 + 63, item.pairs - 1) / group;
    float scale = a.soft_cap > 0.f ? 1.4426950408889634f : a.scale * 1.4426950408889634f;
    float s[64], o[DIM / 2], top[2] = {-infinity(), -infinity()}, sum[2] = {}, shrink[2];
    u32 p[32];
#pragma unroll
    for (int i = 0; i < DIM / 2; i++) o[i] = 0.f;
    auto weigh = [&](int tile) {
        int base = tile * TILE;
        if (a.soft_cap > 0.f) {
#pragma unroll
            for (int i = 0; i < 64; i++) s[i] = a.soft_cap * tanhf(s[i] * a.scale / a.soft_cap);
        }
        if (base + TILE - 1 > at_first || (a.window > 0 && base <= at_last - a.window)) mask(a, s, base, at);
        soften(s, top, sum, shrink, scale);
    };
    auto leave = [&](u32 barrier) { if (lane == 0) barrier_arrive(barrier); };

    barrier_wait(barriers.k_full + k_turn.stage() * 8, k_turn.parity());
    products_begin();
    scores(s, q, k + k_turn.stage() * TILE_BYTES);
    products_wait<0>();
    pin(s);
    leave(barriers.k_free + k_turn.stage() * 8);
    k_turn.count++;
    weigh(item.last_tile);
    pack_weights(p, s);
    // Only the first tile taken can hold the sequence's end.
    int end = item.kv_len - item.last_tile * TILE;
    bool ragged = end < TILE && end % a.page_size != 0;
    for (int tile = item.last_tile - 1; tile >= item.first_tile; tile--) {
        barrier_wait(barriers.k_full + k_turn.stage() * 8, k_turn.parity());
        products_begin();
        scores(s, q, k + k_turn.stage() * TILE_BYTES);
        barrier_wait(barriers.v_full + v_turn.stage() * 8, v_turn.parity());
        if (ragged) clear_end(a, v + v_turn.stage() * TILE_BYTES, end, warpgroup), ragged = false;
        pin(o), pin(p);
        products_begin();
        weighted_values(o, p, v + v_turn.stage() * TILE_BYTES);
        products_wait<1>();
        pin(s);
        leave(barriers.k_free + k_turn.stage() * 8);
        k_turn.count++;
        weigh(tile);
        products_wait<0>();
        pin(o), pin(p);
        leave(barriers.v_free + v_turn.stage() * 8);
        v_turn.count++;
#pragma unroll
        for (int i = 0; i < DIM / 2; i++) o[i] *= shrink[i >> 1 & 1];
        pack_weights(p, s);
    }
    barrier_wait(barriers.v_full + v_turn.stage() * 8, v_turn.parity());
    if (ragged) clear_end(a, v + v_turn.stage() * TILE_BYTES, end, warpgroup);
    pin(o), pin(p);
    products_begin();
    weighted_values(o, p, v + v_turn.stage() * TILE_BYTES);
#pragma unroll
    for (int h = 0; h < 2; h++) {
        sum[h] += __shfl_xor_sync(~0u, sum[h], 1);
        sum[h] += __shfl_xor_sync(~0u, sum[h], 2);
        sum[h] = 1.f / sum[h];
    }
    products_wait<0>();
    pin(o), pin(p);
    leave(barriers.v_free + v_turn.stage() * 8);
    v_turn.count++;

    // Through Q's place, so that rows are written whole. A warp's 16 rows are its own.
#pragma unroll
    for (int i = 0; i < DIM / 4; i++) {
        int h = i & 1, row = row0 + 8 * h, chunk = i / 2;
        u32 to = q + chunk / 8 * 64 * 128 + row * 128 + ((chunk ^ row) & 7) * 16 + t * 4;
        asm volatile("st.shared.u32 [%0], %1;" :: "r"(to), "r"(pack(o[2 * i] * sum[h], o[2 * i + 1] * sum[h])) : "memory");
    }
    __syncwarp();
#pragma unroll
    for (int j = 0; j < DIM / 16; j++) {
        int i = lane + 32 * j, row = thread / 32 * 16 + i / (DIM / 8), chunk = i % (DIM / 8), pair = pair0 + row;
        uint4 x;
        u32 from = q + chunk / 8 * 64 * 128 + row * 128 + ((chunk ^ row) & 7) * 16;
        asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "r"(from) : "memory");
        if (pair < item.pairs)
            *(uint4 *)(a.out + ((long long)(item.q_start + pair / group) * a.q_heads + item.kv_head * group + pair % group) * DIM + chunk * 8) = x;
    }
}

// The warpgroups' shares of a multiprocessor's registers.
#define REGISTERS_FETCHING 24
#define REGISTERS_ATTENDING 240

extern "C" __global__ void __launch_bounds__(384, 1)
prefill(const __grid_constant__ TensorMap k_map, const __grid_constant__ TensorMap v_map, const Args a, int rows, int items, int nowhere) {
    extern __shared__ unsigned char memory[];
    __shared__ u64 barrier_words[4 * STAGES];
    let_next_start();
    u32 q = (shared_address(memory) + 1023) / 1024 * 1024, k = q + 2 * QUERY_BYTES, v = k + STAGES * TILE_BYTES;
    u32 first = shared_address(barrier_words);
    Barriers barriers = {first, first + 8 * STAGES, first + 16 * STAGES, first + 24 * STAGES};
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            barrier_init(barriers.k_full + 8 * i, 1), barrier_init(barriers.v_full + 8 * i, 1);
            barrier_init(barriers.k_free + 8 * i, 8), barrier_init(barriers.v_free + 8 * i, 8);
        }
        publish_barriers();
    }
    __syncthreads();
    wait_for_previous();
    int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);
    Turn k_turn, v_turn;
    if (warpgroup == 2) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(REGISTERS_FETCHING));
        if (threadIdx.x >= 288) return;
        for (int index = blockIdx.x; index < items; index += gridDim.x) {
            Item item;
            if (!item.find(a, index, rows)) continue;
            // In the order in which they are taken.
            fetch(a, item, k_map, item.last_tile, nowhere, k, barriers.k_full, barriers.k_free, k_turn);
            for (int tile = item.last_tile; tile >= item.first_tile; tile--) {
                if (tile > item.first_tile) fetch(a, item, k_map, tile - 1, nowhere, k, barriers.k_full, barriers.k_free, k_turn);
                fetch(a, item, v_map, tile, nowhere, v, barriers.v_full, barriers.v_free, v_turn);
            }
        }
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(REGISTERS_ATTENDING));
        for (int index = blockIdx.x; index < items; index += gridDim.x) {
            Item item;
            if (item.find(a, index, rows)) attend(a, item, warpgroup, q + warpgroup * QUERY_BYTES, k, v, barriers, k_turn, v_turn);
        }
    }
}
