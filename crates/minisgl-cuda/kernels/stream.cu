// out[m, n] = Σ_k x[m, k] · w[n, k] for up to 16 rows m, on compute capability 9.0 and up: what
// `gemv.cu` computes, with the weights on their way through shared memory.
//
// A block walks tiles of 8 · TILES rows of w (gated: 8 of the gate and 8 of up). Its ninth warp copies
// them, 512 elements of each row a stage, as many stages ahead as there is room for: the first ones
// before the kernels ahead are done, so that memory never rests between two products. Eight warps take
// as many elements of each stage. Lane (g, t) reads 16 bytes of row g: with rows 64 bytes further apart than
// their lengths, a quarter warp's reads hit all banks. As in `gemv.cu`, the order of k inside a chunk
// of 32 is permuted alike for x and w, and a norm's factor is applied to the sums.

// Logits have long copies: the bulk copy engine takes its time for each of them, and there are many.
#define CHUNK (OUT_F32 ? 128 : 64)
#define WARPS 8
#define STAGE (WARPS * CHUNK)
#define ROW_BYTES (STAGE * 2 + 64)
#define STAGE_BYTES (TILES * 8 * ROW_BYTES)
#define ROWS (HALVES * 8)
// Stages whose x is loaded at once.
#define AHEAD ((HALVES == 1 ? 3 : 2) - OUT_F32)
// Pieces of 32 elements of a warp's part of a stage.
#define PIECES (CHUNK / 32)

#if OUT_F32
typedef float O;
#else
typedef T O;
#endif

struct Args {
    const bf16 *x; const bf16 *w; const float *norm; const float *bias; O *out;
    int rows, n_total, k_total, stages, add_to, gelu;
    float eps, shift;
};

#define COLUMNS (GATED ? 8 : TILES * 8)

// Row `i` of a tile's rows of w.
__device__ __forceinline__ int row_of(const Args &a, int tile, int i) {
    int n = tile * COLUMNS + (GATED ? i & 7 : i);
    return (GATED && i >= 8 ? a.n_total : 0) + min(n, a.n_total - 1);
}

struct Ring {
    u32 memory, full, free;
    int stages, stage = 0, parity = 0;
    __device__ void next() {
        if (++stage == stages) stage = 0, parity ^= 1;
    }
};

__device__ __forceinline__ void fetch(const Args &a, int tiles, Ring ring) {
    int lane = threadIdx.x & 31;
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        const bf16 *row = a.w + (long long)row_of(a, tile, lane % (TILES * 8)) * a.k_total;
        for (int k = 0; k < a.k_total; k += STAGE, ring.next()) {
            barrier_wait(ring.free + 8 * ring.stage, ring.parity ^ 1);
            u32 bytes = min(STAGE, a.k_total - k) * 2;
            if (lane == 0) barrier_expect(ring.full + 8 * ring.stage, bytes * TILES * 8);
            __syncwarp();
            if (lane < TILES * 8)
                fetch_bytes_once(ring.memory + ring.stage * STAGE_BYTES + lane * ROW_BYTES, row + k, bytes, ring.full + 8 * ring.stage);
        }
    }
}

