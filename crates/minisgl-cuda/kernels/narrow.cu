// out[m, n] = Σ_k x[m, k] · w[n, k] for some dozens of rows m, on compute capability 9.0: too many for
// `stream.cu`, too few to fill the card with the tiles of a large product.
//
// The product is taken the other way round: a tile is 64 · GROUPS rows of w (gated: by turns 8 of the
// gate and 8 of up) as the first factor, all rows of x as the second. A block walks tiles; or, where there
// are few, a cluster of blocks has one tile and divides k among its blocks. A warp fetches steps of 64
// elements of k, of w as many ahead as there is room for: the first ones before the kernels in front are
// done. In a cluster, each block sends its sums of a row of x to the block that this row is shared out
// to, which adds and stores.
//
// With norm, whose weights are in w: out = rsqrt(mean x² + eps) · Σ_k x[m, k] · w[n, k]. Σ x² is gathered from the
// steps in shared memory.

#define THREADS (128 * GROUPS)
#define TILE (64 * GROUPS)
#define COLUMNS (GATED ? TILE / 2 : TILE)
#define STEP 64
#define W_BYTES (TILE * 128)
#define X_BYTES (ROWS * 128)
#define STAGES_MAX 16
// Threads that gather a row's squares.
#define SHARERS (THREADS / ROWS)

struct Args {
    const float *bias; bf16 *out;
    int rows, n_total, k_total, blocks, w_stages, x_stages, add_to, gelu;
    float eps;
};

// Where things are in shared memory: rings of steps, then what the cluster's blocks send,
// sums [from][8 rows][thread][4] and squares [from][sharer][row], then the rows' factors.
struct Shared {
    u32 w, x, sums, full_w, full_x, free, arrived, squares;
    float *gathered, *factors;
};

// What this block has of the product.
struct Part {
    int rank, cluster, clusters, tiles, first, steps;
    // Groups of 8 rows of x that each block of the cluster stores, and how many rows are this one's.
    int share, row0, rows;
    __device__ Part(const Args &a) {
        rank = a.blocks > 1 ? cluster_rank() : 0;
        cluster = blockIdx.x / a.blocks, clusters = gridDim.x / a.blocks;
        tiles = (a.n_total + COLUMNS - 1) / COLUMNS;
        int all = (a.k_total + STEP - 1) / STEP;
        first = all * rank / a.blocks, steps = all * (rank + 1) / a.blocks - first;
        share = ((a.rows + 7) / 8 + a.blocks - 1) / a.blocks;
        row0 = rank * share * 8, rows = max(0, min(a.rows - row0, share * 8));
    }
};

// The steps of one factor in the order in which they are fetched.
struct Cursor {
    Ring ring;
    int step = 0, tile, left;
    __device__ Cursor(int stages, const Part &p) : ring(stages), tile(p.cluster) {
        left = (p.tiles - p.cluster + p.clusters - 1) / p.clusters * p.steps;
    }
    __device__ void next(const Part &p) {
        ring.next(), left--;
        if (++step == p.steps) step = 0, tile += p.clusters;
    }
};

// One thread's: all steps of all tiles.
__device__ __forceinline__ void fetch(const Args &a, const TensorMap &w, const TensorMap &x, const Part &p, const Shared &s) {
    Cursor next_w(a.w_stages, p), next_x(a.x_stages, p);
    u64 once = read_once();
    auto fetch_w = [&]() {
        u32 barrier = s.full_w + 8 * next_w.ring.stage;
        barrier_expect(barrier, W_BYTES);
        fetch_groups(s.w + next_w.ring.stage * W_BYTES, w, barrier, (p.first + next_w.step) * STEP, next_w.tile * (COLUMNS / 8), once);
        next_w.next(p);
    };
    auto fetch_x = [&]() {
        u32 barrier = s.full_x + 8 * next_x.ring.stage;
        // Rows that are not there are not asked for: zeros in their place take the copy engine longer than rows do.
        barrier_expect(barrier, a.rows * 128);
        fetch_box(s.x + next_x.ring.stage * X_BYTES, x, barrier, (p.first + next_x.step) * STEP, 0);
        next_x.next(p);
    };
    for (int i = 0; i < a.w_stages && next_w.left; i++) fetch_w();
    wait_for_previous();
    for (int i = 0; i < a.x_stages && next_x.left; i++) fetch_x();
    // A step that was taken frees a stage of both rings.
    for (Ring taken(a.x_stages); next_w.left || next_x.left; taken.next()) {
        barrier_wait(s.free + 8 * taken.stage, taken.parity);
        if (next_x.left) fetch_x();
        if (next_w.left) fetch_w();
    }
}

