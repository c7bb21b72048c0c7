// A gated MLP of up to 8 rows in one kernel; see `half_layer.cuh`.
//
// So few clusters that they find room beside the attention half's: each half's weights come while the other
// runs. A block's do not fit into shared memory, and registers hold the rest: of the first matrix a tile,
// and all of the second, of which a warp has a tile.
//
// A cluster has INNER of the inner features. The last one may lack some: it reads others in their place, times
// zeros. In shared memory: the block's other rows of the first matrix, in tiles of 8 of the gate and 8 of up,
// and later, in the same place, sums; the normed rows; the cluster's inner values.

// Tiles of a block: FIRST of its rows of the first matrix, and SECOND, at most one a warp, of the second.
#define HIDDEN (SECOND * 16 * CLUSTER)
#define INNER (FIRST * 8 * CLUSTER)
// Lots of 32 of k that a warp has of the first product, and of the second.
#define FIRST_CHUNKS ((HIDDEN / 32 + WARPS - 1) / WARPS)
#define SECOND_CHUNKS (INNER / 32)

struct Args {
    Residual residual;
    const bf16 *gate_up; const bf16 *down; float *part;
    int inner_total, gelu;
};

// A lane's share of 16 rows of 32 weights: 8 of row lane / 4, and of the eighth behind it.
struct Weights {
    uint4 low, high;

    __device__ __forceinline__ void load(const bf16 *row, long long eighth) { low = load_weights(row), high = load_weights(row + eighth); }
};

extern "C" __global__ void __launch_bounds__(THREADS, 1) mlp(const Args a) {
    extern __shared__ __align__(128) unsigned char memory[];
    __shared__ u64 barriers[2];
    let_next_start();
    const Residual &r = a.residual;
    Block b = {memory, shared_address(memory), cluster_rank(), int(blockIdx.x) / CLUSTER};
    const int mine = FIRST * 8, in_memory = FIRST - 1;
    const int x = max(in_memory * 16 * STRIDE(HIDDEN), WARPS * ROWS * SUMS_ROW(FIRST) * 4);
    const int mid = x + ROWS * STRIDE(HIDDEN), squares = mid + ROWS * STRIDE(INNER);
    int warp = threadIdx.x / 32, lane = threadIdx.x & 31, g = lane / 4, t = lane & 3;
    int begin = b.cluster * INNER;
    float *sums = (float *)memory;
    u32 residual_here = shared_address(barriers), mid_here = residual_here + 8;
    if (threadIdx.x == 0) {
        barrier_init(residual_here, 1), barrier_init(mid_here, 1);
        publish_barriers();
        barrier_expect(residual_here, residual_bytes(r));
        barrier_expect(mid_here, r.rows * INNER * 2);
    }
    __syncthreads();
    cluster_arrive();

    auto first_row = [&](int i) {
        int n = min(begin + b.rank * mine + i / 16 * 8 + i % 8, a.inner_total - 1);
        return a.gate_up + (long long)(n + (i & 8 ? a.inner_total : 0)) * HIDDEN;
    };
    auto second_row = [&](int i) { return a.down + (long long)(b.rank * SECOND * 16 + i) * a.inner_total; };
    if (warp == 0) prefetch_norm(b, r);
    fetch_rows(b.at(0), in_memory * 16, HIDDEN, [&](int i) { return first_row(16 + i); });
    auto has_chunk = [&](int c) { return (c + 1) * WARPS <= HIDDEN / 32 || c * WARPS + warp < HIDDEN / 32; };
    Weights held[FIRST_CHUNKS], second[SECOND_CHUNKS];
#pragma unroll
    for (int c = 0; c < FIRST_CHUNKS; c++)
        if (has_chunk(c)) held[c].load(first_row(g) + (c * WARPS + warp) * 32 + t * 8, (long long)a.inner_total * HIDDEN);
    if (SECOND == WARPS || warp < SECOND) {
#pragma unroll
        for (int c = 0; c < SECOND_CHUNKS; c++)
            second[c].load(second_row(warp * 16 + g) + min(begin + c * 32 + t * 8, a.inner_total - 8), 8ll * a.inner_total);
    }
    cluster_wait();
    wait_for_previous();

    share_residual(b, r, x, squares, residual_here);
    wait_for_copies<0>();
    named_barrier(1, THREADS);
    Weights now[FIRST];
    auto read = [&](int c) {
#pragma unroll
        for (int j = 0; j < FIRST; j++) {
            const unsigned char *w = memory + ((j - 1) * 16 + g) * STRIDE(HIDDEN) + (c * WARPS + warp) * 64 + t * 16;
            now[j] = j == 0 ? held[c] : Weights{*(const uint4 *)w, *(const uint4 *)(w + 8 * STRIDE(HIDDEN))};
        }
    };
    read(0);
    barrier_wait_for_cluster(residual_here, 0);
    float first[FIRST][4] = {};
#pragma unroll
    for (int c = 0; c < FIRST_CHUNKS; c++) {
        if (!has_chunk(c)) continue;
        if (c > 0) read(c);
        uint4 v = *(const uint4 *)(memory + x + g * STRIDE(HIDDEN) + (c * WARPS + warp) * 64 + t * 16);
#pragma unroll
        for (int j = 0; j < FIRST; j++) multiply_32(first[j], now[j].low, now[j].high, v);
    }
    named_barrier(1, THREADS);
    put_sums(first, sums);
    named_barrier(1, THREADS);
    for (int base = 0; base < r.rows * mine / 4; base += THREADS) {
        int i = base + threadIdx.x, row = i / (mine / 4), n = i % (mine / 4) * 4, m = n / 8 * 16 + n % 8;
        bool valid = row < r.rows;
        uint2 value = make_uint2(0, 0);
        if (valid && begin + b.rank * mine + n < a.inner_total) {
            float factor = norm_factor(r, (const float *)(memory + squares), row);
            float4 gate = total<FIRST>(sums, row, m), up = total<FIRST>(sums, row, m + 8);
            auto gated = [&](float gate, float up) { return activate(gate * factor, a.gelu) * (up * factor); };
            value.x = pack(gated(gate.x, up.x), gated(gate.y, up.y));
            value.y = pack(gated(gate.z, up.z), gated(gate.w, up.w));
        }
        send_to_all(b, valid, mid + row * STRIDE(INNER) + (b.rank * mine + n) * 2, mid_here, value);
    }
    barrier_wait_for_cluster(mid_here, 0);
    if (SECOND < WARPS && warp >= SECOND) return;
    // By turns, so that products need not wait for the ones before.
    float part[4][4] = {};
#pragma unroll
    for (int c = 0; c < SECOND_CHUNKS; c++) {
        uint4 v = *(const uint4 *)(memory + mid + g * STRIDE(INNER) + c * 64 + t * 16);
        multiply_32(part[c % 4], second[c].low, second[c].high, v);
    }
    float *to = a.part + (long long)b.cluster * r.rows * HIDDEN + (b.rank * SECOND + warp) * 16 + g;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        int row = 2 * t + i % 2;
        if (row < r.rows) to[row * HIDDEN + i / 2 * 8] = part[0][i] + part[1][i] + (part[2][i] + part[3][i]);
    }
}
