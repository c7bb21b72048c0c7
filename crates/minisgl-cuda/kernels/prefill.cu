// softmax(scale · q·kᵀ) · v of rows with several queries, on compute capability 9.0: FlashAttention
// (Dao et al., 2022; Shah et al., 2024) over pages.
//
// An item is 128 (token, head of the group) pairs of one row and KV head, the last tokens first: they
// see most. Blocks take one item after the other, of as many rows at a time as have their K and V in the L2
// cache together. One warp takes them, and with two others fetches, norms and rotates their Q, an item ahead;
// another one fetches K and V in tiles of 128 tokens, page by page; the two warpgroups take 64 pairs each, from
// the last tile they see to the first. While a tile's softmax runs, the product of the one before with V is under
// way.
// In shared memory: Q [stage][warpgroup][part][64], K and V [stage][part][128], all rows of 128 bytes in the
// 128-byte swizzle, where a part is 64 dimensions.

#define TILE 128
#define PARTS (DIM / 64)
#define TILE_BYTES (TILE * DIM * 2)
#define QUERY_BYTES (64 * DIM * 2)
#define ITEM_STAGES 2
// Warps that prepare Q.
#define PREPARERS 3
#define K_STAGES 2
#define V_STAGES 3

struct Args {
    const bf16 *qkv; const bf16 *k_pages; const bf16 *v_pages; bf16 *out;
    const int *slots; const int *query_start; const int *kv_len; const int *page_table;
    float *partial; int *arrived;  // `arrived`: items asked for behind the blocks' first ones
    int first_row, pages_a_row, page_size, q_heads, kv_heads, splits, splits_wanted, page_shift, window;
    float scale, soft_cap;
};

// The norm of Q's heads and their rotation. `angles` [positions, DIM]: cosines, then sines; null where Q is
// rotated already. A null `weight` is no norm.
struct Rotation { const float *angles; const float *weight; float eps, shift; };

// All items: of `section` rows at a time, in each section the longest ones first.
struct Items { int count, rows, section; };

// One item; of no row behind the last one.
struct Item {
    int row, kv_head, kv_len, q_start, cached, pair0, pairs, first_tile, last_tile;
    __device__ bool find(const Args &a, const Items &items, int index) {
        int blocks = items.count / (items.rows * a.kv_heads), first_row = index / (items.section * a.kv_heads * blocks) * items.section;
        int rows = min(items.section, items.rows - first_row);
        index -= first_row * a.kv_heads * blocks;
        kv_head = index % a.kv_heads, row = a.first_row + first_row + index / a.kv_heads % rows;
        kv_len = a.kv_len[row], q_start = a.query_start[row];
        int extend = a.query_start[row + 1] - q_start;
        cached = kv_len - extend, pairs = extend * GROUP;
        int block = (pairs + 127) / 128 - 1 - index / (a.kv_heads * rows);
        if (kv_len <= 0 || block < 0) return false;
        pair0 = block * 128;
        last_tile = token_of(pair0 + 127) / TILE;
        first_tile = a.window > 0 ? max(0, token_of(pair0) - a.window + 1) / TILE : 0;
        return true;
    }
    // Where in the sequence a pair's token is.
    __device__ int token_of(int pair) const { return cached + min(pair, pairs - 1) / GROUP; }
    // In elements, of a matrix with so many heads a token.
    __device__ long long offset(int pair, int heads) const {
        return ((long long)(q_start + pair / GROUP) * heads + kv_head * GROUP + pair % GROUP) * DIM;
    }
};

// What goes round: a stage, and the parity of its phase.
template <int STAGES> struct Turn {
    u32 count = 0;
    __device__ u32 stage() const { return count % STAGES; }
    __device__ u32 parity() const { return count / STAGES & 1; }
};

// Of each stage: whether it is full, and free.
template <int STAGES> struct Barriers {
    u32 first;
    __device__ void init(int arrivals, int taking_warps) const {
        for (int i = 0; i < STAGES; i++) barrier_init(full(i), arrivals), barrier_init(free(i), ARRIVALS(taking_warps));
    }
    __device__ u32 full(int stage) const { return first + stage * 16; }
    __device__ u32 free(int stage) const { return first + stage * 16 + 8; }
    __device__ void wait_full(Turn<STAGES> turn) const { barrier_wait(full(turn.stage()), turn.parity()); }
    __device__ void wait_free(Turn<STAGES> turn) const { barrier_wait(free(turn.stage()), turn.parity() ^ 1); }
    // A whole warp's.
    __device__ void leave(Turn<STAGES> &turn) const {
        lanes_arrive(free(turn.stage()));
        turn.count++;
    }
};

