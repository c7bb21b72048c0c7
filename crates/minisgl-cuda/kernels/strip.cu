// Products as in `strip.cuh`, of so large a w that little else counts: up to 64 rows.
//
// Each warpgroup multiplies x by a half of the strip. Where strips would be so low that x had most of the bytes, a
// cluster of BLOCKS blocks has one higher strip and divides k. At its end each block sends its sums of every BLOCKSth
// unit to the block that stores it.
//
// With NORM a third warpgroup gathers Σ x² from the steps in shared memory; in a cluster, each block sends what it has
// to all that store.

#define THREADS ((2 + NORM) * TEAM + 32)
// Neighbouring threads that gather a row's squares.
#define SHARERS (TEAM / X_ROWS)
// Named barrier: a single block's squares are there.
#define GATHERED 1
// A block's units of a strip that a warpgroup stores, at most.
#define SHARE ((UPPER + BLOCKS - 1) / BLOCKS)

// The strip's units that a block of the cluster stores.
__device__ __forceinline__ int units_of(int rank) { return (UPPER - rank + BLOCKS - 1) / BLOCKS + (LOWER - rank + BLOCKS - 1) / BLOCKS; }

// When the last step is taken, the rings have room for what the cluster's blocks send:
// sums [from][SHARE][half of a unit][thread] 4.
struct Shared : Rings {
    u32 arrived, drained;
    float *squares; // [from][X_ROWS]
    __device__ Shared(const Args &a, const unsigned char *memory, const u64 *barriers, float *squares) : Rings(a, memory, barriers), squares(squares) {
        arrived = free + 8 * STAGES_MAX, drained = arrived + 8;
    }
    __device__ u32 sums(int from, int place, int half) const {
        return x + ((from * SHARE + place) * 2 + half) * 2 * TEAM * 16 + threadIdx.x * 16;
    }
    // What norms the rows that a thread stores.
    __device__ __forceinline__ float2 factors(const Args &a) const {
        int row = Corner(0).row;
        float low = 0.f, high = 0.f;
#pragma unroll
        for (int from = 0; NORM && from < BLOCKS; from++) low += squares[from * X_ROWS + row], high += squares[from * X_ROWS + row + 8];
        return factors_of(a, low, high);
    }
};

// A warpgroup's sums of OURS units of a strip from `first_unit` on, over this block's k. Behind X_ROWS, if these are
// fewer than 64, it reads what is nobody's rows.
template <int OURS> __device__ __forceinline__ void take(const Args &a, const Part &p, const Shared &s, int first_unit, float (&sums)[OURS * 8]) {
    Ring ring(a.stages);
    for (int step = 0; step < p.steps; step++, ring.next()) {
        barrier_wait(s.full + 8 * ring.stage, ring.parity);
        u64 x = factor(s.x + ring.stage * X_BYTES), w = factor(s.w + ring.stage * W_BYTES + first_unit * UNIT_BYTES);
        products_begin();
#pragma unroll
        for (int j = 0; j < 4; j++) add_products<OURS>(sums, along(x, j * 32), along(w, j * 32), step + j > 0);
        products_commit();
        products_wait<0>();
        pin(sums);
        warp_arrives(s.free + 8 * ring.stage);
    }
}

// A single block's own sums.
template <int OURS> __device__ __forceinline__ void keep(const Args &a, const Shared &s, const float (&mine)[OURS * 8], int first_unit) {
    if (NORM) named_barrier(GATHERED, 3 * TEAM);
    if (!has_rows(a)) return;
    float2 factors = s.factors(a);
#pragma unroll
    for (int i = 0; i < OURS; i++) {
        Corner corner(first_unit + i);
        float sums[8], before[8];
        of_unit(sums, mine, i);
        // One after the other: all at once would need more registers than there are.
        pin(sums);
        corner.load(a, before);
        corner.store(a, sums, before, factors);
    }
}

// A warp has taken its last step. Where all of the cluster have, their rings may be written to.
__device__ __forceinline__ void leave_rings(const Shared &s) {
    int lane = threadIdx.x & 31;
    // The other blocks have started.
    cluster_wait();
    if (lane < BLOCKS) barrier_arrive_there(address_in(s.drained, lane));
}