// A tile's sums over this block's k.
__device__ __forceinline__ void sum(const Args &a, const Part &p, const Shared &s, float (&d)[ROWS / 2], float &squares, Ring &w, Ring &x, bool first_tile) {
    int warp = threadIdx.x / 32;
    if (first_tile) wait_for_previous();
    u32 last = 0;
    for (int step = 0; step < p.steps; step++) {
        barrier_wait(s.full_w + 8 * w.stage, w.parity), barrier_wait(s.full_x + 8 * x.stage, x.parity);
        u32 w_at = s.w + w.stage * W_BYTES + warp / 4 * 64 * 128, x_at = s.x + x.stage * X_BYTES;
        products_begin();
#pragma unroll
        for (int j = 0; j < 4; j++) Product<ROWS>::shared<0>(d, factor(w_at + j * 32), factor(x_at + j * 32), step + j > 0);
        products_commit();
        if (NORM && first_tile) squares += squares_of_row<8 / SHARERS>(x_at, threadIdx.x % ROWS, threadIdx.x / ROWS);
        products_wait<1>();
        if (step) warp_arrives(s.free + 8 * last);
        last = x.stage, w.next(), x.next();
    }
    products_wait<0>();
    pin(d);
    warp_arrives(s.free + 8 * last);
}

// Sends what the cluster's other blocks store of this block's sums, and its own to itself.
__device__ __forceinline__ void share_out(const Args &a, const Part &p, const Shared &s, const float (&d)[ROWS / 2], float squares) {
    int to = 0, place = 0;
#pragma unroll
    for (int j = 0; j < ROWS / 8; j++) {
        if (j * 8 >= a.rows) break;
        u32 mine = s.sums + ((p.rank * p.share + place) * THREADS + threadIdx.x) * 16;
        send(address_in(mine, to), address_in(s.arrived, to), d[4 * j], d[4 * j + 1], d[4 * j + 2], d[4 * j + 3]);
        if (++place == p.share) to++, place = 0;
    }
    int row = threadIdx.x % ROWS, owner = row / (8 * p.share);
    u32 mine = s.squares + (p.rank * THREADS + threadIdx.x) * 4;
    if (NORM && row < a.rows) send(address_in(mine, owner), address_in(s.arrived, owner), squares);
}

// The factors of the rows that this block stores.
__device__ __forceinline__ void find_factors(const Args &a, const Part &p, const Shared &s) {
    for (int i = threadIdx.x; i < p.rows; i += THREADS) {
        float total = 0.f;
        for (int from = 0; from < a.blocks * SHARERS; from++) total += s.gathered[from * ROWS + p.row0 + i];
        s.factors[p.row0 + i] = rsqrtf(total / a.k_total + a.eps);
    }
    named_barrier(1, THREADS);
}

// 8 rows of x and a warp's columns of a tile. A thread has sums of columns g and g + 8 (gated: of gate and
// up) and rows 2t and 2t + 1; it loads and stores row g, columns 2t and 2t + 1.
struct Corner {
    int row0, column0;
    __device__ Corner(int tile, int group) {
        int warp = threadIdx.x / 32;
        row0 = group * 8, column0 = tile * COLUMNS + warp * (GATED ? 8 : 16);
    }
    __device__ __forceinline__ bool has(const Args &a, int h) const {
        return row0 + (threadIdx.x & 31) / 4 < a.rows && column0 + 8 * h < a.n_total;
    }
    __device__ __forceinline__ u32 *at(const Args &a, int h) const {
        int lane = threadIdx.x & 31;
        return (u32 *)(a.out + (long long)(row0 + lane / 4) * a.n_total + column0 + 8 * h + 2 * (lane & 3));
    }
    // What the sums are added to.
    __device__ __forceinline__ uint2 before(const Args &a) const {
        uint2 x = make_uint2(0, 0);
        if (GATED || !a.add_to) return x;
        if (has(a, 0)) x.x = *at(a, 0);
        if (has(a, 1)) x.y = *at(a, 1);
        return x;
    }
    __device__ __forceinline__ void store(const Args &a, float4 sums, uint2 before, const float *factors) const {
        int lane = threadIdx.x & 31, g = lane / 4, row = row0 + 2 * (lane & 3);
        float2 factor = make_float2(1.f, 1.f);
        if (NORM) factor = *(const float2 *)(factors + row);
        float value[2][2] = {{sums.x * factor.x, sums.y * factor.y}, {sums.z * factor.x, sums.w * factor.y}};
#pragma unroll
        for (int h = 0; h < 2; h++) {
            int n = GATED ? column0 + h * a.n_total + g : column0 + 8 * h + g;
            float bias = a.bias && (GATED ? column0 : column0 + 8 * h) < a.n_total ? a.bias[n] : 0.f;
            value[h][0] += bias, value[h][1] += bias;
        }
        if (GATED) {
#pragma unroll
            for (int e = 0; e < 2; e++) value[0][e] = activate(value[0][e], a.gelu) * value[1][e];
        }
#pragma unroll
        for (int h = 0; h < (GATED ? 1 : 2); h++) {
            u32 old = transposed(h ? before.y : before.x);
            if (a.add_to) value[h][0] += low_half(old), value[h][1] += high_half(old);
            u32 x = transposed(pack(value[h][0], value[h][1]));
            if (has(a, h)) *at(a, h) = x;
        }
    }
};

