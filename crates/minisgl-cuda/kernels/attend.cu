// The attention half of a layer for up to 8 rows of one token each, in one kernel; see `half_layer.cuh`.
//
// A cluster has a KV head with its group of query heads: Q, K and V of all rows, their rotation, K and V
// into the cache, attention, and the head's part of the output projection. The tiles of all rows' contexts,
// behind one another, are divided evenly between its blocks. A block sends what it summed for a row to all
// blocks, and each merges all rows.
//
// In shared memory: a tile of each warp; the block's rows of the first matrix; the normed rows; q, k and v of
// all rows; one row's rotated q. The first matrix and the normed rows are gone once they have been multiplied,
// and in their place come another tile of each warp, the rows of the second matrix, sums, and what all blocks
// summed: for each pair of a row and a block that has tiles of it, [group][DIM] sums, and their tops. In the
// tiles' place come in the end the attended rows and the second product's sums.

// Tiles of a block: FIRST of its rows of the first matrix, and SECOND of the second, of which LATE rows lie in
// the last stages of the ring, as there is no room elsewhere. GROUP query heads a KV head.
#define HIDDEN (SECOND * 16 * CLUSTER)
#define QKV ((GROUP + 2) * DIM)
// Tiles on their way, two of each warp: a place in the ring is always the same warp's.
#define STAGES (2 * WARPS)
// Named barriers at which the summing warps say that they have read the first matrix, and the tiles.
#define FIRST_IS_READ 3
#define TILES_ARE_READ 4
// Pairs of a row and a block that has tiles of it, counted by the sum of both.
#define PAIRS_MAX (ROWS + CLUSTER - 1)

struct Args {
    Residual residual;
    const bf16 *qkv; const float *bias; const bf16 *out; float *part;
    bf16 *k_pages; bf16 *v_pages;
    const int *slots; const int *kv_len; const int *page_table; const int *store_at;
    const float *rope; const float *q_norm; const float *k_norm;
    int kv_heads, pages_a_row, page_shift, early;
    float q_eps, q_shift, k_eps, k_shift;
    Scores scores;
};

// Sends for rows of `bytes` bytes each.
template <typename Row>
__device__ __forceinline__ void prefetch_rows(int count, int bytes, Row row) {
    int lines = (bytes + 127) / 128;
    for (int i = threadIdx.x; i < count * lines; i += THREADS) prefetch_line((const char *)row(i / lines) + i % lines * 128);
}
// sums[warp][row][m] = a warp's share of Σ_k w[m][k] · x[row][k]: every eighth 32 of k. `have_read` runs between
// the last read and the first write of sums.
template <int TILES, typename HaveRead>
__device__ __forceinline__ void multiply(const unsigned char *w, const unsigned char *x, int k, float *sums, HaveRead have_read) {
    int warp = threadIdx.x / 32, lane = threadIdx.x & 31, g = lane / 4, t = lane & 3;
    float acc[TILES][4] = {};
    for (int chunk = warp; chunk < k / 32; chunk += WARPS) {
        int at = chunk * 64 + t * 16;
        uint4 v = *(const uint4 *)(x + g * STRIDE(k) + at), low[TILES], high[TILES];
#pragma unroll
        for (int j = 0; j < TILES; j++) {
            low[j] = *(const uint4 *)(w + (j * 16 + g) * STRIDE(k) + at);
            high[j] = *(const uint4 *)(w + (j * 16 + g + 8) * STRIDE(k) + at);
        }
#pragma unroll
        for (int j = 0; j < TILES; j++) multiply_32(acc[j], low[j], high[j], v);
    }
    have_read();
    put_sums(acc, sums);
    named_barrier(1, THREADS);
}
// The second product: this block's columns of the cluster's part of what is added to the residual stream.
template <int TILES>
__device__ __forceinline__ void add_later(const Block &b, const Residual &r, const unsigned char *w, const unsigned char *x, int k, float *sums, float *part) {
    multiply<TILES>(w, x, k, sums, [] {});
    for (int i = threadIdx.x; i < r.rows * TILES * 4; i += THREADS) {
        int row = i / (TILES * 4), m = i % (TILES * 4) * 4;
        *(float4 *)(part + ((long long)b.cluster * r.rows + row) * r.hidden + b.rank * TILES * 16 + m) = total<TILES>(sums, row, m);
    }
}

