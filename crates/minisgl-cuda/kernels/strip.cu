// out[m, n] = Σ_k x[m, k] · w[n, k] for 17 to 64 rows m and so large a w that little counts but how fast it is
// read, on compute capability 9.0.
//
// A block has a strip of w: UNITS units of 16 rows (gated: 8 of the gate and 8 of up), so many that nearly every
// multiprocessor has one. It walks along k in steps of 64 elements, of w and of x together, which comes from L2:
// the higher the strip, the fewer bytes of x a byte of w. A warp fetches steps ahead, w of the first ones before
// the kernels in front are done. Two warpgroups multiply, each x by a half of the strip.
//
// Where strips would be so low that x had most of the bytes, a cluster of BLOCKS blocks has one higher strip and
// divides k. At its end each block sends its sums of every BLOCKSth unit to the block that stores it.
//
// With NORM, whose weights are in w: out[m, n] = rsqrt(mean x² + eps) · Σ_k x[m, k] · w[n, k]. A third warpgroup gathers
// Σ x² from the steps in shared memory; in a cluster, each block sends what it has to all that store.

#define TEAM 128
#define STEP 64
#define UNIT_BYTES (16 * 128)
#define W_BYTES (UNITS * UNIT_BYTES)
#define X_BYTES (X_ROWS * 128)
#define STAGES_MAX 16
// Columns of `out` that a unit gives.
#define COLUMNS (GATED ? 8 : 16)
#define THREADS ((2 + NORM) * TEAM + 32)
// Neighbouring threads that gather a row's squares.
#define SHARERS (TEAM / X_ROWS)
// Named barrier: a single block's squares are there.
#define GATHERED 1
// Units of each warpgroup.
#define UPPER ((UNITS + 1) / 2)
#define LOWER (UNITS / 2)
// A block's units of a strip that a warpgroup stores, at most.
#define SHARE ((UPPER + BLOCKS - 1) / BLOCKS)

struct Args {
    const float *bias; bf16 *out;
    int rows, n_total, k_total, stages, add_to, gelu;
    float eps;
};

// What this block has of the product: the cluster's strip, and of it `steps` steps of k from `first` on.
struct Part {
    int rank, strip, first, steps;
    // The strip's units that a block of the cluster stores.
    __device__ static int units_of(int rank) { return (UPPER - rank + BLOCKS - 1) / BLOCKS + (LOWER - rank + BLOCKS - 1) / BLOCKS; }
    __device__ explicit Part(const Args &a) : rank(BLOCKS > 1 ? cluster_rank() : 0), strip(blockIdx.x / BLOCKS) {
        int all = (a.k_total + STEP - 1) / STEP;
        first = all * rank / BLOCKS, steps = all * (rank + 1) / BLOCKS - first;
    }
};

// Rings of steps of x and of w. When the last step is taken, they have room for what the cluster's blocks send:
// sums [from][SHARE][half of a unit][thread] 4.
struct Shared {
    u32 x, w, full, free, arrived, drained;
    float *squares; // [from][X_ROWS]
    __device__ Shared(const Args &a, const unsigned char *memory, const u64 *barriers, float *squares) : squares(squares) {
        x = (shared_address(memory) + 1023) / 1024 * 1024, w = x + a.stages * X_BYTES;
        full = shared_address(barriers), free = full + 8 * STAGES_MAX;
        arrived = free + 8 * STAGES_MAX, drained = arrived + 8;
    }
    __device__ u32 sums(int from, int place, int half) const {
        return x + ((from * SHARE + place) * 2 + half) * 2 * TEAM * 16 + threadIdx.x * 16;
    }
};

// One thread's: all copies. `upper`, `lower`: boxes of each warpgroup's units. Blocks begin at different steps, so
// that they do not all ask for the same lines of x at once.
__device__ __forceinline__ void fetch(const Args &a, const TensorMap &upper, const TensorMap &lower, const TensorMap &x, const Part &p, const Shared &s) {
    auto fetch_w = [&](u32 stage, int step) {
        u32 barrier = s.full + 8 * stage, to = s.w + stage * W_BYTES;
        int k = (p.first + step) * STEP, unit = p.strip * UNITS;
        barrier_expect(barrier, W_BYTES + X_BYTES);
        fetch_groups(to, upper, barrier, k, unit * (COLUMNS / 8));
        fetch_groups(to + UPPER * UNIT_BYTES, lower, barrier, k, (unit + UPPER) * (COLUMNS / 8));
    };
    auto fetch_x = [&](u32 stage, int step) {
        fetch_box(s.x + stage * X_BYTES, x, s.full + 8 * stage, (p.first + step) * STEP, 0);
    };
    auto after = [&](int step) { return step + 1 == p.steps ? 0 : step + 1; };
    int start = p.strip % p.steps, ahead = min(a.stages, p.steps), step = start;
    for (int i = 0; i < ahead; i++, step = after(step)) fetch_w(i, step);
    wait_for_previous();
    step = start;
    for (int i = 0; i < ahead; i++, step = after(step)) fetch_x(i, step);
    Ring ring(a.stages);
    for (int i = ahead; i < p.steps; i++, step = after(step), ring.next()) {
        barrier_wait(s.free + 8 * ring.stage, ring.parity);
        fetch_w(ring.stage, step), fetch_x(ring.stage, step);
    }
    // If the next kernel's copies came before these, memory would rest later, when it waits for this one's results.
    let_next_start();
}