// What the roles share: items, their queries, and tiles.
struct Shared {
    Item *handed_out;
    const float *q_weight;  // of the norm of Q's heads, 1 where there is none
    u32 q, k, v;
    Barriers<ITEM_STAGES> items, queries;
    Barriers<K_STAGES> k_tiles;
    Barriers<V_STAGES> v_tiles;

    // A whole warp's.
    __device__ Item next_item(Turn<ITEM_STAGES> &turn) const {
        items.wait_full(turn);
        Item item = handed_out[turn.stage()];
        __syncwarp();
        items.leave(turn);
        return item;
    }
};

// Where in the cache this lane's boxes of a tile are, of K as of V: at most two, of a part of a page each.
struct Boxes {
    int y[2];
    __device__ Boxes(const Args &a, const Item &item, int tile, int nowhere) {
        int lane = threadIdx.x & 31, box = min(a.page_size, TILE), boxes = TILE / box;
        const int *table = a.page_table + (long long)a.slots[item.row] * a.pages_a_row;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            int token = tile * TILE + (lane + 32 * i) / PARTS * box;
            // Pages behind the end are read as zeros.
            y[i] = nowhere;
            if (lane + 32 * i < boxes * PARTS && token < item.kv_len)
                y[i] = (table[token >> a.page_shift] * a.kv_heads + item.kv_head) * a.page_size + (token & (a.page_size - 1));
        }
    }
};

template <int STAGES>
__device__ __forceinline__ void fetch(const Args &a, const TensorMap &map, const Boxes &boxes, u32 to, const Barriers<STAGES> &barriers, Turn<STAGES> &turn) {
    int lane = threadIdx.x & 31, box = min(a.page_size, TILE);
    u32 barrier = barriers.full(turn.stage());
    barriers.wait_free(turn);
    if (lane == 0) barrier_expect(barrier, TILE_BYTES);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 2; i++) {
        int op = lane + 32 * i, part = op % PARTS;
        if (op < TILE / box * PARTS)
            fetch_box(to + turn.stage() * TILE_BYTES + part * TILE * 128 + op / PARTS * box * 128, map, barrier, part * 64, boxes.y[i]);
    }
    turn.count++;
}

// A warp's: the K and V of all items. A tile's V is taken a tile later than its K: it has a stage more.
__device__ __forceinline__ void fetch_tiles(const Args &a, const Shared &shared, const TensorMap &k_map, const TensorMap &v_map, int nowhere) {
    Turn<ITEM_STAGES> turn;
    Turn<K_STAGES> k_turn;
    Turn<V_STAGES> v_turn;
    while (true) {
        Item item = shared.next_item(turn);
        if (item.row < 0) return;
        for (int tile = item.last_tile; tile >= item.first_tile; tile--) {
            Boxes boxes(a, item, tile, nowhere);
            fetch(a, k_map, boxes, shared.k, shared.k_tiles, k_turn);
            fetch(a, v_map, boxes, shared.v, shared.v_tiles, v_turn);
        }
    }
}

// A lane has 8 elements of a head's first half, and those that they rotate with: as `rope_store`, to the bit.
#define HEAD_LANES (DIM / 16)
#define HEADS_A_WARP (32 / HEAD_LANES)

// 8 floats, and those of the second half.
struct Halves {
    float4 low[2], high[2];
    __device__ __forceinline__ void load(const float *from) {
#pragma unroll
        for (int i = 0; i < 2; i++) low[i] = ((const float4 *)from)[i], high[i] = ((const float4 *)(from + DIM / 2))[i];
    }
};

