// Products as in `strip.cuh`, of 65 to 128 rows, or of two lots of them, and so small a w that x has most of the bytes. Each
// warpgroup multiplies half of the rows by the whole strip, x from registers. A cluster's blocks divide k, so that each reads a
// part of x.

#define THREADS (2 * TEAM + 64)
static_assert(X_ROWS == 128, "each warp of two warpgroups has 16 rows of x");
// Named barrier of the warpgroups.
#define MET 1

// Units of a strip that a block of the cluster stores.
#define SHARE ((UNITS + BLOCKS - 1) / BLOCKS)
__device__ __forceinline__ int units_of(int rank) { return (UNITS - rank + BLOCKS - 1) / BLOCKS; }

__device__ __forceinline__ void multiply(const Args &a, const Part &p, const Rings &s, const Inbox<SHARE> &inbox) {
    int warp = threadIdx.x / 32, row = warp * 16 + (threadIdx.x & 31) / 4;
    // Without values to begin with, ptxas may have products wait for one another.
    Sums all = {};
    wait_for_previous();
    take<1>(a, p, s, 0, warp / 4 * 64, all);
    if (BLOCKS == 1) {
        // Nobody reads the rings any more: in their place come sums.
        named_barrier(MET, 2 * TEAM);
        Outbox box = {s.x, inbox.squares};
        box.put(0, row, 0, all.d);
        box.put_squares(0, row, all.squares);
        __syncwarp();
        box.store<1>(a, p.strip);
        return;
    }
    // The other blocks have started.
    cluster_wait();
    static_assert(BLOCKS <= 4, "each of the four lanes with a row's squares sends them to one block");
    int to = threadIdx.x & 3;
#pragma unroll
    for (int h = 0; NORM && h < 2; h++)
        if (to < BLOCKS && units_of(to)) inbox.send_square(row + 8 * h, all.squares[h], to);
    inbox.exchange(a, row, p.strip * UNITS, all.d, units_of(p.rank));
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
strip_tall(const __grid_constant__ TensorMap w, const __grid_constant__ TensorMap x, Args a) {
    extern __shared__ unsigned char memory[];
    __shared__ u64 barriers[2 * STAGES_MAX + 1];
    __shared__ float squares[NORM ? BLOCKS * X_ROWS : 1];
    let_next_start();
    Part p(a);
    // Of this block's lot.
    a.out += (long long)p.first_row * a.n_total, a.rows = min(a.lot_rows, a.rows - p.first_row);
    Rings s(a, memory, barriers);
    // What other blocks send comes behind the rings.
    Inbox<SHARE> inbox = {s.w + a.stages * W_BYTES, s.free + 8 * STAGES_MAX, squares, p.rank};
    int warp = threadIdx.x / 32;
    if (threadIdx.x == 2 * TEAM) s.init(a, 2 * TEAM / 32);
    if (BLOCKS > 1 && threadIdx.x == 2 * TEAM + 32) {
        barrier_init(inbox.arrived, 1);
        publish_barriers();
        if (units_of(p.rank)) barrier_expect(inbox.arrived, inbox.bytes(a, units_of(p.rank)));
    }
    __syncthreads();
    if (BLOCKS > 1) cluster_arrive();
    if (threadIdx.x == 2 * TEAM) fetch_w(a, w, p, s);
    if (threadIdx.x == 2 * TEAM + 32) fetch_x(a, x, p, s);
    if (warp < 2 * TEAM / 32) multiply(a, p, s, inbox);
    else wait_for_previous();
}