// A warp's 16 rows of x and a unit. A thread has 8 sums: [half of the unit][row g or g + 8][column 2t or 2t + 1].
struct Corner {
    int row, column;
    __device__ explicit Corner(int unit)
        : row(threadIdx.x % TEAM / 32 * 16 + (threadIdx.x & 31) / 4), column(unit * COLUMNS + 2 * (threadIdx.x & 3)) {}

    __device__ __forceinline__ bool has(const Args &a, int half, int h) const {
        return row + 8 * h < a.rows && column + 8 * half < a.n_total;
    }
    __device__ __forceinline__ bf16 *at(const Args &a, int half, int h) const {
        return a.out + (long long)(row + 8 * h) * a.n_total + column + 8 * half;
    }
    // What norms the rows.
    __device__ __forceinline__ float2 factors(const Args &a, const float *squares) const {
        if (!NORM) return make_float2(1.f, 1.f);
        float low = 0.f, high = 0.f;
#pragma unroll
        for (int from = 0; from < BLOCKS; from++) low += squares[from * X_ROWS + row], high += squares[from * X_ROWS + row + 8];
        return make_float2(rsqrtf(low / a.k_total + a.eps), rsqrtf(high / a.k_total + a.eps));
    }
    // What the sums are added to. Gated ones never are.
    __device__ __forceinline__ void load(const Args &a, float (&before)[8]) const {
#pragma unroll
        for (int i = 0; i < 8; i += 2) {
            before[i] = before[i + 1] = 0.f;
            if (GATED || !a.add_to || !has(a, i / 4, i / 2 % 2)) continue;
            u32 pair = *(const u32 *)at(a, i / 4, i / 2 % 2);
            before[i] = low_half(pair), before[i + 1] = high_half(pair);
        }
    }
    __device__ __forceinline__ void store(const Args &a, const float (&sums)[8], const float (&before)[8], float2 factors) const {
        float value[8];
#pragma unroll
        for (int i = 0; i < 8; i++) {
            float factor = i / 2 % 2 ? factors.y : factors.x;
            int half = i / 4, n = GATED ? half * a.n_total + column + i % 2 : column + 8 * half + i % 2;
            bool is_there = a.bias && column + (GATED ? 0 : 8 * half) < a.n_total;
            value[i] = factor * sums[i] + (is_there ? a.bias[n] : 0.f) + before[i];
        }
#pragma unroll
        for (int i = 0; i < (GATED ? 4 : 8); i += 2) {
            if (GATED) value[i] = activate(value[i], a.gelu) * value[4 + i], value[i + 1] = activate(value[i + 1], a.gelu) * value[5 + i];
            if (has(a, i / 4, i / 2 % 2)) *(u32 *)at(a, i / 4, i / 2 % 2) = pack(value[i], value[i + 1]);
        }
    }
};

// One warpgroup's sums of a strip, over this block's k: 64 rows of x by OURS units. Behind X_ROWS, if these are
// fewer, it reads what is nobody's rows.
template <int OURS> struct Sums {
    float d[OURS * 8];

    // Of the columns from `BEGIN` on: no product has all numbers of columns.
    template <int BEGIN> __device__ __forceinline__ void add(u64 x, u64 w, int accumulate) {
        constexpr int LEFT = OURS * 16 - BEGIN, COUNT = LEFT >= 128 ? 128 : LEFT >= 64 ? 64 : LEFT >= 32 ? 32 : 16;
        if constexpr (LEFT > 0) {
            float (&part)[COUNT / 2] = *(float (*)[COUNT / 2])(d + BEGIN / 2);
            Product<COUNT>::template shared<0>(part, x, along(w, BEGIN * 128), accumulate);
            add<BEGIN + COUNT>(x, w, accumulate);
        }
    }
    __device__ __forceinline__ void take(const Part &p, const Shared &s, Ring ring, int first_unit) {
        for (int step = 0; step < p.steps; step++, ring.next()) {
            barrier_wait(s.full + 8 * ring.stage, ring.parity);
            u64 x = factor(s.x + ring.stage * X_BYTES), w = factor(s.w + ring.stage * W_BYTES + first_unit * UNIT_BYTES);
            products_begin();
#pragma unroll
            for (int j = 0; j < 4; j++) add<0>(along(x, j * 32), along(w, j * 32), step + j > 0);
            products_commit();
            products_wait<0>();
            pin(d);
            warp_arrives(s.free + 8 * ring.stage);
        }
    }
    __device__ __forceinline__ void of_unit(float (&sums)[8], int unit) const {
#pragma unroll
        for (int i = 0; i < 8; i++) sums[i] = d[unit * 8 + i];
    }
};

