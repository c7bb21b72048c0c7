// Products as in `strip.cuh`, of rows so short that a block reads all of x in less time than a cluster would take to
// exchange its sums, and that half of a multiprocessor's memory is enough: beside a block there is room for one of the
// next kernel, which may start at once.
//
// What a block waits for is its shared memory, most of all for x. So warpgroups take the steps by turns, x from
// registers, and what each has summed up is a part of the whole.
//
// Stages are even in number, so that each is one warpgroup's: steps that it waits for come behind others of its own.

#define THREADS (2 * TEAM + 64)
static_assert(X_ROWS == 64 && BLOCKS == 1, "each warp of a warpgroup has 16 rows of x");
// Named barrier of the warpgroups.
#define MET 1

__device__ __forceinline__ void multiply(const Args &a, const Part &p, const Rings &s, float *squares) {
    int team = threadIdx.x / TEAM, row = threadIdx.x % TEAM / 32 * 16 + (threadIdx.x & 31) / 4;
    // Without values to begin with, ptxas may have products wait for one another.
    Sums all = {};
    wait_for_previous();
    take<2>(a, p, s, team, 0, all);
    // Both have taken their last step: in the rings' place come sums.
    named_barrier(MET, 2 * TEAM);
    Outbox box = {s.x, squares};
    box.put(team, row, 0, all.d);
    box.put_squares(team, row, all.squares);
    named_barrier(MET, 2 * TEAM);
    box.store<2>(a, p.strip);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
strip_short(const __grid_constant__ TensorMap w, const __grid_constant__ TensorMap x, const Args a) {
    extern __shared__ unsigned char memory[];
    __shared__ u64 barriers[2 * STAGES_MAX];
    __shared__ float squares[NORM ? 2 * X_ROWS : 1];
    let_next_start();
    Part p(a);
    Rings s(a, memory, barriers);
    int warp = threadIdx.x / 32;
    if (threadIdx.x == 2 * TEAM) s.init(a, TEAM / 32);
    __syncthreads();
    if (threadIdx.x == 2 * TEAM) fetch_w(a, w, p, s);
    if (threadIdx.x == 2 * TEAM + 32) fetch_x(a, x, p, s);
    if (warp < 2 * TEAM / 32) multiply(a, p, s, squares);
    else wait_for_previous();
}
