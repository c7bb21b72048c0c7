// out[m, n] = Σ_k x[m, k] · w[n, k] for 9 to 64 rows m and so large a w that nothing counts but how fast it is
// read, on compute capability 9.0: as in `wide.cu`, x stays and w streams.
//
// A cluster of BLOCKS blocks walks tiles of 64 rows of w (gated: by turns 8 of the gate and 8 of up) and divides
// k among its blocks. So each has its part of x, times the norm's weights, in shared memory from the first tile
// to the last, and fetches nothing but w: steps of 64 elements of k, the next 128 bytes of the same 64 rows, as
// many ahead as there is room for, over the ends of tiles. The first ones before the kernels in front are done.
//
// Four warps multiply. At a tile's end they send their sums of the j-th 8 rows of x to block j, which has room
// for those of SLOTS tiles, and go on at once. Its other four warps, the finishing ones, add up what all blocks
// sent, store, and tell the senders that they have read it; before, they norm x, a step ahead of the first
// tile's products. A last warp fetches. A norm's factor is applied to the sums.

#define BLOCKS 8
#define TILE 64
#define COLUMNS (GATED ? TILE / 2 : TILE)
#define STEP 64
#define STAGE_BYTES (TILE * 128)
#define X_BYTES (ROWS * 128)
#define STAGES_MAX 24
// Of a block.
#define STEPS_MAX 64
// The warps that multiply, and those that finish.
#define TEAM 128
#define THREADS (2 * TEAM + 32)
// A slot: [from][thread] four sums.
#define SLOT_BYTES (BLOCKS * TEAM * 16)
// [from][8 rows]
#define SQUARES_BYTES (BLOCKS * 8 * 4)
// 8 threads norm a row of a step: so many rows at once, and of each thread.
#define LINES (TEAM / 8)
#define OURS (ROWS / LINES)

struct Args {
    Output output; const float *norm;
    int k_total, stages;
    float eps, shift;
};

// What this block has: every `clusters`th tile, and `steps` steps of k, at least one.
struct Part {
    int rank, cluster, clusters, tiles, first, steps;

    __device__ explicit Part(const Args &a)
        : rank(cluster_rank()), cluster(blockIdx.x / BLOCKS), clusters(gridDim.x / BLOCKS),
          tiles((a.output.n_total + COLUMNS - 1) / COLUMNS) {
        int all = (a.k_total + STEP - 1) / STEP;
        first = all * rank / BLOCKS, steps = all * (rank + 1) / BLOCKS - first;
    }
};

struct Shared {
    unsigned char *x;
    const float4 *sums;
    const float2 *squares;
    // Addresses: x [step][row] 128 bytes, the ring of w, slots of sums, squares, barriers.
    u32 x_at, ring, slots, squares_at;
    u32 x_here, x_normed, full, free, arrived, read;

    __device__ Shared(const Args &a, unsigned char *memory) {
        int all = (a.k_total + STEP - 1) / STEP;
        x_at = (shared_address(memory) + 1023) / 1024 * 1024;
        ring = x_at + (all + BLOCKS - 1) / BLOCKS * X_BYTES;
        slots = ring + a.stages * STAGE_BYTES, squares_at = slots + SLOTS * SLOT_BYTES;
        x = memory + (x_at - shared_address(memory));
        sums = (const float4 *)(x + (slots - x_at)), squares = (const float2 *)(x + (squares_at - x_at));
        x_here = squares_at + SQUARES_BYTES, x_normed = x_here + 8 * STEPS_MAX;
        full = x_normed + 8 * STEPS_MAX, free = full + 8 * STAGES_MAX;
        arrived = free + 8 * STAGES_MAX, read = arrived + 8 * SLOTS;
    }
};

