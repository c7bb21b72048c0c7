// logits[m, n] = Σ_k x[m, k] · w[n, k] in f32 for 17 to 128 rows m, on compute capability 9.0, and with them what
// `survey` of `sample.cu` would read all of them for.
//
// A tile is 128 rows of w by all rows of x, and a block walks tiles. A warp fetches steps of 64 elements of k, of w and of
// x, as many ahead as there is room for: w of the first ones before the kernels in front are done. Two warpgroups have
// tiles by turns: one stores its tile while the other multiplies.

#define TEAM 128
#define TEAMS 2
#define TILE 128
#define STEP 64
#define W_BYTES (TILE * 128)
#define X_BYTES (ROWS * 128)
// Lots of 64 rows of x.
#define LOTS (ROWS / 64)
#define STAGES_MAX 16
// Named barriers, one for each team: that it is its turn.
#define TURN 1

struct Args {
    const float *temperature;
    float *logits;
    // [rows, tiles]: (max, index of it as bits, Σ exp((logit − max) / temperature)).
    float4 *survey;
    int rows, n_total, k_total, stages;
};

// Of a warp: 16 rows of 32 logits on their way out, so far apart that neither their writers nor their readers meet in a bank.
#define OUT_ROW_BYTES (32 * 4 + 16)
#define OUT_BYTES (16 * OUT_ROW_BYTES)

// Rings of steps of w and of x, and their barriers.
struct Rings { u32 w, x, full, free; };

// A block's tiles, and the steps of each. Blocks begin at different ones, so that they do not all ask for the same lines of
// x at once.
struct Walk {
    int tiles, steps, first;
    __device__ explicit Walk(const Args &a) : tiles((a.n_total + TILE - 1) / TILE), steps((a.k_total + STEP - 1) / STEP) {
        first = (blockIdx.x & 7) < steps ? blockIdx.x & 7 : 0;
    }
};

// One thread's: all steps of all tiles.
__device__ __forceinline__ void fetch(const Args &a, const TensorMap &w, const TensorMap &x, const Walk &walk, const Rings &s) {
    Ring ring(a.stages);
    auto fetch_w = [&](int stage, int tile, int step) {
        u32 barrier = s.full + 8 * stage;
        // Rows that are not there are not asked for: zeros in their place take the copy engine longer than rows do.
        barrier_expect(barrier, W_BYTES + a.rows * 128);
        fetch_box(s.w + stage * W_BYTES, w, barrier, step * STEP, tile * TILE);
    };
    auto fetch_x = [&](int stage, int step) { fetch_box(s.x + stage * X_BYTES, x, s.full + 8 * stage, step * STEP, 0); };
    auto next = [&](int step) { return step + 1 == walk.steps ? 0 : step + 1; };
    int ahead = min(a.stages, walk.steps);
    for (int i = 0, step = walk.first; i < ahead; i++, step = next(step)) fetch_w(i, blockIdx.x, step);
    prefetch_map(x);
    wait_for_previous();
    for (int i = 0, step = walk.first; i < ahead; i++, step = next(step)) fetch_x(i, step);
    for (int tile = blockIdx.x, done = 0; tile < walk.tiles; tile += gridDim.x) {
        for (int i = 0, step = walk.first; i < walk.steps; i++, step = next(step), ring.next(), done++) {
            if (done < ahead) continue;
            if (done >= a.stages) barrier_wait(s.free + 8 * ring.stage, ring.parity ^ 1);
            fetch_w(ring.stage, tile, step), fetch_x(ring.stage, step);
        }
    }
}

typedef float Sums[TILE / 2];

// A tile's sums.
__device__ __forceinline__ void sum(const Walk &walk, const Rings &s, Ring &ring, Sums (&d)[LOTS]) {
    u32 last = 0;
    for (int step = 0; step < walk.steps; step++) {
        barrier_wait(s.full + 8 * ring.stage, ring.parity);
        u64 w = factor(s.w + ring.stage * W_BYTES), x = factor(s.x + ring.stage * X_BYTES);
        products_begin();
#pragma unroll
        for (int j = 0; j < 4; j++) {
#pragma unroll
            for (int lot = 0; lot < LOTS; lot++)
                Product<TILE>::shared<0>(d[lot], along(x, lot * 64 * 128 + j * 32), along(w, j * 32), step + j > 0);
        }
        products_commit();
        products_wait<1>();
        if (step) warp_arrives(s.free + 8 * last);
        last = ring.stage, ring.next();
    }
    products_wait<0>();
#pragma unroll
    for (int lot = 0; lot < LOTS; lot++) pin(d[lot]);
    warp_arrives(s.free + 8 * last);
}

