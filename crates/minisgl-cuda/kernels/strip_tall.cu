// Products as in `strip.cuh`, of 65 to 128 rows and so small a w that x has most of the bytes: a cluster of BLOCKS blocks
// divides k, so that each reads a part of x. Each warpgroup multiplies half of the rows by the whole strip, x from registers,
// where Σ x² is had on the way. At the end each block sends its sums of every BLOCKSth unit to the block that stores it.

#define THREADS (2 * TEAM + 32)
static_assert(X_ROWS == 128 && BLOCKS > 1, "each warp of two warpgroups has 16 rows of x");
// Units that a block of the cluster stores, at most.
#define SHARE ((UNITS + BLOCKS - 1) / BLOCKS)

// The strip's units that a block of the cluster stores.
__device__ __forceinline__ int units_of(int rank) { return (UNITS - rank + BLOCKS - 1) / BLOCKS; }

// Behind the rings is room for what the cluster's blocks send: sums [from][SHARE][half of a unit][thread] 4.
struct Shared : Rings {
    u32 arrived, received;
    float *squares; // [from][X_ROWS]
    __device__ Shared(const Args &a, const unsigned char *memory, const u64 *barriers, float *squares) : Rings(a, memory, barriers), squares(squares) {
        arrived = free + 8 * STAGES_MAX, received = w + a.stages * W_BYTES;
    }
    __device__ u32 sums(int from, int place, int half) const {
        return received + (((from * SHARE + place) * 2 + half) * 2 * TEAM + threadIdx.x) * 16;
    }
};

// Sends each unit's sums to the block of the cluster that stores it, and to all blocks the squares.
__device__ __forceinline__ void share(const Part &p, const Shared &s, const Sums &all, int row) {
#pragma unroll
    for (int i = 0; i < UNITS; i++) {
        int to = i % BLOCKS;
        u32 barrier = address_in(s.arrived, to);
        float sums[8];
        of_unit(sums, all.d, i);
#pragma unroll
        for (int half = 0; half < 2; half++)
            send(address_in(s.sums(p.rank, i / BLOCKS, half), to), barrier, sums[4 * half], sums[4 * half + 1], sums[4 * half + 2], sums[4 * half + 3]);
    }
    static_assert(BLOCKS <= 4, "each of the four lanes with a row's squares sends them to one block");
    int to = threadIdx.x & 3;
#pragma unroll
    for (int h = 0; NORM && h < 2; h++)
        if (to < BLOCKS && units_of(to)) send(address_in(shared_address(s.squares + p.rank * X_ROWS + row + 8 * h), to), address_in(s.arrived, to), all.squares[h]);
}

__device__ __forceinline__ void multiply(const Args &a, const Part &p, const Shared &s) {
    int first_row = threadIdx.x / TEAM * 64, row = Corner(0, first_row).row;
    // Without values to begin with, ptxas may have products wait for one another.
    Sums all = {};
    wait_for_previous();
    take<1, 0>(a, p, s, first_row, all);
    auto corner = [&](int place) { return Corner(p.strip * UNITS + place * BLOCKS + p.rank, first_row); };
    float before[SHARE][8];
#pragma unroll
    for (int place = 0; place < SHARE; place++)
        if (place < units_of(p.rank)) corner(place).load(a, before[place]);
    // The other blocks have started.
    cluster_wait();
    share(p, s, all, row);
    if (!units_of(p.rank)) return;
    barrier_wait_for_cluster(s.arrived, 0);
    float low = 0.f, high = 0.f;
#pragma unroll
    for (int from = 0; NORM && from < BLOCKS; from++) low += s.squares[from * X_ROWS + row], high += s.squares[from * X_ROWS + row + 8];
    float2 factors = factors_of(a, low, high);
#pragma unroll
    for (int place = 0; place < SHARE; place++) {
        if (place >= units_of(p.rank)) break;
        float sums[8] = {};
#pragma unroll
        for (int from = 0; from < BLOCKS; from++)
#pragma unroll
            for (int half = 0; half < 2; half++) add_half(sums, half, load_shared_16(s.sums(from, place, half)));
        corner(place).store(a, sums, before[place], factors);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
strip_tall(const __grid_constant__ TensorMap upper, const __grid_constant__ TensorMap lower, const __grid_constant__ TensorMap x, const Args a) {
    extern __shared__ unsigned char memory[];
    __shared__ u64 barriers[2 * STAGES_MAX + 1];
    __shared__ float squares[NORM ? BLOCKS * X_ROWS : 1];
    let_next_start();
    Part p(a);
    Shared s(a, memory, barriers, squares);
    if (threadIdx.x == 2 * TEAM) {
        s.init(a, 2 * TEAM / 32);
        barrier_init(s.arrived, 1);
        publish_barriers();
        if (units_of(p.rank)) barrier_expect(s.arrived, BLOCKS * (units_of(p.rank) * 2 * 2 * TEAM * 16 + (NORM ? X_ROWS * 4 : 0)));
    }
    __syncthreads();
    cluster_arrive();
    if (threadIdx.x >= 2 * TEAM) {
        if (threadIdx.x == 2 * TEAM) fetch(a, upper, lower, x, p, s);
        else wait_for_previous();
        return;
    }
    multiply(a, p, s);
}