// One thread's: all copies.
__device__ __forceinline__ void fetch(const Args &a, const TensorMap &w, const TensorMap &x, const Part &p, const Shared &s) {
    Ring ring(a.stages), taken(a.stages);
    int tile = p.cluster, step = 0;
    auto fetch_w = [&]() {
        u32 barrier = s.full + 8 * ring.stage;
        barrier_expect(barrier, STAGE_BYTES);
        fetch_groups(s.ring + ring.stage * STAGE_BYTES, w, barrier, (p.first + step) * STEP, tile * (COLUMNS / 8));
        ring.next();
        if (++step == p.steps) step = 0, tile += p.clusters;
    };
    for (int i = 0; i < a.stages && tile < p.tiles; i++) fetch_w();
    wait_for_previous();
    for (int i = 0; i < p.steps; i++) {
        barrier_expect(s.x_here + 8 * i, X_BYTES);
        fetch_box(s.x_at + i * X_BYTES, x, s.x_here + 8 * i, (p.first + i) * STEP, 0);
    }
    for (; tile < p.tiles; taken.next()) {
        barrier_wait(s.free + 8 * taken.stage, taken.parity);
        fetch_w();
    }
    // If the next kernel's copies came before these, memory would rest later, when it waits for this one's results.
    let_next_start();
}

// Multiplies x with the norm's weights, step by step, and sends the sums of its squares to the blocks that store
// the rows. A thread of the finishing warps has 8 elements of a step, of rows `line`, + LINES …
__device__ __forceinline__ void norm_x(const Args &a, const Part &p, const Shared &s) {
    int piece = threadIdx.x % 8, line = threadIdx.x % TEAM / 8;
    float squares[OURS] = {};
    float4 next[2];
    auto load = [&](int step) {
        int k = (p.first + step) * STEP + piece * 8;
        next[0] = next[1] = make_float4(0.f, 0.f, 0.f, 0.f);
        if (step < p.steps && k < a.k_total)
            next[0] = __ldg((const float4 *)(a.norm + k)), next[1] = __ldg((const float4 *)(a.norm + k) + 1);
    };
    load(0);
    wait_for_previous();
    for (int step = 0; step < p.steps; step++) {
        float scale[8] = {next[0].x, next[0].y, next[0].z, next[0].w, next[1].x, next[1].y, next[1].z, next[1].w};
        load(step + 1);
        barrier_wait(s.x_here + 8 * step, 0);
#pragma unroll
        for (int i = 0; i < OURS; i++) {
            int row = line + i * LINES;
            uint4 *at = (uint4 *)(s.x + step * X_BYTES + row * 128 + (piece ^ row % 8) * 16), v = *at;
            u32 pairs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
            for (int e = 0; e < 4; e++) {
                float low = low_half(pairs[e]), high = high_half(pairs[e]);
                squares[i] += low * low + high * high;
                pairs[e] = pack(low * (scale[2 * e] + a.shift), high * (scale[2 * e + 1] + a.shift));
            }
            *at = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
        }
        publish_shared();
        __syncwarp();
        if (threadIdx.x % 32 == 0) barrier_arrive(s.x_normed + 8 * step);
    }
    // The others' barriers are there.
    cluster_wait();
#pragma unroll
    for (int i = 0; i < OURS; i++) {
        int owner = (line + i * LINES) / 8;
#pragma unroll
        for (int lane = 4; lane; lane >>= 1) squares[i] += __shfl_xor_sync(~0u, squares[i], lane);
        if (piece || owner * 8 >= a.output.rows) continue;
        send(address_in(s.squares_at + (p.rank * 8 + line % 8) * 4, owner), address_in(s.arrived, owner), squares[i]);
    }
}

// A tile's sums over this block's k.
__device__ __forceinline__ void sum(const Part &p, const Shared &s, float (&d)[ROWS / 2], Ring &ring, bool is_first) {
    auto leave = [&](u32 stage) {
        __syncwarp();
        if ((threadIdx.x & 31) == 0) barrier_arrive(s.free + 8 * stage);
    };
    u32 last = 0;
    for (int step = 0; step < p.steps; step++) {
        if (is_first) barrier_wait((NORM ? s.x_normed : s.x_here) + 8 * step, 0);
        barrier_wait(s.full + 8 * ring.stage, ring.parity);
        u64 w = factor(s.ring + ring.stage * STAGE_BYTES), x = factor(s.x_at + step * X_BYTES);
        products_begin();
#pragma unroll
        for (int j = 0; j < 4; j++) Product<ROWS>::template shared<0>(d, along(w, j * 32), along(x, j * 32), step + j > 0);
        products_commit();
        products_wait<1>();
        if (step) leave(last);
        last = ring.stage, ring.next();
    }
    products_wait<0>();
    pin(d);
    leave(last);
}

