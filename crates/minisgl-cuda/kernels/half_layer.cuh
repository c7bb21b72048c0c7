// Half a decoder layer in one kernel, for up to 8 rows of one token each on compute capability 9.0 (and 10.0,
// where nobody has run it): what `attend.cu` and `mlp.cu` have in common.
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
// All weights of a block are on their way, into its shared memory, its registers or the L2 cache, before the
// kernel in front is done.
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
// Where there are none, `added` has room for one.
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

// Of 16 bytes for the place of `at` in all blocks, this one included, an even lane has the first half and
// the lane behind it the second; both say where their own half goes. Whole warps call it.
__device__ __forceinline__ void send_to_all(const Block &b, bool valid, int at, u32 barrier, uint2 half) {
    uint2 other = make_uint2(__shfl_xor_sync(~0u, half.x, 1), __shfl_xor_sync(~0u, half.y, 1));
    int odd = threadIdx.x & 1;
    uint2 low = odd ? other : half, high = odd ? half : other;
    // Every block begins with another one.
    for (int i = odd; valid && i < CLUSTER; i += 2) {
        int to = (b.rank + i) % CLUSTER;
        send(address_in(b.at(at - 8 * odd), to), address_in(barrier, to), __uint_as_float(low.x),
             __uint_as_float(low.y), __uint_as_float(high.x), __uint_as_float(high.y));
    }
}

// Copies a row of `k` elements. A whole warp.
__device__ __forceinline__ void copy_row(u32 to, const bf16 *from, int k) {
    for (int at = threadIdx.x % 32 * 8; at < k; at += 256) copy_16(to + at * 2, from + at);
}
// Copies `count` rows of `k` elements each to `to`, in strides of STRIDE(k): a group of copies of every thread.
template <typename Row>
__device__ __forceinline__ void fetch_rows(u32 to, int count, int k, Row row) {
    for (int i = threadIdx.x / 32; i < count; i += WARPS) copy_row(to + i * STRIDE(k), row(i), k);
    end_copies();
}

// Sends for what the block reads of the residual stream's norm. A whole warp.
__device__ __forceinline__ void prefetch_norm(const Block &b, const Residual &r) {
    int columns = r.hidden / CLUSTER, at = threadIdx.x % 32 * 32;
    for (; at < columns; at += 1024) prefetch_line(r.norm + b.rank * columns + at);
}

// This block's columns of the residual stream, a warp a row: summed up, and times the norm's weights sent
// to all blocks (to `x`, rows of STRIDE(hidden)), with the sums of their squares (to `squares` [ROWS][CLUSTER]).
__device__ __forceinline__ void share_residual(const Block &b, const Residual &r, int x, int squares, u32 barrier) {
    int row = threadIdx.x / 32, lane = threadIdx.x & 31, columns = r.hidden / CLUSTER;
    if (row >= r.rows) return;
    float squared = 0.f;
    for (int base = 0; base < columns; base += 128) {
        bool valid = base + 4 * lane < columns;
        int i = b.rank * columns + min(base + 4 * lane, columns - 4);
        float4 w = *(const float4 *)(r.norm + i), add[PARTS_MAX];
        uint2 old = *(const uint2 *)(r.x + (long long)row * r.hidden + i);
        // No branches here: a read behind one would wait for the read before it.
#pragma unroll
        for (int p = 0; p < PARTS_MAX; p++)
            add[p] = *(const float4 *)(r.added + ((long long)min(p, max(r.parts - 1, 0)) * r.rows + row) * r.hidden + i);
        float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
        for (int p = 0; p < PARTS_MAX; p++)
            if (p < r.parts) sum.x += add[p].x, sum.y += add[p].y, sum.z += add[p].z, sum.w += add[p].w;
        uint2 now = make_uint2(pack(low_half(old.x) + sum.x, high_half(old.x) + sum.y),
                               pack(low_half(old.y) + sum.z, high_half(old.y) + sum.w));
        if (b.cluster == 0 && valid) *(uint2 *)(r.out + (long long)row * r.hidden + i) = now;
        float4 v = make_float4(low_half(now.x), high_half(now.x), low_half(now.y), high_half(now.y));
        if (valid) squared += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
        uint2 weighted = make_uint2(pack(v.x * (w.x + r.shift), v.y * (w.y + r.shift)),
                                    pack(v.z * (w.z + r.shift), v.w * (w.w + r.shift)));
        send_to_all(b, valid, x + row * STRIDE(r.hidden) + i * 2, barrier, weighted);
    }
    squared = warp_sum(squared);
    int at = squares + (row * CLUSTER + b.rank) * 4;
    if (lane < CLUSTER) send(address_in(b.at(at), lane), address_in(barrier, lane), squared);
}
// The bytes that this sends to a block.
__device__ __forceinline__ u32 residual_bytes(const Residual &r) { return r.rows * (r.hidden * 2 + CLUSTER * 4); }
// What a row's sums are multiplied with.
__device__ __forceinline__ float norm_factor(const Residual &r, const float *squares, int row) {
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < CLUSTER; i++) sum += squares[row * CLUSTER + i];
    return rsqrtf(sum / r.hidden + r.eps);
}

// sum += 16 rows of 32 weights each, of which a lane has 8 of row lane / 4 and 8 of the eighth behind it, times
// as many values of 8 rows. The order of k inside 32 is permuted alike for both, for reads of 16 bytes.
__device__ __forceinline__ void multiply_32(float (&sum)[4], uint4 low, uint4 high, uint4 values) {
    mma(sum, low.x, high.x, low.y, high.y, values.x, values.y);
    mma(sum, low.z, high.z, low.w, high.w, values.z, values.w);
}
// sums[warp][row][m] = the warp's share. m counts through TILES tiles of 16.
template <int TILES> __device__ __forceinline__ void put_sums(const float (&share)[TILES][4], float *sums) {
    int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x & 3;
    float *to = sums + (warp * ROWS + 2 * t) * SUMS_ROW(TILES) + g;
#pragma unroll
    for (int j = 0; j < TILES; j++) {
        to[j * 16] = share[j][0], to[SUMS_ROW(TILES) + j * 16] = share[j][1];
        to[j * 16 + 8] = share[j][2], to[SUMS_ROW(TILES) + j * 16 + 8] = share[j][3];
    }
}
// All warps' shares of m and the three behind it.
template <int TILES> __device__ __forceinline__ float4 total(const float *sums, int row, int m) {
    float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
    for (int warp = 0; warp < WARPS; warp++) {
        float4 more = *(const float4 *)(sums + (warp * ROWS + row) * SUMS_ROW(TILES) + m);
        sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
    }
    return sum;
}
