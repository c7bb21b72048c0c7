// Products as in `strip.cuh`, of so large a w that little else counts: up to 64 rows.
//
// Each warpgroup multiplies x by a half of the strip. Where strips would be so low that x had most of the bytes, a
// cluster of BLOCKS blocks has one higher strip and divides k. Sums come in the rings' place, when all steps are taken.
//
// With NORM a third warpgroup gathers Σ x² from the steps in shared memory.

#define THREADS ((2 + NORM) * TEAM + 64)
// Units that each warpgroup multiplies by.
#define UPPER ((UNITS + 1) / 2)
#define LOWER (UNITS / 2)
// Neighbouring threads that gather a row's squares.
#define SHARERS (TEAM / X_ROWS)
// Units of a block's of a strip that a warpgroup stores, at most, and of both.
#define SHARE ((UPPER + BLOCKS - 1) / BLOCKS)
__device__ __forceinline__ int units_of(int rank) { return (UPPER - rank + BLOCKS - 1) / BLOCKS + (LOWER - rank + BLOCKS - 1) / BLOCKS; }
// Named barriers: a single block's steps are taken, and its sums are there.
#define TAKEN 1
#define SUMMED 2

// A warpgroup's sums of OURS units of a strip from `first_unit` on, over this block's k. Behind X_ROWS, if these are
// fewer than 64, it reads what is nobody's rows.
template <int OURS> __device__ __forceinline__ void take(const Args &a, const Part &p, const Rings &s, int first_unit, float (&sums)[OURS * 8]) {
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

// A warp has taken its last step, and what it has gathered is there. Where all of a block's or of the cluster's have, the
// rings may be written to.
__device__ __forceinline__ void leave_rings(u32 drained) {
    // The other blocks have started.
    cluster_wait();
    int lane = threadIdx.x & 31;
    if (lane < BLOCKS) barrier_arrive_there(address_in(drained, lane));
}

// The warpgroup of the strip's units from `first_unit` on.
template <int OURS> __device__ __forceinline__ void multiply(const Args &a, const Part &p, const Rings &s, const Inbox<SHARE> &inbox, u32 drained, int first_unit) {
    // Without values to begin with, ptxas may have products wait for one another.
    float mine[OURS * 8] = {};
    int row = threadIdx.x % TEAM / 32 * 16 + (threadIdx.x & 31) / 4;
    wait_for_previous();
    take<OURS>(a, p, s, first_unit, mine);
    if (BLOCKS == 1) {
        Outbox box = {s.x, inbox.squares};
        named_barrier(TAKEN, (2 + NORM) * TEAM);
        if (row < X_ROWS) box.put(0, row, first_unit, mine);
        named_barrier(SUMMED, 2 * TEAM);
        box.store<1>(a, p.strip);
        return;
    }
    int units = units_of(p.rank);
    leave_rings(drained);
    if (threadIdx.x == 0 && units) barrier_expect(inbox.arrived, inbox.bytes(a, units));
    barrier_wait_for_cluster(drained, 0);
    inbox.exchange(a, row, p.strip * UNITS + first_unit, mine, units);
}

// The warpgroup that gathers the squares of this block's k.
__device__ __forceinline__ void gather(const Args &a, const Part &p, const Rings &s, const Inbox<SHARE> &inbox, u32 drained) {
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
        if (sharer == 0) inbox.squares[row] = squares;
        named_leave(TAKEN, 3 * TEAM);
        return;
    }
    leave_rings(drained);
#pragma unroll
    for (int to = 0; to < BLOCKS; to++)
        if (sharer == 0 && units_of(to)) inbox.send_square(row, squares, to);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
strip(const __grid_constant__ TensorMap w, const __grid_constant__ TensorMap x, const Args a) {
    extern __shared__ unsigned char memory[];
    __shared__ u64 barriers[2 * STAGES_MAX + 2];
    __shared__ float squares[NORM ? BLOCKS * X_ROWS : 1];
    Part p(a);
    Rings s(a, memory, barriers);
    // What the cluster's blocks send comes in the rings' place.
    Inbox<SHARE> inbox = {s.x, s.free + 8 * STAGES_MAX, squares, p.rank};
    u32 drained = inbox.arrived + 8;
    int warp = threadIdx.x / 32, readers = (2 + NORM) * TEAM / 32;
    if (threadIdx.x == THREADS - 64) s.init(a, readers);
    if (BLOCKS > 1 && threadIdx.x == THREADS - 32) {
        barrier_init(inbox.arrived, 1), barrier_init(drained, BLOCKS * readers);
        publish_barriers();
    }
    __syncthreads();
    if (BLOCKS > 1) cluster_arrive();
    if (threadIdx.x == THREADS - 64) {
        fetch_w(a, w, p, s);
        // If the next kernel's copies came before these, memory would rest later, when it waits for this one's results.
        let_next_start();
    }
    if (threadIdx.x == THREADS - 32) fetch_x(a, x, p, s);
    if (warp >= readers) wait_for_previous();
    else if (NORM && warp >= 2 * TEAM / 32) gather(a, p, s, inbox, drained);
    else if (threadIdx.x < TEAM) multiply<UPPER>(a, p, s, inbox, drained, 0);
    else multiply<LOWER>(a, p, s, inbox, drained, UPPER);
}
