// Half a decoder layer in one kernel, for up to 8 rows of one token each on compute capability 9.0:
// what `attend.cu` and `mlp.cu` have in common.
//
// A step of few rows reads its weights in a fraction of the time that its kernels wait for one another.
// So a layer is two kernels, and inside them blocks meet through each other's shared memory, not
// through launches. A cluster of CLUSTER blocks takes a share of the layer (a KV head with its queries,
// or a part of the MLP's inner features) from the residual stream to its part of what is added to it:
//
//   residual  each block adds the last half layer's parts to its columns, and sends them to all;
//   first     each block has the whole normed row, and multiplies it with its rows of the first matrix;
//   (attend)  attention of the cluster's KV head, its context divided among the blocks;
//   second    each block has all of the cluster's values, and multiplies them with its rows of the
//             second matrix, of which the cluster has some columns: a part of the sum, for the next kernel.
//
// All weights of a block are on their way into its shared memory before the kernel in front is done.
// Blocks send with `st.async`: the receiver's barrier counts the bytes, and nobody waits for a sender.

#define WARPS 8
#define THREADS (32 * WARPS)
#define ROWS 8
// Bytes between rows in shared memory: a quarter warp's 16-byte reads, 64 bytes of two rows, hit all banks.
#define STRIDE(k) ((k) * 2 + 64)
// Floats between rows of sums; twice this is 8 more than a multiple of 32, so that lanes' stores do not meet.
#define SUMS_ROW(tiles) ((tiles) * 16 + 4)
// As many parts as a residual stream has at most.
#define PARTS_MAX 8

// The residual stream: rows of `hidden` in bf16, to which `parts` lots of [rows, hidden] are to be added.
struct Residual {
    const bf16 *x; const float *added; bf16 *out;
    const float *norm;
    int rows, hidden, parts;
    float eps, shift;
};

// Where things are in a block's shared memory, and which block this is.
struct Block {
    unsigned char *memory;
    u32 address;
    int rank, cluster;

    __device__ __forceinline__ u32 at(int offset) const { return address + offset; }
};

__device__ __forceinline__ void send16(u32 there, u32 barrier_there, uint4 x) {
    send(there, barrier_there, __uint_as_float(x.x), __uint_as_float(x.y), __uint_as_float(x.z), __uint_as_float(x.w));
}

// Sends `pieces` of 16 bytes that lie at `offset(piece)` here to the same place in all other blocks.
// All threads of the warps that multiply call it, and have written the pieces before.
template <typename Offset>
__device__ __forceinline__ void send_to_all(const Block &b, int pieces, u32 barrier, Offset offset) {
    named_barrier(1, THREADS);
    for (int i = threadIdx.x; i < pieces * CLUSTER; i += THREADS) {
        int to = i % CLUSTER, at = offset(i / CLUSTER);
        if (to != b.rank) send16(address_in(b.at(at), to), address_in(barrier, to), *(const uint4 *)(b.memory + at));
    }
}

// `count` rows of `k` elements each, a row a lane, to `to` in strides of STRIDE(k). A whole warp.
template <typename Row>
__device__ __forceinline__ void fetch_rows(u32 to, u32 barrier, int count, int k, Row row) {
    int lane = threadIdx.x & 31;
    if (lane == 0) barrier_expect(barrier, count * k * 2);
    __syncwarp();
    for (int i = lane; i < count; i += 32) fetch_bytes(to + i * STRIDE(k), row(i), k * 2, barrier);
}

