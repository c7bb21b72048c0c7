// out[m, n] = Σ_k x[m, k] · w[n, k] for some dozens of rows m, where little counts but how fast w is read, on compute
// capability 9.0: what `strip.cu`, `strip_short.cu` and `strip_tall.cu` have in common.
//
// A block has a strip of w: UNITS units of 16 rows (gated: 8 of the gate and 8 of up), so many that nearly every
// multiprocessor has one. It walks along k in steps of 64 elements, of w and of x together, which comes from L2:
// the higher the strip, the fewer bytes of x a byte of w. A warp fetches w of steps ahead, of the first ones before
// the kernels in front are done, another one x. Two warpgroups multiply.
//
// What is done once is kept short: each instruction of a warp that has its scheduler nearly to itself takes some 4 ns. So
// sums go to shared memory as they are, and what makes results of them is a loop over pieces of rows.
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

struct Args {
    const float *bias; bf16 *out;
    // x_bytes: of a step of x. Rows that are not there are not asked for: zeros in their place take the copy engine longer
    // than rows do.
    int rows, n_total, k_total, stages, x_bytes, add_to, gelu;
    // x may be in two lots of so many rows, the second of which clusters behind those of all strips have.
    int strips, lot_rows;
    float eps, inverse_k;
};

// What this block has of the product: the cluster's strip and lot, and of these `steps` steps of k from `first` on.
struct Part {
    int rank, strip, first_row, first, steps;
    __device__ explicit Part(const Args &a) : rank(BLOCKS > 1 ? cluster_rank() : 0) {
        int cluster = blockIdx.x / BLOCKS, all = (a.k_total + STEP - 1) / STEP;
        bool second = cluster >= a.strips;
        strip = second ? cluster - a.strips : cluster, first_row = second ? a.lot_rows : 0;
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
    // One thread's. Two threads fetch each step, and so many warps read it.
    __device__ void init(const Args &a, int readers) const {
        for (int i = 0; i < a.stages; i++) barrier_init(full + 8 * i, 2), barrier_init(free + 8 * i, ARRIVALS(readers));
        publish_barriers();
    }
};

// One thread's: copies of so many bytes for each step. Blocks begin at different steps, so that they do not all ask for the
// same lines of x at once.
template <typename Copy> __device__ __forceinline__ void fetch(const Args &a, const Part &p, const Rings &s, u32 bytes, Copy copy) {
    int step = (p.strip & 7) < p.steps ? p.strip & 7 : 0;
    Ring ring(a.stages);
    for (int i = 0; i < p.steps; i++, ring.next()) {
        u32 barrier = s.full + 8 * ring.stage;
        if (i >= a.stages) barrier_wait(s.free + 8 * ring.stage, ring.parity ^ 1);
        barrier_expect(barrier, bytes);
        copy(ring.stage, (p.first + step) * STEP, barrier);
        if (++step == p.steps) step = 0;
    }
}
// x comes as soon as it is there, wherever w has come to: each is fetched by a warp's first thread.
__device__ __forceinline__ void fetch_w(const Args &a, const TensorMap &w, const Part &p, const Rings &s) {
    u64 once = read_once();
    fetch(a, p, s, W_BYTES, [&](int stage, int k, u32 barrier) {
        fetch_groups(s.w + stage * W_BYTES, w, barrier, k, p.strip * UNITS * (COLUMNS / 8), once);
    });
}
__device__ __forceinline__ void fetch_x(const Args &a, const TensorMap &x, const Part &p, const Rings &s) {
    prefetch_map(x);
    wait_for_previous();
    fetch(a, p, s, a.x_bytes, [&](int stage, int k, u32 barrier) { fetch_box(s.x + stage * X_BYTES, x, barrier, k, p.first_row); });
}

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

// A warpgroup's sums of 64 rows of x from `first_row` on, over the block's `turn`th step and every TURNS-th behind it, with
// x from registers, where Σ x² is had on the way: x · xᵀ has it in its diagonal, of which the tensor cores give two quarters.
template <int TURNS> __device__ __forceinline__ void take(const Args &a, const Part &p, const Rings &s, int turn, int first_row, Sums &sums) {
    u32 even[16], odd[16];
    float low[4] = {}, high[4] = {};
    Ring ring(a.stages);
    auto advance = [](Ring &ring) {
#pragma unroll
        for (int i = 0; i < TURNS; i++) ring.next();
    };
    if (turn == 1) ring.next();
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
        for (int j = 0; j < 4; j++) add_products<UNITS>(sums.d, (const u32 *)(x + 4 * j), along(w, j * 32), 1);
        products_commit();
        if (step + TURNS < p.steps) load(then);
#pragma unroll
        for (int j = 0; NORM && j < 16; j += 4) {
            mma(low, x[j], x[j + 1], x[j + 2], x[j + 3], x[j], x[j + 2]);
            mma(high, x[j], x[j + 1], x[j + 2], x[j + 3], x[j + 1], x[j + 3]);
        }
        products_wait<0>();
        pin(x), pin(sums.d);
        warp_arrives(s.free + 8 * ring.stage);
        advance(ring);
    };
    // Each block has a step.
    if (TURNS == 1 || turn < p.steps) load(even);
    for (int step = turn; step < p.steps; step += 2 * TURNS) {
        multiply(even, odd, step);
        if (step + TURNS < p.steps) multiply(odd, even, step + TURNS);
    }
    // Row g's is with the lane that has column g of it.
    int g = (threadIdx.x & 31) / 4, lane = 4 * g + g / 2;
    sums.squares[0] = __shfl_sync(~0u, g & 1 ? low[1] : low[0], lane);
    sums.squares[1] = __shfl_sync(~0u, g & 1 ? high[3] : high[2], lane);
}