// Sends each unit's sums to the block of the cluster that stores it, and stores the others' of its own ones.
template <int OURS> __device__ __forceinline__ void share(const Args &a, const Part &p, const Shared &s, const float (&mine)[OURS * 8], int first_unit) {
    leave_rings(s);
    float before[SHARE][8];
#pragma unroll
    for (int place = 0; place < SHARE; place++)
        if (place * BLOCKS + p.rank < OURS) Corner(first_unit + place * BLOCKS + p.rank).load(a, before[place]);
    int all_units = units_of(p.rank);
    if (threadIdx.x == 0 && all_units)
        barrier_expect(s.arrived, BLOCKS * (all_units * ((a.rows + 15) / 16) * 32 * 2 * 16 + (NORM ? X_ROWS * 4 : 0)));
    barrier_wait_for_cluster(s.drained, 0);
#pragma unroll
    for (int i = 0; i < OURS; i++) {
        if (!has_rows(a)) break;
        u32 barrier = address_in(s.arrived, i % BLOCKS);
        float sums[8];
        of_unit(sums, mine, i);
#pragma unroll
        for (int half = 0; half < 2; half++)
            send(address_in(s.sums(p.rank, i / BLOCKS, half), i % BLOCKS), barrier, sums[4 * half], sums[4 * half + 1], sums[4 * half + 2], sums[4 * half + 3]);
    }
    if (all_units) barrier_wait_for_cluster(s.arrived, 0);
    if (!has_rows(a)) return;
    float2 factors = s.factors(a);
#pragma unroll
    for (int place = 0; place < SHARE; place++) {
        if (place * BLOCKS + p.rank >= OURS) break;
        float sums[8] = {};
#pragma unroll
        for (int from = 0; from < BLOCKS; from++)
#pragma unroll
            for (int half = 0; half < 2; half++) add_half(sums, half, load_shared_16(s.sums(from, place, half)));
        Corner(first_unit + place * BLOCKS + p.rank).store(a, sums, before[place], factors);
    }
}

// The warpgroup of the strip's units from `first_unit` on.
template <int OURS> __device__ __forceinline__ void multiply(const Args &a, const Part &p, const Shared &s, int first_unit) {
    // Without values to begin with, ptxas may have products wait for one another.
    float mine[OURS * 8] = {};
    wait_for_previous();
    take<OURS>(a, p, s, first_unit, mine);
    if constexpr (BLOCKS > 1) share<OURS>(a, p, s, mine, p.strip * UNITS + first_unit);
    else keep<OURS>(a, s, mine, p.strip * UNITS + first_unit);
}

// The warpgroup that gathers the squares of this block's k.
__device__ __forceinline__ void gather(const Args &a, const Part &p, const Shared &s) {
    int thread = threadIdx.x - 2 * TEAM, row = thread / SHARERS, sharer = thread % SHARERS;
    float squares = 0.f;
    Ring ring(a.stages);
    wait_for_previous();
    for (int step = 0; step < p.steps; step++, ring.next()) {
        barrier_wait(s.full + 8 * ring.stage, ring.parity);
        squares += squares_of_row<8 / SHARERS>(s.x + ring.stage * X_BYTES, row, sharer);
        warp_arrives(s.free + 8 * ring.stage);
    }
#pragma unroll
    for (int i = 1; i < SHARERS; i *= 2) squares += __shfl_xor_sync(~0u, squares, i);
    if (BLOCKS == 1) {
        if (sharer == 0) s.squares[row] = squares;
        named_leave(GATHERED, 3 * TEAM);
        return;
    }
    leave_rings(s);
    if (sharer != 0) return;
    u32 here = shared_address(s.squares + p.rank * X_ROWS + row);
#pragma unroll
    for (int to = 0; to < BLOCKS; to++)
        if (units_of(to)) send(address_in(here, to), address_in(s.arrived, to), squares);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
strip(const __grid_constant__ TensorMap upper, const __grid_constant__ TensorMap lower, const __grid_constant__ TensorMap x, const Args a) {
    extern __shared__ unsigned char memory[];
    __shared__ u64 barriers[2 * STAGES_MAX + 2];
    __shared__ float squares[NORM ? BLOCKS * X_ROWS : 1];
    Part p(a);
    Shared s(a, memory, barriers, squares);
    if (threadIdx.x == THREADS - 32) {
        s.init(a, (2 + NORM) * TEAM / 32);
        barrier_init(s.arrived, 1), barrier_init(s.drained, BLOCKS * (2 + NORM) * TEAM / 32);
        publish_barriers();
    }
    __syncthreads();
    if (BLOCKS > 1) cluster_arrive();
    if (threadIdx.x >= THREADS - 32) {
        if (threadIdx.x == THREADS - 32) {
            fetch(a, upper, lower, x, p, s);
            // If the next kernel's copies came before these, memory would rest later, when it waits for this one's results.
            let_next_start();
        } else {
            wait_for_previous();
        }
        return;
    }
    if (NORM && threadIdx.x >= 2 * TEAM) gather(a, p, s);
    else if (threadIdx.x < TEAM) multiply<UPPER>(a, p, s, 0);
    else multiply<LOWER>(a, p, s, UPPER);
}