// What the cluster's blocks sent, added up and stored.
__device__ __forceinline__ void receive(const Args &a, const Part &p, const Shared &s, int tile) {
    int groups = (p.rows + 7) / 8, group0 = p.row0 / 8;
    uint2 before = make_uint2(0, 0);
    if (groups) {
        before = Corner(tile, group0).before(a);
        barrier_wait_for_cluster(s.arrived, 0);
    }
    if (NORM) find_factors(a, p, s);
    for (int j = 0; j < groups; j++) {
        Corner corner(tile, group0 + j);
        uint2 now = before;
        if (j + 1 < groups) before = Corner(tile, group0 + j + 1).before(a);
        float4 total = make_float4(0, 0, 0, 0);
        for (int from = 0; from < a.blocks; from++) {
            uint4 x = load_shared_16(s.sums + ((from * p.share + j) * THREADS + threadIdx.x) * 16);
            total.x += __uint_as_float(x.x), total.y += __uint_as_float(x.y), total.z += __uint_as_float(x.z), total.w += __uint_as_float(x.w);
        }
        corner.store(a, total, now, s.factors);
    }
}

// A single block's own sums.
__device__ __forceinline__ void keep(const Args &a, const Part &p, const Shared &s, const float (&d)[ROWS / 2], float squares, int tile, bool first_tile) {
    if (NORM && first_tile) {
        s.gathered[threadIdx.x] = squares;
        named_barrier(1, THREADS);
        find_factors(a, p, s);
    }
#pragma unroll
    for (int j = 0; j < ROWS / 8; j++) {
        if (j * 8 >= a.rows) break;
        Corner corner(tile, j);
        corner.store(a, make_float4(d[4 * j], d[4 * j + 1], d[4 * j + 2], d[4 * j + 3]), corner.before(a), s.factors);
    }
}

__device__ __forceinline__ void multiply(const Args &a, const Part &p, const Shared &s) {
    float d[ROWS / 2], squares = 0.f;
    Ring w(a.w_stages), x(a.x_stages);
    for (int tile = p.cluster; tile < p.tiles; tile += p.clusters) {
        bool first_tile = tile == p.cluster;
        sum(a, p, s, d, squares, w, x, first_tile);
        if (a.blocks == 1) {
            keep(a, p, s, d, squares, tile, first_tile);
            continue;
        }
        // The others have started. A cluster has one tile.
        cluster_wait();
        if (threadIdx.x == 0 && p.rows)
            barrier_expect(s.arrived, a.blocks * ((p.rows + 7) / 8 * THREADS * 16 + (NORM ? p.rows * SHARERS * 4 : 0)));
        share_out(a, p, s, d, squares);
        receive(a, p, s, tile);
    }
}

// Few enough registers that the next product's blocks find room beside this one's.
extern "C" __global__ void __launch_bounds__(THREADS + 32, 2)
narrow(const __grid_constant__ TensorMap w, const __grid_constant__ TensorMap x, const Args a) {
    extern __shared__ unsigned char memory[];
    __shared__ u64 barriers[3 * STAGES_MAX + 1];
    let_next_start();
    Part p(a);
    Shared s;
    s.w = (shared_address(memory) + 1023) / 1024 * 1024, s.x = s.w + a.w_stages * W_BYTES;
    s.sums = s.x + a.x_stages * X_BYTES;
    s.squares = s.sums + (a.blocks > 1 ? a.blocks * p.share * THREADS * 16 : 0);
    s.gathered = (float *)(memory + (s.squares - shared_address(memory)));
    s.factors = s.gathered + a.blocks * THREADS;
    s.full_w = shared_address(barriers), s.full_x = s.full_w + 8 * STAGES_MAX, s.free = s.full_x + 8 * STAGES_MAX;
    s.arrived = s.free + 8 * STAGES_MAX;
    if (threadIdx.x == 0) {
        for (int i = 0; i < a.w_stages; i++) barrier_init(s.full_w + 8 * i, 1);
        for (int i = 0; i < a.x_stages; i++) barrier_init(s.full_x + 8 * i, 1), barrier_init(s.free + 8 * i, ARRIVALS(4 * GROUPS));
        barrier_init(s.arrived, 1);
        publish_barriers();
    }
    __syncthreads();
    if (a.blocks > 1) cluster_arrive();
    if (threadIdx.x >= THREADS) {
        if (threadIdx.x == THREADS) {
            prefetch_map(x);
            fetch(a, w, x, p, s);
        } else {
            wait_for_previous();
        }
        return;
    }
    multiply(a, p, s);
}
