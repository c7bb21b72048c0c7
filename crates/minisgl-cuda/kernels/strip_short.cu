// Products as in `strip.cuh`, of rows so short that a block reads all of x in less time than a cluster would take to
// exchange its sums, and that half of a multiprocessor's memory is enough: beside a block there is room for one of the
// next kernel, which may start at once.
//
// What a block waits for is its shared memory, most of all for x. So warpgroups take the steps by turns, x from
// registers, where Σ x² is had on the way. At the end each adds the other's sums of every second unit, and stores these.
//
// Stages are even in number, so that each is one warpgroup's: steps that it waits for come behind others of its own.

#define THREADS (2 * TEAM + 32)
static_assert(X_ROWS == 64 && BLOCKS == 1, "each warp of a warpgroup has 16 rows of x");
// Named barrier of the warpgroups.
#define MET 1

// A warpgroup, which stores the RANKth unit and every second behind it.
template <int RANK> __device__ __forceinline__ void multiply(const Args &a, const Part &p, const Rings &s) {
    // Without values to begin with, ptxas may have products wait for one another.
    Sums all = {};
    wait_for_previous();
    take<2, RANK>(a, p, s, 0, all);
    // In the rings' place come sums [unit][half of it][thread] 4, and squares like another unit of them.
    auto left = [&](int unit, int half) { return s.x + ((unit * 2 + half) * TEAM + threadIdx.x % TEAM) * 16; };
    // Both have taken their last step.
    named_barrier(MET, 2 * TEAM);
#pragma unroll
    for (int unit = 1 - RANK; unit < UNITS; unit += 2)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float *sums = all.d + unit * 8 + 4 * half;
            store_shared(left(unit, half), sums[0], sums[1], sums[2], sums[3]);
        }
    if (NORM) store_shared(left(UNITS, RANK), all.squares[0], all.squares[1], 0.f, 0.f);
    named_barrier(MET, 2 * TEAM);
    if (!has_rows(a)) return;
    float2 factors = make_float2(1.f, 1.f);
    if (NORM) {
        uint4 more = load_shared_16(left(UNITS, 1 - RANK));
        factors = factors_of(a, all.squares[0] + __uint_as_float(more.x), all.squares[1] + __uint_as_float(more.y));
    }
#pragma unroll
    for (int unit = RANK; unit < UNITS; unit += 2) {
        Corner corner(p.strip * UNITS + unit);
        float sums[8], before[8];
        of_unit(sums, all.d, unit);
        corner.load(a, before);
#pragma unroll
        for (int half = 0; half < 2; half++) add_half(sums, half, load_shared_16(left(unit, half)));
        corner.store(a, sums, before, factors);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
strip_short(const __grid_constant__ TensorMap upper, const __grid_constant__ TensorMap lower, const __grid_constant__ TensorMap x, const Args a) {
    extern __shared__ unsigned char memory[];
    __shared__ u64 barriers[2 * STAGES_MAX];
    let_next_start();
    Part p(a);
    Rings s(a, memory, barriers);
    if (threadIdx.x == 2 * TEAM) {
        s.init(a, TEAM / 32);
        publish_barriers();
    }
    __syncthreads();
    if (threadIdx.x >= 2 * TEAM) {
        if (threadIdx.x == 2 * TEAM) fetch(a, upper, lower, x, p, s);
        else wait_for_previous();
        return;
    }
    if (threadIdx.x < TEAM) multiply<0>(a, p, s);
    else multiply<1>(a, p, s);
}
