// out[m, n] = Σ_k x[m, k] · w[n, k] for some dozens of rows m, where little counts but how fast w is read, on compute
// capability 9.0: what `strip.cu`, `strip_short.cu` and `strip_tall.cu` have in common.
//
// A block has a strip of w: UNITS units of 16 rows (gated: 8 of the gate and 8 of up), so many that nearly every
// multiprocessor has one. It walks along k in steps of 64 elements, of w and of x together, which comes from L2:
// the higher the strip, the fewer bytes of x a byte of w. A warp fetches steps ahead, w of the first ones before
// the kernels in front are done. Two warpgroups multiply.
//
// With NORM, whose weights are in w: out[m, n] = rsqrt(mean x² + eps) · Σ_k x[m, k] · w[n, k].

#define TEAM 128
#define STEP 64
#define UNIT_BYTES (16 * 128)
#define W_BYTES (UNITS * UNIT_BYTES)
#define X_BYTES (X_ROWS * 128)
#define STAGES_MAX 16
// Columns of `out` that a unit gives.
#define COLUMNS (GATED ? 8 : 16)
// Units that are fetched at once, and that each warpgroup stores.
#define UPPER ((UNITS + 1) / 2)
#define LOWER (UNITS / 2)

struct Args {
    const float *bias; bf16 *out;
    // x_bytes: of a step of x. Rows that are not there are not asked for: zeros in their place take the copy engine longer
    // than rows do.
    int rows, n_total, k_total, stages, x_bytes, add_to, gelu;
    float eps;
};

// What this block has of the product: the cluster's strip, and of it `steps` steps of k from `first` on.
struct Part {
    int rank, strip, first, steps;
    __device__ explicit Part(const Args &a) : rank(BLOCKS > 1 ? cluster_rank() : 0), strip(blockIdx.x / BLOCKS) {
        int all = (a.k_total + STEP - 1) / STEP;
        first = all * rank / BLOCKS, steps = all * (rank + 1) / BLOCKS - first;
    }
};

// Rings of steps of x and of w. `barriers` are 2 · STAGES_MAX.
struct Rings {
    u32 x, w, full, free;
    __device__ Rings(const Args &a, const unsigned char *memory, const u64 *barriers) {
        x = (shared_address(memory) + 1023) / 1024 * 1024, w = x + a.stages * X_BYTES;
        full = shared_address(barriers), free = full + 8 * STAGES_MAX;
    }
    // One thread's. So many warps read each step.
    __device__ void init(const Args &a, int readers) const {
        for (int i = 0; i < a.stages; i++) barrier_init(full + 8 * i, 1), barrier_init(free + 8 * i, ARRIVALS(readers));
    }
};