// Which row of the first matrix makes a KV head's `column` of its group's q, its k and its v.
__device__ __forceinline__ int row_of(const Args &a, int kv_head, int column) {
    int head = column / DIM, q_heads = a.kv_heads * GROUP;
    int place = head < GROUP ? kv_head * GROUP + head : q_heads + (head - GROUP) * a.kv_heads + kv_head;
    return place * DIM + column % DIM;
}

// A step's rows as tiles behind one another, and this block's of them.
struct Work {
    int lens[ROWS], before[ROWS + 1], slots[ROWS];
    // The blocks that have tiles of a row; of an empty row, the last one is in front of the first.
    int first_block[ROWS], last_block[ROWS];
    int rows, from, to, window;

    // The row of a tile that is not in front of row `row`.
    __device__ __forceinline__ int row_at(int tile, int row = 0) const {
        while (row + 1 < rows && before[row + 1] <= tile) row++;
        return row;
    }
    __device__ __forceinline__ int first_seen(int row) const { return window > 0 ? max(0, lens[row] - window) / TILE : 0; }
};

// Fills it. A whole warp, a lane a row.
__device__ __forceinline__ void divide(const Args &a, int rank, Work &work) {
    int lane = threadIdx.x & 31, rows = a.residual.rows, window = a.scores.window, len = 0, slot = 0;
    if (lane < rows) len = a.kv_len[lane], slot = a.slots[lane];
    int tiles = (len + TILE - 1) / TILE - (window > 0 ? max(0, len - window) / TILE : 0), sum = tiles;
#pragma unroll
    for (int i = 1; i < ROWS; i *= 2) {
        int other = __shfl_up_sync(~0u, sum, i);
        if (lane >= i) sum += other;
    }
    int all = __shfl_sync(~0u, sum, rows - 1);
    // So few blocks that each warp of theirs has a tile.
    int share = max(WARPS, (all + CLUSTER - 1) / CLUSTER);
    if (lane < rows) {
        work.lens[lane] = len, work.slots[lane] = slot, work.before[lane] = sum - tiles;
        int first = (sum - tiles) / share;
        work.first_block[lane] = first, work.last_block[lane] = tiles > 0 ? (sum - 1) / share : first - 1;
    }
    if (lane == 0) {
        work.before[rows] = all, work.rows = rows, work.window = window;
        work.from = min(all, rank * share), work.to = min(all, work.from + share);
    }
    __syncwarp();
}

// What all blocks together send to each of them, in bytes. A whole warp, a lane a row.
__device__ __forceinline__ int parts_bytes(const Work &work) {
    int row = threadIdx.x & 31, pairs = 0;
    if (row < work.rows) pairs = work.last_block[row] - work.first_block[row] + 1;
#pragma unroll
    for (int i = ROWS / 2; i; i /= 2) pairs += __shfl_xor_sync(~0u, pairs, i);
    return pairs * GROUP * (DIM * 4 + 16);
}

// Row of the cache at which the tile begins, which is not in front of row `row`.
__device__ __forceinline__ int find(const Args &a, const Work &work, int tile, int row, int kv_head) {
    if (tile >= work.to) return 0;
    row = work.row_at(tile, row);
    int token = (work.first_seen(row) + tile - work.before[row]) * TILE;
    int page = a.page_table[(long long)work.slots[row] * a.pages_a_row + (token >> a.page_shift)];
    return (page * a.kv_heads + kv_head << a.page_shift) + (token & (1 << a.page_shift) - 1);
}

// Tile i is that of warp i % WARPS, which is the one to fetch what comes in its place.
struct Ring {
    u32 memory, full;
    __device__ __forceinline__ u32 tile(int i) const { return memory + i % STAGES * STAGE_BYTES; }
    __device__ __forceinline__ u32 full_at(int i) const { return full + i % STAGES * 8; }
    __device__ __forceinline__ u32 parity(int i) const { return i / STAGES & 1; }
    // One thread.
    __device__ __forceinline__ void fetch(int i, const TensorMap &k_map, const TensorMap &v_map, int y) const {
        barrier_expect(full_at(i), STAGE_BYTES);
        fetch_parts(tile(i), k_map, full_at(i), y);
        fetch_parts(tile(i) + MATRIX_BYTES, v_map, full_at(i), y);
    }
};