// A warp's share of an item's queries, of both warpgroups.
__device__ __forceinline__ void prepare_queries(const Args &a, const Rotation &rotation, const float *q_weight, const Item &item, u32 to, int rank) {
    int lane = threadIdx.x & 31, chunk = lane % HEAD_LANES, heads = a.q_heads + 2 * a.kv_heads;
    int mine = lane / HEAD_LANES, first = rank * HEADS_A_WARP, step = PREPARERS * HEADS_A_WARP, pairs = item.pairs - item.pair0;
    auto place = [&](int i, int chunk) {
        return to + i / 64 * QUERY_BYTES + chunk / 8 * 64 * 128 + i % 64 * 128 + ((chunk ^ i) & 7) * 16;
    };
#pragma unroll 1
    for (int i = first + mine; i < 128; i += step) {
        const bf16 *from = a.qkv + item.offset(item.pair0 + min(i, pairs - 1), heads) + chunk * 8;
        copy_16(place(i, chunk), from, i < pairs);
        copy_16(place(i, chunk + HEAD_LANES), from + DIM / 2, i < pairs);
    }
    end_copies();
    if (rotation.angles) {
        auto angles_of = [&](int i) {
            return rotation.angles + (long long)item.token_of(item.pair0 + i) * DIM + chunk * 8;
        };
        Halves angles;
        angles.load(angles_of(first + mine));
        wait_for_copies<0>();
        // All lanes take part as long as one of them has a pair.
#pragma unroll 1
        for (int all = first, end = min(128, pairs); all < end; all += step) {
            int i = all + mine;
            Halves next;
            next.load(angles_of(i + step));
            uint4 low = load_shared_16(place(i, chunk)), high = load_shared_16(place(i, chunk + HEAD_LANES));
            u32 *l = (u32 *)&low, *h = (u32 *)&high;
            float squares = 0.f;
#pragma unroll
            for (int p = 0; p < 4; p++) {
                squares += low_half(l[p]) * low_half(l[p]) + low_half(h[p]) * low_half(h[p]);
                squares += high_half(l[p]) * high_half(l[p]) + high_half(h[p]) * high_half(h[p]);
            }
#pragma unroll
            for (int other = HEAD_LANES / 2; other; other /= 2) squares += __shfl_xor_sync(~0u, squares, other);
            float scale = rotation.weight ? rsqrtf(squares / DIM + rotation.eps) : 1.f;
            Halves weights;
            weights.load(q_weight + chunk * 8);
            const float *cosines = (const float *)angles.low, *sines = (const float *)angles.high;
            const float *v = (const float *)weights.low, *w = (const float *)weights.high;
#pragma unroll
            for (int p = 0; p < 4; p++) {
                int e = 2 * p;
                float l0 = low_half(l[p]) * (scale * v[e]), l1 = high_half(l[p]) * (scale * v[e + 1]);
                float h0 = low_half(h[p]) * (scale * w[e]), h1 = high_half(h[p]) * (scale * w[e + 1]);
                l[p] = pack(l0 * cosines[e] - h0 * sines[e], l1 * cosines[e + 1] - h1 * sines[e + 1]);
                h[p] = pack(h0 * cosines[e] + l0 * sines[e], h1 * cosines[e + 1] + l1 * sines[e + 1]);
            }
            angles = next;
            store_shared(place(i, chunk), low), store_shared(place(i, chunk + HEAD_LANES), high);
        }
    }
    wait_for_copies<0>();
    publish_shared();
}

// The next item there is; of a negative row behind the last one. The first one has the block's number, the others
// come from a counter, which all blocks together ask `items.count` times: lane 0, an item ahead, for `next`.
__device__ __forceinline__ Item take_item(const Args &a, const Items &items, int &next) {
    bool asks = (threadIdx.x & 31) == 0;
    Item item;
    while (true) {
        int index = __shfl_sync(~0u, next, 0);
        if (index >= items.count) {
            if (asks && index + 1 - int(gridDim.x) == items.count) *a.arrived = 0;
            item.row = -1;
            return item;
        }
        if (asks) next = gridDim.x + atomicAdd(a.arrived, 1);
        if (item.find(a, items, index)) return item;
    }
}

// A warp's: its share of all items' queries. The first one also takes the items, and hands them out.
__device__ __forceinline__ void prepare_items(const Args &a, const Rotation &rotation, const Items &items, const Shared &shared, int rank) {
    bool first_lane = (threadIdx.x & 31) == 0;
    int next = blockIdx.x;
    Turn<ITEM_STAGES> turn, query_turn;
    while (true) {
        if (rank == 0) {
            Item item = take_item(a, items, next);
            shared.items.wait_free(turn);
            if (first_lane) shared.handed_out[turn.stage()] = item, barrier_arrive(shared.items.full(turn.stage()));
            __syncwarp();
        }
        Item item = shared.next_item(turn);
        if (item.row < 0) return;
        shared.queries.wait_free(query_turn);
        prepare_queries(a, rotation, shared.q_weight, item, shared.q + query_turn.stage() * 2 * QUERY_BYTES, rank);
        warp_arrives(shared.queries.full(query_turn.stage()));
        query_turn.count++;
    }
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
    u64 rows = factor(q), columns = factor(k);
#pragma unroll
    for (int i = 0; i < DIM / 16; i++)
        Product<TILE>::shared<0>(s, along(rows, i / 4 * 64 * 128 + i % 4 * 32), along(columns, i / 4 * TILE * 128 + i % 4 * 32), i > 0);
    products_commit();
}