__device__ __forceinline__ void multiply(const Args &a, const Part &p, const Shared &s) {
    // Without values to begin with, ptxas may have products wait for one another.
    float d[ROWS / 2] = {};
    Ring ring(a.stages);
    wait_for_previous();
    // The others' barriers are there.
    cluster_wait();
    for (int tile = p.cluster, round = 0; tile < p.tiles; tile += p.clusters, round++) {
        sum(p, s, d, ring, round == 0);
        int slot = round % SLOTS;
        if (round >= SLOTS) barrier_wait_for_cluster(s.read + 8 * slot, ~(round / SLOTS) & 1);
        u32 mine = s.slots + slot * SLOT_BYTES + (p.rank * TEAM + threadIdx.x) * 16, barrier = s.arrived + 8 * slot;
#pragma unroll
        for (int j = 0; j < ROWS / 8; j++) {
            if (j * 8 >= a.output.rows) break;
            send(address_in(mine, j), address_in(barrier, j), d[4 * j], d[4 * j + 1], d[4 * j + 2], d[4 * j + 3]);
        }
    }
}

// The finishing warps: the sums of 8 rows of x. Nobody sends to a block without rows; others end when they have
// read all that was sent to them, and wait for no answer to what nobody will overwrite.
__device__ __forceinline__ void finish(const Args &a, const Part &p, const Shared &s) {
    if (NORM) norm_x(a, p, s);
    else wait_for_previous();
    if (p.rank * 8 >= a.output.rows) return;
    int thread = threadIdx.x - TEAM, lane = thread % 32;
    float2 factor = make_float2(1.f, 1.f);
    for (int tile = p.cluster, round = 0; tile < p.tiles; tile += p.clusters, round++) {
        Corner corner(p.rank * 8, tile * COLUMNS + thread / 32 * (GATED ? 8 : 16));
        uint2 before = corner.before(a.output);
        int slot = round % SLOTS;
        u32 arrived = s.arrived + 8 * slot;
        if (thread == 0) barrier_expect(arrived, SLOT_BYTES + (NORM && round == 0 ? SQUARES_BYTES : 0));
        barrier_wait_for_cluster(arrived, round / SLOTS & 1);
        float4 total = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
        for (int from = 0; from < BLOCKS; from++) {
            float4 x = s.sums[(slot * BLOCKS + from) * TEAM + thread];
            total.x += x.x, total.y += x.y, total.z += x.z, total.w += x.w;
        }
        __syncwarp();
        if (tile + SLOTS * p.clusters < p.tiles && lane < BLOCKS) barrier_arrive_there(address_in(s.read + 8 * slot, lane));
        if (NORM && round == 0) {
            float2 squares = make_float2(0.f, 0.f);
#pragma unroll
            for (int from = 0; from < BLOCKS; from++) {
                float2 x = s.squares[from * 4 + lane % 4];
                squares.x += x.x, squares.y += x.y;
            }
            factor = make_float2(rsqrtf(squares.x / a.k_total + a.eps), rsqrtf(squares.y / a.k_total + a.eps));
        }
        corner.store(a.output, total, before, factor);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
resident(const __grid_constant__ TensorMap w, const __grid_constant__ TensorMap x, const Args a) {
    extern __shared__ unsigned char memory[];
    Part p(a);
    Shared s(a, memory);
    if (threadIdx.x == 0) {
        int owners = (a.output.rows + 7) / 8;
        for (int i = 0; i < p.steps; i++) barrier_init(s.x_here + 8 * i, 1), barrier_init(s.x_normed + 8 * i, TEAM / 32);
        for (int i = 0; i < a.stages; i++) barrier_init(s.full + 8 * i, 1), barrier_init(s.free + 8 * i, TEAM / 32);
        for (int i = 0; i < SLOTS; i++) barrier_init(s.arrived + 8 * i, 1), barrier_init(s.read + 8 * i, owners * TEAM / 32);
        publish_barriers();
    }
    __syncthreads();
    cluster_arrive();
    if (threadIdx.x >= 2 * TEAM) {
        if (threadIdx.x == 2 * TEAM) {
            prefetch_map(x);
            fetch(a, w, x, p, s);
        } else {
            wait_for_previous();
        }
        return;
    }
    if (threadIdx.x < TEAM) multiply(a, p, s);
    else finish(a, p, s);
}