// A warp's 16 rows of a tile, from `first_row` on, 32 columns at a time by way of shared memory: whole lines at once.
__device__ __forceinline__ void store(const Args &a, int tile, int first_row, u32 memory, const Sums &d) {
    int lane = threadIdx.x & 31;
#pragma unroll
    for (int part = 0; part < TILE / 32; part++) {
        // The last part is on its way.
        __syncwarp();
#pragma unroll
        for (int i = 0; i < 16; i += 2) {
            int row = lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + 2 * (lane & 3);
            store_shared(memory + row * OUT_ROW_BYTES + column * 4, d[part * 16 + i], d[part * 16 + i + 1]);
        }
        __syncwarp();
        int column = tile * TILE + part * 32 + lane % 8 * 4;
#pragma unroll
        for (int i = 0; i < 16; i += 4) {
            int row = first_row + i + lane / 8;
            uint4 four = load_shared_16(memory + (i + lane / 8) * OUT_ROW_BYTES + lane % 8 * 16);
            if (row < a.rows && column < a.n_total) *(uint4 *)(a.logits + (long long)row * a.n_total + column) = four;
        }
    }
}

// What there is to know of them. A thread has rows g and g + 8.
__device__ __forceinline__ void survey(const Args &a, int tile, int tiles, int first_row, Sums &d) {
    int lane = threadIdx.x & 31, first = tile * TILE + 2 * (lane & 3);
    if (tile * TILE + TILE > a.n_total) {
#pragma unroll
        for (int i = 0; i < TILE / 2; i++)
            if (first + i / 4 * 8 >= a.n_total) d[i] = -infinity();
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
        int row = first_row + lane / 4 + 8 * h;
        float best = -infinity();
        int index = 0x7fffffff;
#pragma unroll
        for (int i = 0; i < TILE / 4; i++) {
            float x = d[i / 2 * 4 + 2 * h + i % 2];
            if (x > best) best = x, index = first + i / 2 * 8 + i % 2;
        }
        float top = fmaxf(best, __shfl_xor_sync(~0u, best, 1));
        top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
        if (best != top) index = 0x7fffffff;
        index = min(index, __shfl_xor_sync(~0u, index, 1));
        index = min(index, __shfl_xor_sync(~0u, index, 2));
        float t = row < a.rows ? a.temperature[row] : 0.f, sum = 0.f;
        if (t > 0.f) {
            float inverse = 1.f / t;
#pragma unroll
            for (int i = 0; i < TILE / 4; i++) {
                float x = d[i / 2 * 4 + 2 * h + i % 2];
                sum += x > -infinity() ? __expf((x - top) * inverse) : 0.f;
            }
        }
        sum += __shfl_xor_sync(~0u, sum, 1), sum += __shfl_xor_sync(~0u, sum, 2);
        if (row < a.rows && (lane & 3) == 0) a.survey[(long long)row * tiles + tile] = make_float4(top, __int_as_float(index), sum, 0.f);
    }
}

extern "C" __global__ void __launch_bounds__((TEAMS + 1) * TEAM, 1)
head(const __grid_constant__ TensorMap w, const __grid_constant__ TensorMap x, const Args a) {
    extern __shared__ unsigned char memory[];
    __shared__ u64 barriers[2 * STAGES_MAX];
    let_next_start();
    Walk walk(a);
    Rings s;
    s.w = (shared_address(memory) + 1023) / 1024 * 1024, s.x = s.w + a.stages * W_BYTES;
    s.full = shared_address(barriers), s.free = s.full + 8 * STAGES_MAX;
    if (threadIdx.x == TEAMS * TEAM) {
        for (int i = 0; i < a.stages; i++) barrier_init(s.full + 8 * i, 1), barrier_init(s.free + 8 * i, ARRIVALS(TEAM / 32));
        publish_barriers();
    }
    __syncthreads();
    if (threadIdx.x >= TEAMS * TEAM) {
        leave_registers<24>();
        if (threadIdx.x == TEAMS * TEAM) fetch(a, w, x, walk, s);
        else wait_for_previous();
        return;
    }
    take_registers<240>();
    Sums d[LOTS];
    Ring ring(a.stages);
    int warp = threadIdx.x / 32, team = warp / 4;
    u32 out = s.x + a.stages * X_BYTES + warp * OUT_BYTES;
    wait_for_previous();
    for (int turn = 0, tile = blockIdx.x; tile < walk.tiles; turn++, tile += gridDim.x) {
        if (turn % TEAMS != team) {
            for (int step = 0; step < walk.steps; step++) ring.next();
            continue;
        }
        // Before, the other team's steps may not be there yet, and a barrier's phase may be taken for one behind it.
        if (turn > 0) named_barrier(TURN + team, TEAMS * TEAM);
        sum(walk, s, ring, d);
        if (tile + gridDim.x < walk.tiles) named_leave(TURN + (1 - team), TEAMS * TEAM);
#pragma unroll
        for (int lot = 0; lot < LOTS; lot++) {
            int row = lot * 64 + warp % 4 * 16;
            store(a, tile, row, out, d[lot]);
            survey(a, tile, walk.tiles, row, d[lot]);
        }
    }
}