__device__ __forceinline__ void weighted_values(float (&o)[DIM / 2], const u32 (&p)[32], u32 v) {
    u64 values = factor(v, TILE * 128);
#pragma unroll
    for (int i = 0; i < TILE / 16; i++) Product<DIM>::registers<1>(o, p + 4 * i, along(values, i * 2048), 1);
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
        store_shared(address, make_uint4(0, 0, 0, 0));
    }
    publish_shared();
    named_barrier(1 + group, 128);
}

// A warpgroup's part of an item: 64 pairs from `item.pair0 + 64 · warpgroup`, their queries at `q`.
__device__ __forceinline__ void attend(const Args &a, const Item &item, int warpgroup, u32 q, const Shared &shared, Turn<K_STAGES> &k_turn, Turn<V_STAGES> &v_turn) {
    int thread = threadIdx.x & 127, lane = threadIdx.x & 31, g = lane / 4, t = lane & 3;
    int pair0 = item.pair0 + 64 * warpgroup, row0 = thread / 32 * 16 + g;
    int at[2] = {item.token_of(pair0 + row0), item.token_of(pair0 + row0 + 8)};
    int at_first = item.token_of(pair0), at_last = item.token_of(pair0 + 63);
    float scale = (SOFT_CAP ? 1.f : a.scale) * 1.4426950408889634f;
    float s[64], o[DIM / 2], top[2] = {-infinity(), -infinity()}, sum[2] = {}, shrink[2];
    u32 p[32];
#pragma unroll
    for (int i = 0; i < DIM / 2; i++) o[i] = 0.f;
    auto weigh = [&](int tile) {
        int base = tile * TILE;
#if SOFT_CAP
#pragma unroll
        for (int i = 0; i < 64; i++) s[i] = a.soft_cap * tanhf(s[i] * a.scale / a.soft_cap);
#endif
        if (base + TILE - 1 > at_first || (a.window > 0 && base <= at_last - a.window)) mask(a, s, base, at);
        soften(s, top, sum, shrink, scale);
    };
    shared.k_tiles.wait_full(k_turn);
    products_begin();
    scores(s, q, shared.k + k_turn.stage() * TILE_BYTES);
    products_wait<0>();
    pin(s);
    shared.k_tiles.leave(k_turn);
    weigh(item.last_tile);
    pack_weights(p, s);
    // Only the first tile taken can hold the sequence's end.
    int end = item.kv_len - item.last_tile * TILE;
    bool ragged = end < TILE && end % a.page_size != 0;
    if (item.last_tile > item.first_tile) shared.k_tiles.wait_full(k_turn);
    for (int tile = item.last_tile - 1; tile >= item.first_tile; tile--) {
        products_begin();
        scores(s, q, shared.k + k_turn.stage() * TILE_BYTES);
        shared.v_tiles.wait_full(v_turn);
        if (ragged) clear_end(a, shared.v + v_turn.stage() * TILE_BYTES, end, warpgroup), ragged = false;
        pin(o), pin(p);
        products_begin();
        weighted_values(o, p, shared.v + v_turn.stage() * TILE_BYTES);
        products_wait<1>();
        pin(s);
        shared.k_tiles.leave(k_turn);
        weigh(tile);
        pin(s);
        // Between the softmax and the wait for the products that run beside it: ptxas moves that wait up as
        // far as it can, but not over a loop.
        if (tile > item.first_tile) shared.k_tiles.wait_full(k_turn);
        products_wait<0>();
        pin(o), pin(p);
        shared.v_tiles.leave(v_turn);
        // Most tiles have no row with a new best score.
        if (__ballot_sync(~0u, shrink[0] != 1.f || shrink[1] != 1.f))
#pragma unroll
            for (int i = 0; i < DIM / 2; i++) o[i] *= shrink[i >> 1 & 1];
        pack_weights(p, s);
    }
    shared.v_tiles.wait_full(v_turn);
    if (ragged) clear_end(a, shared.v + v_turn.stage() * TILE_BYTES, end, warpgroup);
    pin(o), pin(p);
    products_begin();
    weighted_values(o, p, shared.v + v_turn.stage() * TILE_BYTES);
#pragma unroll
    for (int h = 0; h < 2; h++) {
        sum[h] += __shfl_xor_sync(~0u, sum[h], 1);
        sum[h] += __shfl_xor_sync(~0u, sum[h], 2);
        sum[h] = 1.f / sum[h];
    }
    products_wait<0>();
    pin(o), pin(p);
    shared.v_tiles.leave(v_turn);

    // Through Q's place, so that rows are written whole. A warp's 16 rows are its own.
#pragma unroll
    for (int i = 0; i < DIM / 4; i++) {
        int h = i & 1, row = row0 + 8 * h, chunk = i / 2;
        u32 to = q + chunk / 8 * 64 * 128 + row * 128 + ((chunk ^ row) & 7) * 16 + t * 4;
        store_shared(to, pack(o[2 * i] * sum[h], o[2 * i + 1] * sum[h]));
    }
    __syncwarp();
#pragma unroll
    for (int j = 0; j < DIM / 16; j++) {
        int i = lane + 32 * j, row = thread / 32 * 16 + i / (DIM / 8), chunk = i % (DIM / 8), pair = pair0 + row;
        uint4 x = load_shared_16(q + chunk / 8 * 64 * 128 + row * 128 + ((chunk ^ row) & 7) * 16);
        if (pair < item.pairs) *(uint4 *)(a.out + item.offset(pair, a.q_heads) + chunk * 8) = x;
    }
}