// Whether a warp has rows of x.
__device__ __forceinline__ bool has_rows(const Args &a) { return int(threadIdx.x) % TEAM / 32 * 16 < a.rows; }

// A single block's own sums.
template <int OURS> __device__ __forceinline__ void keep(const Args &a, const Shared &s, const Sums<OURS> &mine, int first_unit) {
    if (NORM) named_barrier(GATHERED, 3 * TEAM);
    if (!has_rows(a)) return;
    float2 factors = Corner(0).factors(a, s.squares);
#pragma unroll
    for (int i = 0; i < OURS; i++) {
        Corner corner(first_unit + i);
        float sums[8], before[8];
        mine.of_unit(sums, i);
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
template <int OURS> __device__ __forceinline__ void share(const Args &a, const Part &p, const Shared &s, const Sums<OURS> &mine, int first_unit) {
    leave_rings(s);
    float before[SHARE][8];
#pragma unroll
    for (int place = 0; place < SHARE; place++)
        if (place * BLOCKS + p.rank < OURS) Corner(first_unit + place * BLOCKS + p.rank).load(a, before[place]);
    int all_units = Part::units_of(p.rank);
    if (threadIdx.x == 0 && all_units)
        barrier_expect(s.arrived, BLOCKS * (all_units * ((a.rows + 15) / 16) * 32 * 2 * 16 + (NORM ? X_ROWS * 4 : 0)));
    barrier_wait_for_cluster(s.drained, 0);
#pragma unroll
    for (int i = 0; i < OURS; i++) {
        if (!has_rows(a)) break;
        u32 barrier = address_in(s.arrived, i % BLOCKS);
        float sums[8];
        mine.of_unit(sums, i);
#pragma unroll
        for (int half = 0; half < 2; half++)
            send(address_in(s.sums(p.rank, i / BLOCKS, half), i % BLOCKS), barrier, sums[4 * half], sums[4 * half + 1], sums[4 * half + 2], sums[4 * half + 3]);
    }
    if (all_units) barrier_wait_for_cluster(s.arrived, 0);
    if (!has_rows(a)) return;
    float2 factors = Corner(0).factors(a, s.squares);
#pragma unroll
    for (int place = 0; place < SHARE; place++) {
        if (place * BLOCKS + p.rank >= OURS) break;
        float sums[8] = {};
#pragma unroll
        for (int from = 0; from < BLOCKS; from++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                uint4 x = load_shared_16(s.sums(from, place, half));
                sums[4 * half] += __uint_as_float(x.x), sums[4 * half + 1] += __uint_as_float(x.y);
                sums[4 * half + 2] += __uint_as_float(x.z), sums[4 * half + 3] += __uint_as_float(x.w);
            }
        Corner(first_unit + place * BLOCKS + p.rank).store(a, sums, before[place], factors);
    }
}

// The warpgroup of the strip's units from `first_unit` on.
template <int OURS> __device__ __forceinline__ void multiply(const Args &a, const Part &p, const Shared &s, int first_unit) {
    // Without values to begin with, ptxas may have products wait for one another.
    Sums<OURS> mine = {};
    wait_for_previous();
    mine.take(p, s, Ring(a.stages), first_unit);
    if constexpr (BLOCKS > 1) share(a, p, s, mine, p.strip * UNITS + first_unit);
    else keep(a, s, mine, p.strip * UNITS + first_unit);
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
        if (Part::units_of(to)) send(address_in(here, to), address_in(s.arrived, to), squares);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
strip(const __grid_constant__ TensorMap upper, const __grid_constant__ TensorMap lower, const __grid_constant__ TensorMap x, const Args a) {
    extern __shared__ unsigned char memory[];
    __shared__ u64 barriers[2 * STAGES_MAX + 2];
    __shared__ float squares[NORM ? BLOCKS * X_ROWS : 1];
    Part p(a);
    Shared s(a, memory, barriers, squares);
    if (threadIdx.x == THREADS - 32) {
        for (int i = 0; i < a.stages; i++) barrier_init(s.full + 8 * i, 1), barrier_init(s.free + 8 * i, ARRIVALS((2 + NORM) * TEAM / 32));
        barrier_init(s.arrived, 1), barrier_init(s.drained, BLOCKS * (2 + NORM) * TEAM / 32);
        publish_barriers();
    }
    __syncthreads();
    if (BLOCKS > 1) cluster_arrive();
    if (threadIdx.x >= THREADS - 32) {
        if (threadIdx.x == THREADS - 32) {
            prefetch_map(x);
            fetch(a, upper, lower, x, p, s);
        } else {
            wait_for_previous();
        }
        return;
    }
    if (NORM && threadIdx.x >= 2 * TEAM) gather(a, p, s);
    else if (threadIdx.x < TEAM) multiply<UPPER>(a, p, s, 0);
    else multiply<LOWER>(a, p, s, UPPER);
}