extern "C" __global__ void __launch_bounds__(THREADS + 32, 1)
attend(const __grid_constant__ TensorMap k_map, const __grid_constant__ TensorMap v_map, const Args a) {
    extern __shared__ unsigned char unaligned[];
    __shared__ u64 barriers[3 + STAGES];
    __shared__ float2 tops[WARPS][16];
    __shared__ Work work;
    let_next_start();
    const Residual &r = a.residual;
    u32 aligned = (shared_address(unaligned) + 1023) / 1024 * 1024;
    unsigned char *memory = unaligned + (aligned - shared_address(unaligned));
    Block b = {memory, aligned, cluster_rank(), int(blockIdx.x) / CLUSTER};
    int warp = threadIdx.x / 32, lane = threadIdx.x & 31, kv_head = b.cluster;
    const int first = WARPS * STAGE_BYTES, second = STAGES * STAGE_BYTES - LATE * STRIDE(GROUP * DIM);
    // The first product's sums are behind it when parts come.
    const int sums = second + SECOND * 16 * STRIDE(GROUP * DIM), parts = sums + WARPS * GROUP * SUMS_STRIDE * 4;
    const int tops_of_parts = parts + PAIRS_MAX * GROUP * DIM * 4;
    const int attended = 0, last_sums = attended + ROWS * STRIDE(GROUP * DIM);
    const int x = first + FIRST * 16 * STRIDE(HIDDEN), sums_end = sums + WARPS * ROWS * SUMS_ROW(FIRST) * 4;
    const int squares = max(x + ROWS * STRIDE(HIDDEN), max(sums_end, tops_of_parts + PAIRS_MAX * GROUP * 16));
    const int raw = squares + ROWS * CLUSTER * 4, q = raw + ROWS * QKV * 2;
    u32 bars = shared_address(barriers), residual_here = bars, raw_here = bars + 8, parts_here = bars + 16;
    Ring ring = {aligned, bars + 24};
    auto second_row = [&](int i) {
        return a.out + ((long long)(b.rank * SECOND * 16 + i) * a.kv_heads + kv_head) * (GROUP * DIM);
    };
    // A whole warp.
    auto fetch_second = [&](int from, int to) {
        for (int i = from; i < to; i++) copy_row(b.at(second + i * STRIDE(GROUP * DIM)), second_row(i), GROUP * DIM);
    };
    if (warp < WARPS) {
        fetch_rows(b.at(first), FIRST * 16, HIDDEN, [&](int i) {
            return a.qkv + (long long)row_of(a, kv_head, b.rank * FIRST * 16 + i) * HIDDEN;
        });
        prefetch_rows(SECOND * 16, GROUP * DIM * 2, second_row);
    }
    if (threadIdx.x == 0) {
        for (int i = 0; i < 3 + STAGES; i++) barrier_init(bars + 8 * i, 1);
        publish_barriers();
        barrier_expect(residual_here, residual_bytes(r));
        barrier_expect(raw_here, r.rows * QKV * 2);
    }
    for (int i = threadIdx.x; i < 8 * HALVES * Q_STRIDE / 2; i += blockDim.x) ((u32 *)(memory + q))[i] = 0;
    __syncthreads();
    cluster_arrive();
    if (warp == WARPS) {
        prefetch_norm(b, r);
        int norm_lines = DIM / 32;
        if (lane < norm_lines && a.q_norm) prefetch_line(a.q_norm + lane * 32);
        if (lane < norm_lines && a.k_norm) prefetch_line(a.k_norm + lane * 32);
        cluster_wait();
        // In a graph, page table and lengths are older than all its kernels, and so are earlier tokens.
        if (!a.early) wait_for_previous();
        divide(a, b.rank, work);
        int bytes = parts_bytes(work);
        if (lane == 0) barrier_expect(parts_here, bytes);
        for (int i = lane; i < r.rows * norm_lines; i += 32) {
            int len = work.lens[i / norm_lines];
            if (len > 0) prefetch_line(a.rope + (long long)(len - 1) * DIM + i % norm_lines * 32);
        }
        // Each warp's first two tiles, the second ones when the first matrix is no longer in their place.
        int count = work.to - work.from, place = find(a, work, work.from + lane, 0, kv_head);
        auto fetch_tiles = [&](int from) {
#pragma unroll 1
            for (int i = from; i < from + WARPS; i++) {
                int y = __shfl_sync(~0u, place, i);
                if (lane == 0 && i < count) ring.fetch(i, k_map, v_map, y);
            }
        };
        fetch_tiles(0);
        // Barriers like these want whole warps.
        __syncwarp();
        named_barrier(FIRST_IS_READ, THREADS + 32);
        // The others know from here on how work is divided.
        named_leave(2, THREADS + 32);
        fetch_tiles(WARPS);
        // The second matrix, but what lies where there are tiles yet.
        bool has_room = count <= second / STAGE_BYTES;
        fetch_second(has_room ? 0 : LATE, SECOND * 16);
        __syncwarp();
        // All tiles are done.
        named_barrier(TILES_ARE_READ, THREADS + 32);
        if (!has_room) fetch_second(0, LATE);
        end_copies();
        wait_for_copies<0>();
        named_leave(2, THREADS + 32);
        wait_for_previous();
        return;
    }
    cluster_wait();
    wait_for_previous();

    share_residual(b, r, x, squares, residual_here);
    wait_for_copies<0>();
    named_barrier(1, THREADS);
    barrier_wait_for_cluster(residual_here, 0);
    float *all_sums = (float *)(memory + sums);
    multiply<FIRST>(memory + first, memory + x, HIDDEN, all_sums, [&] {
        // In its place come tiles, sums and the second matrix.
        publish_shared();
        named_leave(FIRST_IS_READ, THREADS + 32);
        named_barrier(1, THREADS);
    });
    bf16 *qkv = (bf16 *)(memory + raw);
    for (int base = 0; base < r.rows * FIRST * 4; base += THREADS) {
        int i = base + threadIdx.x, row = i / (FIRST * 4), m = i % (FIRST * 4) * 4, column = b.rank * FIRST * 16 + m;
        bool valid = row < r.rows;
        uint2 value = make_uint2(0, 0);
        if (valid) {
            float factor = norm_factor(r, (const float *)(memory + squares), row);
            float4 sum = total<FIRST>(all_sums, row, m), bias = make_float4(0.f, 0.f, 0.f, 0.f);
            if (a.bias) bias = *(const float4 *)(a.bias + row_of(a, kv_head, column));
            value.x = pack(sum.x * factor + bias.x, sum.y * factor + bias.y);
            value.y = pack(sum.z * factor + bias.z, sum.w * factor + bias.w);
        }
        send_to_all(b, valid, raw + (row * QKV + column) * 2, raw_here, value);
    }
    named_barrier(2, THREADS + 32);
    // Where the tiles are that this warp fetches, a lane a tile.
    int places = 0;
    // The row of the first one, and what norms and rotates its q.
    auto angles_of = [&](int row) { return a.rope + (long long)(work.lens[row] - 1) * DIM; };
    int row = work.row_at(work.from);
    Head rotation;
    if (work.from < work.to) {
        rotation.read_factors(a.q_norm, angles_of(row));
        if (a.k_norm && lane < DIM / 32) prefetch_near(a.k_norm + lane * 32);
    }
    barrier_wait_for_cluster(raw_here, 0);

    for (int tile = work.from; tile < work.to;) {
        int end = min(work.to, work.before[row + 1]), kv_len = work.lens[row];
        bf16 *rotated = (bf16 *)(memory + q);
        for (int i = warp; i < GROUP; i += WARPS) {
            rotation.read_numbers(qkv + row * QKV + i * DIM, a.q_norm, a.q_eps, a.q_shift);
#pragma unroll
            for (int j = 0; j < PAIRS_A_LANE; j++) {
                if (!Head::holds(j)) continue;
                uint2 pair = rotation.rotated(j);
                *(u32 *)(rotated + i * Q_STRIDE + Head::index(j)) = pair.x;
                *(u32 *)(rotated + i * Q_STRIDE + Head::index(j) + DIM / 2) = pair.y;
            }
        }
        named_barrier(1, THREADS);
        Queries queries;
        queries.load(rotated);
        Sums mine;
        mine.clear();
        for (int i = tile - work.from + (warp - (tile - work.from) & WARPS - 1); i < end - work.from; i += WARPS) {
            int inside = work.from + i - work.before[row], round = i / WARPS, next = i + STAGES;
            if (round % 32 == 0 && work.from + next < work.to) places = find(a, work, work.from + next + lane * WARPS, row, kv_head);
            barrier_wait(ring.full_at(i), ring.parity(i));
            if (work.from + i == work.before[row + 1] - 1) {
                int slot = a.store_at[row];
                long long to = (((long long)(slot >> a.page_shift) * a.kv_heads + kv_head << a.page_shift) + (slot & (1 << a.page_shift) - 1)) * DIM;
                const bf16 *k = qkv + row * QKV + GROUP * DIM;
                NewToken token = {k, k + DIM, slot < 0 ? nullptr : a.k_pages + to, a.v_pages + to, a.k_norm, angles_of(row), a.k_eps, a.k_shift};
                add_token(token, (kv_len - 1) % TILE, ring.tile(i));
            }
            mine.add(a.scores, kv_len, (work.first_seen(row) + inside) * TILE, ring.tile(i), queries);
            __syncwarp();
            int place = __shfl_sync(~0u, places, round % 32);
            if (lane == 0 && work.from + next < work.to) ring.fetch(next, k_map, v_map, place);
        }
        mine.leave(a.scores.power_of_2_scale(), GROUP, tops[warp], all_sums + warp * GROUP * SUMS_STRIDE);
        named_barrier(1, THREADS);
        // The warps' sums become the block's, and go to all.
        int pair = row + b.rank;
        for (int i = threadIdx.x; i < GROUP * DIM / 4; i += THREADS) {
            int head = i * 4 / DIM;
            float best = -infinity(), weight = 0.f;
            float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
            for (int w = 0; w < WARPS; w++) best = fmaxf(best, tops[w][head].x);
#pragma unroll
            for (int w = 0; w < WARPS; w++) {
                float factor = power_of_2(tops[w][head].x - best);
                float4 more = *(const float4 *)(all_sums + (w * GROUP + head) * SUMS_STRIDE + i * 4 % DIM);
                weight += factor * tops[w][head].y;
                sum.x += factor * more.x, sum.y += factor * more.y, sum.z += factor * more.z, sum.w += factor * more.w;
            }
            int at = parts + (pair * GROUP * DIM + i * 4) * 4, top_at = tops_of_parts + (pair * GROUP + head) * 16;
            for (int j = 0; j < CLUSTER; j++) {
                int to = (b.rank + j) % CLUSTER;
                send(address_in(b.at(at), to), address_in(parts_here, to), sum.x, sum.y, sum.z, sum.w);
                // With a head's first values, its best score and sum of weights.
                if (i * 4 % DIM == 0) send(address_in(b.at(top_at), to), address_in(parts_here, to), best, weight, 0.f, 0.f);
            }
        }
        tile = end;
        if (tile == work.to) break;
        row = work.row_at(tile, row);
        rotation.read_factors(a.q_norm, angles_of(row));
        // `rotated` and the sums are written anew.
        named_barrier(1, THREADS);
    }

    named_leave(TILES_ARE_READ, THREADS + 32);
    barrier_wait_for_cluster(parts_here, 0);
    for (int i = threadIdx.x; i < r.rows * GROUP * DIM / 4; i += THREADS) {
        int row = i / (GROUP * DIM / 4), value = i % (GROUP * DIM / 4) * 4, head = value / DIM;
        float best = -infinity(), weight = 0.f;
        float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
        int from = work.first_block[row], to = work.last_block[row];
        for (int s = from; s <= to; s++) best = fmaxf(best, *(const float *)(memory + tops_of_parts + ((row + s) * GROUP + head) * 16));
        for (int s = from; s <= to; s++) {
            float2 top = *(const float2 *)(memory + tops_of_parts + ((row + s) * GROUP + head) * 16);
            float4 more = *(const float4 *)(memory + parts + ((row + s) * GROUP * DIM + value) * 4);
            float factor = power_of_2(top.x - best);
            weight += factor * top.y;
            sum.x += factor * more.x, sum.y += factor * more.y, sum.z += factor * more.z, sum.w += factor * more.w;
        }
        // A row of padding has attended to nothing.
        float share = from > to ? 0.f : 1.f / weight;
        *(uint2 *)(memory + attended + row * STRIDE(GROUP * DIM) + value * 2) = make_uint2(pack(sum.x * share, sum.y * share), pack(sum.z * share, sum.w * share));
    }
    named_barrier(2, THREADS + 32);
    add_later<SECOND>(b, r, memory + second, memory + attended, GROUP * DIM, (float *)(memory + last_sums), a.part);
}