// What norms a row, of so many squares.
__device__ __forceinline__ float norm_factor(const Args &a, float squares) { return NORM ? rsqrtf(squares * a.inverse_k + a.eps) : 1.f; }

// A single block's sums on their way out, in shared memory: [part][row] of all columns, rows so far apart that neither
// their writers nor their readers meet in a bank; and the squares of rows, [part][X_ROWS].
#define ROW_BYTES ((UNITS * 16 + 8) * 4)
struct Outbox {
    u32 rows;
    float *squares;

    // A thread's sums of units from `unit` on, in rows `row` and `row + 8`: see `Product`.
    template <int COUNT> __device__ __forceinline__ void put(int part, int row, int unit, const float (&sums)[COUNT]) const {
        u32 to = rows + (part * X_ROWS + row) * ROW_BYTES + unit * 64 + (threadIdx.x & 3) * 8;
#pragma unroll
        for (int i = 0; i < COUNT; i += 2) store_shared(to + i / 2 % 2 * 8 * ROW_BYTES + i / 4 * 32, sums[i], sums[i + 1]);
    }
    __device__ __forceinline__ void put_squares(int part, int row, const float (&sums)[2]) const {
        if (!NORM || threadIdx.x & 3) return;
        squares[part * X_ROWS + row] = sums[0], squares[part * X_ROWS + row + 8] = sums[1];
    }

    // One of 8 warps', which adds up PARTS parts of its rows and stores these, a piece of 8 columns at once.
    template <int PARTS> __device__ __forceinline__ void store(const Args &a, int strip) const {
        constexpr int ROWS = X_ROWS / 8, PIECES = UNITS * COLUMNS / 8, SUMS = GATED ? 16 : 8;
#pragma unroll 1
        for (int i = threadIdx.x & 31; i < ROWS * PIECES; i += 32) {
            int row = threadIdx.x / 32 * ROWS + i / PIECES, piece = i % PIECES, column = (strip * PIECES + piece) * 8;
            if (row >= a.rows || column >= a.n_total) continue;
            float sums[SUMS] = {}, square = 0.f;
#pragma unroll
            for (int part = 0; part < PARTS; part++) {
#pragma unroll
                for (int j = 0; j < SUMS; j += 4) {
                    uint4 more = load_shared_16(rows + (part * X_ROWS + row) * ROW_BYTES + (piece * SUMS + j) * 4);
                    sums[j] += __uint_as_float(more.x), sums[j + 1] += __uint_as_float(more.y);
                    sums[j + 2] += __uint_as_float(more.z), sums[j + 3] += __uint_as_float(more.w);
                }
                if (NORM) square += squares[part * X_ROWS + row];
            }
            float factor = norm_factor(a, square);
#pragma unroll
            for (int j = 0; j < SUMS; j++) sums[j] *= factor;
            if (a.bias) {
#pragma unroll
                for (int j = 0; j < SUMS; j++) sums[j] += a.bias[j / 8 * a.n_total + column + j % 8];
            }
            uint4 *to = (uint4 *)(a.out + (long long)row * a.n_total + column);
            if (GATED) {
#pragma unroll
                for (int j = 0; j < 8; j++) sums[j] = activate(sums[j], a.gelu) * sums[SUMS - 8 + j];
            } else if (a.add_to) {
                uint4 before = *to;
                const u32 *pairs = (const u32 *)&before;
#pragma unroll
                for (int j = 0; j < 8; j += 2) sums[j] += low_half(pairs[j / 2]), sums[j + 1] += high_half(pairs[j / 2]);
            }
            *to = {pack(sums[0], sums[1]), pack(sums[2], sums[3]), pack(sums[4], sums[5]), pack(sums[6], sums[7])};
        }
    }
};

