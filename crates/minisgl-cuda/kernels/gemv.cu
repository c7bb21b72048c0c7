// out[m, n] = Σ_k x[m, k] · w[n, k] for few rows m: the weights' bytes are all that counts.
//
// With norm: out = rsqrt(mean x² + eps) · Σ_k (x · weight)[m, k] · w[n, k]. The factor in front is
// a row's own, so it is applied to the sums, and Σ x² is gathered on the way: no pass before.
//
// A block owns 8 rows of w (twice that when gated: 8 of the gate, 8 of up), its warps divide k.
// A lane reads 16 bytes of weights straight into the fragment of an mma: the order of k inside a
// chunk of 32 is permuted, the same way for x and w, so that a lane's 8 consecutive elements are
// its elements of two mma steps. `ROWS_16` tiles of 16 rows of x (each of `HALVES` halves of 8).

#ifndef ROW_TILES
#define ROW_TILES 1
#endif
#define N_TILES (GATED ? 2 : 1)
#define CHUNK 64
#define ROWS (ROW_TILES * 16)
// Chunks in flight a warp.
#define STAGES 2

#if OUT_F32
typedef float O;
#else
typedef T O;
#endif

extern "C" __global__ void __launch_bounds__(256)
gemv(const T *x, const T *w, const float *norm, float eps, float shift, const float *bias,
     int rows, int n_total, int k_total, int add_to, int gelu, O *out) {
    let_next_start();
    extern __shared__ float sums[];  // [warps][N_TILES][ROWS][8], then [warps][ROWS] squares
    int warp = threadIdx.x / 32, lane = threadIdx.x & 31, g = lane / 4, t = lane & 3;
    int warps = blockDim.x / 32, n0 = blockIdx.x * 8;
    int chunks = (k_total + CHUNK - 1) / CHUNK;
    bool has_n = n0 + g < n_total;
    const T *w_row[N_TILES];
#pragma unroll
    for (int j = 0; j < N_TILES; j++)
        w_row[j] = w + (long long)(j * n_total + (has_n ? n0 + g : 0)) * k_total;

    float acc[N_TILES][ROW_TILES][4] = {};
    float squares[ROW_TILES][2] = {};
    uint4 held[STAGES][2][N_TILES], held_x[STAGES][2][ROW_TILES][HALVES];
    const uint4 zero = make_uint4(0, 0, 0, 0);
    auto load_w = [&](int stage, int chunk) {
#pragma unroll
        for (int s = 0; s < 2; s++) {
            int k = chunk * CHUNK + s * 32 + t * 8;
#pragma unroll
            for (int j = 0; j < N_TILES; j++)
                held[stage][s][j] = has_n && k < k_total ? load_weights(w_row[j] + k) : zero;
        }
    };
    auto load_x = [&](int stage, int chunk) {
#pragma unroll
        for (int s = 0; s < 2; s++) {
            int k = chunk * CHUNK + s * 32 + t * 8;
#pragma unroll
            for (int m = 0; m < ROW_TILES; m++)
#pragma unroll
                for (int h = 0; h < HALVES; h++) {
                    int row = m * 16 + h * 8 + g;
                    held_x[stage][s][m][h] = row < rows && k < k_total ? *(const uint4 *)(x + (long long)row * k_total + k) : zero;
                }
        }
    };
#pragma unroll
    for (int stage = 0; stage < STAGES; stage++) load_w(stage, warp + stage * warps);
    wait_for_previous();
#pragma unroll
    for (int stage = 0; stage < STAGES; stage++) load_x(stage, warp + stage * warps);
    for (int first = warp; first < chunks; first += STAGES * warps) {
#pragma unroll
        for (int stage = 0; stage < STAGES; stage++) {
            int chunk = first + stage * warps;
#pragma unroll
            for (int s = 0; s < 2; s++) {
                int k = chunk * CHUNK + s * 32 + t * 8;
                float scale[8] = {};
                if (NORM && k < k_total) {
                    float4 s0 = __ldg((const float4 *)(norm + k)), s1 = __ldg((const float4 *)(norm + k + 4));
                    scale[0] = s0.x + shift, scale[1] = s0.y + shift, scale[2] = s0.z + shift, scale[3] = s0.w + shift;
                    scale[4] = s1.x + shift, scale[5] = s1.y + shift, scale[6] = s1.z + shift, scale[7] = s1.w + shift;
                }
#pragma unroll
                for (int m = 0; m < ROW_TILES; m++) {
                    u32 a[2][4] = {};
#pragma unroll
                    for (int h = 0; h < HALVES; h++) {
                        uint4 v = held_x[stage][s][m][h];
                        a[h][0] = v.x, a[h][1] = v.y, a[h][2] = v.z, a[h][3] = v.w;
                        if (NORM) {
#pragma unroll
                            for (int p = 0; p < 4; p++) {
                                float lo = low_half(a[h][p]), hi = high_half(a[h][p]);
                                squares[m][h] += lo * lo + hi * hi;
                                a[h][p] = pack(lo * scale[2 * p], hi * scale[2 * p + 1]);
                            }
                        }
                    }
#pragma unroll
                    for (int j = 0; j < N_TILES; j++) {
                        mma(acc[j][m], a[0][0], a[1][0], a[0][1], a[1][1], held[stage][s][j].x, held[stage][s][j].y);
                        mma(acc[j][m], a[0][2], a[1][2], a[0][3], a[1][3], held[stage][s][j].z, held[stage][s][j].w);
                    }
                }
            }
            load_w(stage, chunk + STAGES * warps);
            load_x(stage, chunk + STAGES * warps);
        }
    }

    float *all_squares = sums + warps * N_TILES * ROWS * 8;
#pragma unroll
    for (int m = 0; m < ROW_TILES; m++)
#pragma unroll
        for (int h = 0; h < HALVES; h++) {
            int row = m * 16 + h * 8 + g;
#pragma unroll
            for (int j = 0; j < N_TILES; j++)
                *(float2 *)&sums[((warp * N_TILES + j) * ROWS + row) * 8 + 2 * t] =
                    make_float2(acc[j][m][2 * h], acc[j][m][2 * h + 1]);
            if (NORM) {
                float q = squares[m][h];
                q += __shfl_xor_sync(~0u, q, 1);
                q += __shfl_xor_sync(~0u, q, 2);
                if (t == 0) all_squares[warp * ROWS + row] = q;
            }
        }
    __syncthreads();
    for (int i = threadIdx.x; i < rows * 8; i += blockDim.x) {
        int row = i / 8, n = n0 + (i & 7);
        if (n >= n_total) continue;
        float total[N_TILES] = {};
#pragma unroll
        for (int j = 0; j < N_TILES; j++)
            for (int v = 0; v < warps; v++) total[j] += sums[((v * N_TILES + j) * ROWS + row) * 8 + (i & 7)];
        if (NORM) {
            float q = 0.f;
            for (int v = 0; v < warps; v++) q += all_squares[v * ROWS + row];
            float factor = rsqrtf(q / k_total + eps);
#pragma unroll
            for (int j = 0; j < N_TILES; j++) total[j] *= factor;
        }
        if (bias) {
#pragma unroll
            for (int j = 0; j < N_TILES; j++) total[j] += bias[j * n_total + n];
        }
        O *to = out + (long long)row * n_total + n;
        float value = total[0];
#if GATED
        value = activate(total[0], gelu) * total[1];
#endif
        *to = from_float<O>(add_to ? to_float(*to) + value : value);
    }
}