extern "C" __global__ void __launch_bounds__(32 * (WARPS + 1), HALVES == 1 ? 3 : 2) stream(const Args a) {
    extern __shared__ __align__(128) unsigned char memory[];
    // Stages of w, then the norm's weights.
    __shared__ u64 barrier_words[2 * 16];
    // By turns, so that a tile's are read while the next one's come.
    __shared__ float all_sums[2][WARPS][TILES][ROWS][8];
    __shared__ float all_squares[WARPS][ROWS];
    let_next_start();
    int warp = threadIdx.x / 32, lane = threadIdx.x & 31, g = lane / 4, t = lane & 3;
    u32 first_barrier = shared_address(barrier_words);
    Ring ring = {shared_address(memory), first_barrier, first_barrier + 8 * a.stages, a.stages};
    int tiles = (a.n_total + COLUMNS - 1) / COLUMNS;
    float *norm = (float *)(memory + a.stages * STAGE_BYTES);
    if (threadIdx.x == 0) {
        for (int i = 0; i < a.stages; i++) barrier_init(ring.full + 8 * i, 1), barrier_init(ring.free + 8 * i, ARRIVALS(WARPS));
        publish_barriers();
    }
    __syncthreads();
    if (warp == WARPS) {
        fetch(a, tiles, ring);
        wait_for_previous();
        return;
    }
    if (NORM) {
        for (int i = threadIdx.x * 4; i < a.k_total; i += WARPS * 128) *(float4 *)(norm + i) = __ldg((const float4 *)(a.norm + i));
        named_barrier(1, WARPS * 32);
    }
    wait_for_previous();

    int steps = (a.k_total + STAGE - 1) / STAGE, turn = 0;
    // x times the norm's weights, and the squares of x.
    u32 x[AHEAD][PIECES][HALVES][4];
    float squares[HALVES] = {};
    auto load_x = [&](int first) {
#pragma unroll
        for (int i = 0; i < AHEAD; i++)
#pragma unroll
            for (int s = 0; s < PIECES; s++)
#pragma unroll
                for (int h = 0; h < HALVES; h++) {
                    int row = h * 8 + g, k = (first + i) * STAGE + warp * CHUNK + s * 32 + t * 8;
                    uint4 value = make_uint4(0, 0, 0, 0);
                    if (row < a.rows && k < a.k_total) value = *(const uint4 *)(a.x + (long long)row * a.k_total + k);
                    x[i][s][h][0] = value.x, x[i][s][h][1] = value.y, x[i][s][h][2] = value.z, x[i][s][h][3] = value.w;
                }
#pragma unroll
        for (int i = 0; NORM && i < AHEAD; i++)
#pragma unroll
            for (int s = 0; s < PIECES; s++) {
                int k = (first + i) * STAGE + warp * CHUNK + s * 32 + t * 8;
                if (k >= a.k_total) continue;
                float4 n0 = *(const float4 *)(norm + k), n1 = *(const float4 *)(norm + k + 4);
                const float scale[8] = {n0.x, n0.y, n0.z, n0.w, n1.x, n1.y, n1.z, n1.w};
#pragma unroll
                for (int h = 0; h < HALVES; h++)
#pragma unroll
                    for (int p = 0; p < 4; p++) {
                        u32 &pair = x[i][s][h][p];
                        float low = low_half(pair), high = high_half(pair);
                        squares[h] += low * low + high * high;
                        pair = pack(low * (scale[2 * p] + a.shift), high * (scale[2 * p + 1] + a.shift));
                    }
            }
    };
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x, turn ^= 1) {
        bool is_first = tile == blockIdx.x;
        float acc[TILES][4] = {};
        for (int first = 0; first < steps; first += AHEAD) {
            // What holds all of x holds it for all tiles.
            if (is_first || steps > AHEAD) load_x(first);
#pragma unroll
            for (int i = 0; i < AHEAD; i++) {
                int step = first + i;
                if (step >= steps) break;
                barrier_wait(ring.full + 8 * ring.stage, ring.parity);
#pragma unroll
                for (int s = 0; s < PIECES; s++) {
                    int inside = warp * CHUNK + s * 32 + t * 8;
                    const u32 (&low)[4] = x[i][s][0], (&high)[4] = x[i][s][HALVES - 1];
#pragma unroll
                    for (int j = 0; j < TILES; j++) {
                        uint4 w = make_uint4(0, 0, 0, 0);
                        if (step * STAGE + inside < a.k_total) w = *(const uint4 *)(memory + ring.stage * STAGE_BYTES + (j * 8 + g) * ROW_BYTES + inside * 2);
                        mma(acc[j], low[0], HALVES == 2 ? high[0] : 0, low[1], HALVES == 2 ? high[1] : 0, w.x, w.y);
                        mma(acc[j], low[2], HALVES == 2 ? high[2] : 0, low[3], HALVES == 2 ? high[3] : 0, w.z, w.w);
                    }
                }
                warp_arrives(ring.free + 8 * ring.stage);
                ring.next();
            }
        }

        auto &sums = all_sums[turn];
#pragma unroll
        for (int h = 0; h < HALVES; h++) {
            int row = h * 8 + g;
#pragma unroll
            for (int j = 0; j < TILES; j++)
                *(float2 *)&sums[warp][j][row][2 * t] = make_float2(acc[j][2 * h], acc[j][2 * h + 1]);
            if (NORM && is_first) {
                float q = squares[h];
                q += __shfl_xor_sync(~0u, q, 1);
                q += __shfl_xor_sync(~0u, q, 2);
                if (t == 0) all_squares[warp][row] = q;
            }
        }
        named_barrier(1, WARPS * 32);
        for (int i = threadIdx.x; i < a.rows * COLUMNS; i += WARPS * 32) {
            int row = i / COLUMNS, column = i % COLUMNS, n = tile * COLUMNS + column;
            if (n >= a.n_total) continue;
            float total[2] = {}, factor = 1.f;
#pragma unroll
            for (int j = 0; j < (GATED ? 2 : 1); j++)
#pragma unroll
                for (int v = 0; v < WARPS; v++) total[j] += sums[v][GATED ? j : column / 8][row][column & 7];
            if (NORM) {
                float q = 0.f;
#pragma unroll
                for (int v = 0; v < WARPS; v++) q += all_squares[v][row];
                factor = rsqrtf(q / a.k_total + a.eps);
            }
            float value = total[0] * factor + (a.bias ? a.bias[n] : 0.f);
            if (GATED) value = activate(value, a.gelu) * (total[1] * factor + (a.bias ? a.bias[a.n_total + n] : 0.f));
            O *to = a.out + (long long)row * a.n_total + n;
            *to = from_float<O>(a.add_to ? to_float(*to) + value : value);
        }
    }
}