// This block's columns of the residual stream, a warp a row: summed up, and times the norm's weights sent
// to all blocks (to `x`, rows of STRIDE(hidden)), with the sums of their squares (to `squares` [ROWS][CLUSTER]).
__device__ __forceinline__ void share_residual(const Block &b, const Residual &r, int x, int squares, u32 barrier) {
    int row = threadIdx.x / 32, lane = threadIdx.x & 31, columns = r.hidden / CLUSTER, first = b.rank * columns;
    if (row < r.rows) {
        float sum = 0.f;
        for (int i = first + 2 * lane; i < first + columns; i += 64) {
            float2 w = *(const float2 *)(r.norm + i), add[PARTS_MAX];
            u32 old = *(const u32 *)(r.x + (long long)row * r.hidden + i);
#pragma unroll
            for (int p = 0; p < PARTS_MAX; p++) {
                add[p] = make_float2(0.f, 0.f);
                if (p < r.parts) add[p] = *(const float2 *)(r.added + ((long long)p * r.rows + row) * r.hidden + i);
            }
            float low = 0.f, high = 0.f;
#pragma unroll
            for (int p = 0; p < PARTS_MAX; p++) low += add[p].x, high += add[p].y;
            u32 now = pack(low_half(old) + low, high_half(old) + high);
            low = low_half(now), high = high_half(now);
            if (b.cluster == 0) *(u32 *)(r.out + (long long)row * r.hidden + i) = now;
            sum += low * low + high * high;
            *(u32 *)(b.memory + x + row * STRIDE(r.hidden) + i * 2) = pack(low * (w.x + r.shift), high * (w.y + r.shift));
        }
        sum = warp_sum(sum);
        int at = squares + (row * CLUSTER + b.rank) * 4;
        if (lane == 0) *(float *)(b.memory + at) = sum;
        for (int to = lane; to < CLUSTER; to += 32)
            if (to != b.rank) send(address_in(b.at(at), to), address_in(barrier, to), sum);
    }
    int pieces = columns / 8;
    send_to_all(b, r.rows * pieces, barrier, [&](int piece) {
        return x + piece / pieces * STRIDE(r.hidden) + first * 2 + piece % pieces * 16;
    });
}
// The bytes that this sends to each block.
__device__ __forceinline__ u32 residual_bytes(const Residual &r) {
    return r.rows * (CLUSTER - 1) * (r.hidden / CLUSTER * 2 + 4);
}
// What a row's sums are multiplied with.
__device__ __forceinline__ float norm_factor(const Residual &r, const float *squares, int row) {
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < CLUSTER; i++) sum += squares[row * CLUSTER + i];
    return rsqrtf(sum / r.hidden + r.eps);
}

// sums[warp][row][m] = a warp's share of Σ_k w[m][k] · x[row][k]: every eighth 32 of k. m counts through
// TILES tiles of 16. The order of k inside 32 is permuted alike for both, for reads of 16 bytes.
template <int TILES>
__device__ __forceinline__ void multiply(const unsigned char *w, const unsigned char *x, int k, float *sums) {
    int warp = threadIdx.x / 32, lane = threadIdx.x & 31, g = lane / 4, t = lane & 3;
    float acc[TILES][4] = {};
    for (int chunk = warp; chunk < k / 32; chunk += WARPS) {
        int at = chunk * 64 + t * 16;
        uint4 v = *(const uint4 *)(x + g * STRIDE(k) + at), low[TILES], high[TILES];
#pragma unroll
        for (int j = 0; j < TILES; j++) {
            low[j] = *(const uint4 *)(w + (j * 16 + g) * STRIDE(k) + at);
            high[j] = *(const uint4 *)(w + (j * 16 + g + 8) * STRIDE(k) + at);
        }
#pragma unroll
        for (int j = 0; j < TILES; j++) {
            mma(acc[j], low[j].x, high[j].x, low[j].y, high[j].y, v.x, v.y);
            mma(acc[j], low[j].z, high[j].z, low[j].w, high[j].w, v.z, v.w);
        }
    }
    float *to = sums + (warp * ROWS + 2 * t) * SUMS_ROW(TILES) + g;
#pragma unroll
    for (int j = 0; j < TILES; j++) {
        to[j * 16] = acc[j][0], to[SUMS_ROW(TILES) + j * 16] = acc[j][1];
        to[j * 16 + 8] = acc[j][2], to[SUMS_ROW(TILES) + j * 16 + 8] = acc[j][3];
    }
    named_barrier(1, THREADS);
}
template <int TILES> __device__ __forceinline__ float total(const float *sums, int row, int m) {
    float sum = 0.f;
#pragma unroll
    for (int warp = 0; warp < WARPS; warp++) sum += sums[(warp * ROWS + row) * SUMS_ROW(TILES) + m];
    return sum;
}

// The second product: this block's columns of the cluster's part of what is added to the residual stream.
template <int TILES>
__device__ __forceinline__ void add_later(const Block &b, const Residual &r, const unsigned char *w, const unsigned char *x, int k, float *sums, float *part) {
    multiply<TILES>(w, x, k, sums);
    for (int i = threadIdx.x; i < r.rows * TILES * 16; i += THREADS) {
        int row = i / (TILES * 16), m = i % (TILES * 16);
        part[((long long)b.cluster * r.rows + row) * r.hidden + b.rank * TILES * 16 + m] = total<TILES>(sums, row, m);
    }
}