// The warpgroups' shares of a multiprocessor's registers.
#define REGISTERS_FETCHING 88
#define REGISTERS_ATTENDING 208

extern "C" __global__ void __launch_bounds__(384, 1)
prefill(const __grid_constant__ TensorMap k_map, const __grid_constant__ TensorMap v_map, const Args a, const Rotation rotation, const Items items, int nowhere) {
    extern __shared__ unsigned char memory[];
    __shared__ u64 barriers[2 * (2 * ITEM_STAGES + K_STAGES + V_STAGES)];
    __shared__ Item handed_out[ITEM_STAGES];
    __shared__ __align__(16) float q_weight[DIM];
    Shared shared;
    shared.handed_out = handed_out, shared.q_weight = q_weight;
    shared.q = (shared_address(memory) + 1023) / 1024 * 1024;
    shared.k = shared.q + ITEM_STAGES * 2 * QUERY_BYTES, shared.v = shared.k + K_STAGES * TILE_BYTES;
    shared.items.first = shared_address(barriers), shared.queries.first = shared.items.full(ITEM_STAGES);
    shared.k_tiles.first = shared.queries.full(ITEM_STAGES), shared.v_tiles.first = shared.k_tiles.full(K_STAGES);
    if (threadIdx.x == 0) {
        // Items go to all warps.
        shared.items.init(1, 12), shared.queries.init(ARRIVALS(PREPARERS), 8), shared.k_tiles.init(1, 8), shared.v_tiles.init(1, 8);
        publish_barriers();
    }
    if (threadIdx.x < DIM) q_weight[threadIdx.x] = rotation.weight ? rotation.weight[threadIdx.x] + rotation.shift : 1.f;
    __syncthreads();
    wait_for_previous();
    // In this order: decodes behind it only wait for what it has waited for.
    let_next_start();
    int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);
    if (warpgroup == 2) {
        leave_registers<REGISTERS_FETCHING>();
        int warp = threadIdx.x / 32;
        if (warp == 8) fetch_tiles(a, shared, k_map, v_map, nowhere);
        else prepare_items(a, rotation, items, shared, warp - 9);
    } else {
        take_registers<REGISTERS_ATTENDING>();
        Turn<ITEM_STAGES> turn, query_turn;
        Turn<K_STAGES> k_turn;
        Turn<V_STAGES> v_turn;
        while (true) {
            Item item = shared.next_item(turn);
            if (item.row < 0) break;
            shared.queries.wait_full(query_turn);
            attend(a, item, warpgroup, shared.q + (query_turn.stage() * 2 + warpgroup) * QUERY_BYTES, shared, k_turn, v_turn);
            __syncwarp();
            shared.queries.leave(query_turn);
        }
    }
}