// ---- a cluster: each block sends its sums of every BLOCKSth unit of a warp's to the block that stores it ----

// A warp's 16 rows of x and a unit. A thread has 8 sums: [half of the unit][row g or g + 8][column 2t or 2t + 1].
struct Corner {
    int row, column;
    __device__ Corner(int row, int unit) : row(row), column(unit * COLUMNS + 2 * (threadIdx.x & 3)) {}

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

// What comes from the cluster's blocks: sums [from][place][half of a unit][thread] 4, where a warp has SHARE units at most
// of those that a block stores; and squares [from][X_ROWS].
template <int SHARE> struct Inbox {
    u32 memory, arrived;
    float *squares;
    int rank;

    __device__ __forceinline__ u32 at(int from, int place, int half) const {
        return memory + (((from * SHARE + place) * 2 + half) * 2 * TEAM + threadIdx.x) * 16;
    }
    // What comes of so many units, each of which a warp of another block sends for each 16 rows.
    __device__ __forceinline__ u32 bytes(const Args &a, int units) const {
        return (BLOCKS - 1) * units * ((a.rows + 15) / 16) * 32 * 2 * 16 + (NORM ? BLOCKS * X_ROWS * 4 : 0);
    }
    __device__ __forceinline__ void send_square(int row, float square, int to) const {
        send(address_in(shared_address(squares + rank * X_ROWS + row), to), address_in(arrived, to), square);
    }
    // Sends a warp's sums of units from `unit` on, and adds up and stores what is this block's.
    template <int COUNT> __device__ __forceinline__ void exchange(const Args &a, int row, int unit, const float (&sums)[COUNT], int units) const {
        bool mine = (row & ~15) < a.rows;
        float before[SHARE][8];
        auto stored = [&](int place) { return place * BLOCKS + rank; };
#pragma unroll
        for (int place = 0; place < SHARE; place++)
            if (stored(place) < COUNT / 8) Corner(row, unit + stored(place)).load(a, before[place]);
        // Each block to another one at a time; what is its own a thread only leaves for itself.
#pragma unroll
        for (int turn = 0; turn < BLOCKS; turn++) {
            int to = (rank + turn) % BLOCKS;
            u32 there = address_in(memory, to) - memory, barrier = address_in(arrived, to);
#pragma unroll
            for (int i = 0; i < COUNT; i += 4) {
                if (!mine || i / 8 % BLOCKS != to) continue;
                u32 place = at(rank, i / 8 / BLOCKS, i / 4 % 2);
                if (turn == 0) store_shared(place, sums[i], sums[i + 1], sums[i + 2], sums[i + 3]);
                else send(there + place, barrier, sums[i], sums[i + 1], sums[i + 2], sums[i + 3]);
            }
        }
        if (units) barrier_wait_for_cluster(arrived, 0);
        if (!mine) return;
        float low = 0.f, high = 0.f;
#pragma unroll
        for (int from = 0; NORM && from < BLOCKS; from++) low += squares[from * X_ROWS + row], high += squares[from * X_ROWS + row + 8];
        float2 factors = make_float2(norm_factor(a, low), norm_factor(a, high));
#pragma unroll
        for (int place = 0; place < SHARE; place++) {
            if (stored(place) >= COUNT / 8) break;
            float total[8] = {};
#pragma unroll
            for (int i = 0; i < 2 * BLOCKS; i++) {
                uint4 more = load_shared_16(at(i / 2, place, i % 2));
                float *half = total + i % 2 * 4;
                half[0] += __uint_as_float(more.x), half[1] += __uint_as_float(more.y), half[2] += __uint_as_float(more.z), half[3] += __uint_as_float(more.w);
            }
            Corner(row, unit + stored(place)).store(a, total, before[place], factors);
        }
    }
};