// One thread's: all copies. `upper`, `lower`: boxes of the first units and of the others. Blocks begin at different steps, so
// that they do not all ask for the same lines of x at once.
__device__ __forceinline__ void fetch(const Args &a, const TensorMap &upper, const TensorMap &lower, const TensorMap &x, const Part &p, const Rings &s) {
    prefetch_map(x);
    auto fetch_w = [&](u32 stage, int step) {
        u32 barrier = s.full + 8 * stage, to = s.w + stage * W_BYTES;
        int k = (p.first + step) * STEP, unit = p.strip * UNITS;
        barrier_expect(barrier, W_BYTES + a.x_bytes);
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
}

// A warp's 16 rows of x and a unit. A thread has 8 sums: [half of the unit][row g or g + 8][column 2t or 2t + 1].
struct Corner {
    int row, column;
    __device__ explicit Corner(int unit, int first_row = 0)
        : row(first_row + threadIdx.x % TEAM / 32 * 16 + (threadIdx.x & 31) / 4), column(unit * COLUMNS + 2 * (threadIdx.x & 3)) {}

    __device__ __forceinline__ bool has(const Args &a, int half, int h) const {
        return row + 8 * h < a.rows && column + 8 * half < a.n_total;
    }
    __device__ __forceinline__ bf16 *at(const Args &a, int half, int h) const {
        return a.out + (long long)(row + 8 * h) * a.n_total + column + 8 * half;
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

// A product with x from shared memory, or from registers.
template <int COUNT> __device__ __forceinline__ void multiply_by(float (&sums)[COUNT], u64 x, u64 w, int accumulate) {
    Product<2 * COUNT>::template shared<0>(sums, x, w, accumulate);
}
template <int COUNT> __device__ __forceinline__ void multiply_by(float (&sums)[COUNT], const u32 *x, u64 w, int accumulate) {
    Product<2 * COUNT>::template registers<0>(sums, x, w, accumulate);
}
// sums += x · wᵀ, of the columns of COUNT units from BEGIN on: no product has all numbers of columns.
template <int COUNT, int BEGIN = 0, typename X> __device__ __forceinline__ void add_products(float (&sums)[COUNT * 8], X x, u64 w, int accumulate) {
    constexpr int LEFT = COUNT * 16 - BEGIN, N = LEFT >= 128 ? 128 : LEFT >= 64 ? 64 : LEFT >= 48 ? 48 : LEFT >= 32 ? 32 : 16;
    if constexpr (LEFT > 0) {
        multiply_by(*(float (*)[N / 2])(sums + BEGIN / 2), x, along(w, BEGIN * 128), accumulate);
        add_products<COUNT, BEGIN + N>(sums, x, w, accumulate);
    }
}
// The whole strip's sums, and of squares of x in rows g and g + 8.
struct Sums { float d[UNITS * 8], squares[2]; };

// A warpgroup's sums of 64 rows of x from `first_row` on, over the block's TURNth step and every TURNS-th behind it, with
// x from registers, where Σ x² is had on the way.
template <int TURNS, int TURN> __device__ __forceinline__ void take(const Args &a, const Part &p, const Rings &s, int first_row, Sums &sums) {
    u32 even[16], odd[16];
    Ring ring(a.stages);
    auto advance = [](Ring &ring) {
#pragma unroll
        for (int i = 0; i < TURNS; i++) ring.next();
    };
    if (TURN == 1) ring.next();
    Ring next = ring;
    // A warp's 16 rows of a step.
    auto load = [&](u32 (&x)[16]) {
        int lane = threadIdx.x & 31, row = first_row + threadIdx.x % TEAM / 32 * 16 + lane % 16;
        barrier_wait(s.full + 8 * next.stage, next.parity);
#pragma unroll
        for (int j = 0; j < 4; j++)
            load_matrices(*(u32 (*)[4])(x + 4 * j), s.x + next.stage * X_BYTES + row * 128 + ((2 * j + lane / 16 ^ row) & 7) * 16);
        advance(next);
    };
    auto multiply = [&](u32 (&x)[16], u32 (&then)[16], int step) {
        u64 w = factor(s.w + ring.stage * W_BYTES);
        pin(x), pin(sums.d);
        products_begin();
#pragma unroll
        for (int j = 0; j < 4; j++) add_products<UNITS>(sums.d, (const u32 *)(x + 4 * j), along(w, j * 32), step + j > TURN);
        products_commit();
        if (step + TURNS < p.steps) load(then);
#pragma unroll
        for (int i = 0; NORM && i < 16; i++) sums.squares[i % 2] += low_half(x[i]) * low_half(x[i]) + high_half(x[i]) * high_half(x[i]);
        products_wait<0>();
        pin(x), pin(sums.d);
        warp_arrives(s.free + 8 * ring.stage);
        advance(ring);
    };
    // Each block has a step.
    if (TURNS == 1 || TURN < p.steps) load(even);
    for (int step = TURN; step < p.steps; step += 2 * TURNS) {
        multiply(even, odd, step);
        if (step + TURNS < p.steps) multiply(odd, even, step + TURNS);
    }
#pragma unroll
    for (int h = 0; NORM && h < 2; h++) {
        float &sum = sums.squares[h];
        sum += __shfl_xor_sync(~0u, sum, 1), sum += __shfl_xor_sync(~0u, sum, 2);
    }
}

template <int COUNT> __device__ __forceinline__ void of_unit(float (&sums)[8], const float (&all)[COUNT], int unit) {
#pragma unroll
    for (int i = 0; i < 8; i++) sums[i] = all[unit * 8 + i];
}
__device__ __forceinline__ void add_half(float (&sums)[8], int half, uint4 more) {
    sums[4 * half] += __uint_as_float(more.x), sums[4 * half + 1] += __uint_as_float(more.y);
    sums[4 * half + 2] += __uint_as_float(more.z), sums[4 * half + 3] += __uint_as_float(more.w);
}

// Whether a warp has rows of x.
__device__ __forceinline__ bool has_rows(const Args &a) { return int(threadIdx.x) % TEAM / 32 * 16 < a.rows; }
// What norms two rows, of so many squares.
__device__ __forceinline__ float2 factors_of(const Args &a, float low, float high) {
    return NORM ? make_float2(rsqrtf(low / a.k_total + a.eps), rsqrtf(high / a.k_total + a.eps)) : make_float2(1.f, 1.f);
}
