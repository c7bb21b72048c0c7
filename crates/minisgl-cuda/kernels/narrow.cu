// out[m, n] = Σ_k x[m, k] · w[n, k] for some dozens of rows m, on compute capability 9.0: too many for
// `stream.cu`, too few to fill the card with tiles of a large product.
//
// The product is taken the other way round: 64 rows of w are the first factor (gated: 32 of the gate,
// 32 of up), all rows of x the second. A cluster of blocks has such a tile and divides k among its
// blocks; then each sums what all have for its share of m, reading the others' shared memory.
// A ninth warp fetches stages of 128 elements of k: [w, x][half][row][64], rows of 128 bytes in the
// 128-byte swizzle, where a half is what one of the two warpgroups takes. The first stages' weights
// are under way before the kernels ahead are done.

#ifndef GATED
#define GATED 0
#endif
#define STAGE 128
#define W_BYTES (64 * 128)
#define X_BYTES (ROWS * 128)
#define STAGE_BYTES (2 * (W_BYTES + X_BYTES))
// Floats between two m in the partial sums: the lanes of a warp write to different banks.
#define STRIDE 68
#define COLUMNS (GATED ? 32 : 64)

#if OUT_F32
typedef float O;
#else
typedef T O;
#endif

struct Args {
    const float *bias; O *out;
    int rows, n_total, k_total, stages, add_to, gelu;
};

__device__ __forceinline__ u32 cluster_rank() { u32 r; asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r)); return r; }
__device__ __forceinline__ u32 cluster_size() { u32 r; asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(r)); return r; }
__device__ __forceinline__ void cluster_barrier() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// Four floats at the same place in block `rank` of the cluster.
__device__ __forceinline__ float4 load_remote(u32 address, u32 rank) {
    u32 there;
    float4 x;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
    asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w) : "r"(there) : "memory");
    return x;
}

__device__ __forceinline__ void fetch(const Args &a, const TensorMap &w, const TensorMap &x, int tile, int first, int last, u32 ring, u32 full, u32 free) {
    auto fetch_w = [&](int step, int stage) {
        u32 to = ring + stage * STAGE_BYTES, barrier = full + 8 * stage;
        for (int half = 0; half < 2; half++) {
            int k = step * STAGE + half * 64;
            fetch_box(to + half * W_BYTES, w, barrier, k, tile * COLUMNS);
            if (GATED) fetch_box(to + half * W_BYTES + W_BYTES / 2, w, barrier, k, a.n_total + tile * COLUMNS);
        }
    };
    auto fetch_x = [&](int step, int stage) {
        for (int half = 0; half < 2; half++)
            fetch_box(ring + stage * STAGE_BYTES + 2 * W_BYTES + half * X_BYTES, x, full + 8 * stage, step * STAGE + half * 64, 0);
    };
    int ahead = min(a.stages, last - first);
    for (int i = 0; i < ahead; i++) barrier_expect(full + 8 * i, STAGE_BYTES), fetch_w(first + i, i);
    wait_for_previous();
    for (int i = 0; i < ahead; i++) fetch_x(first + i, i);
    for (int step = first + ahead; step < last; step++) {
        int stage = (step - first) % a.stages, turn = (step - first) / a.stages;
        barrier_wait(free + 8 * stage, turn & 1 ^ 1);
        barrier_expect(full + 8 * stage, STAGE_BYTES);
        fetch_w(step, stage), fetch_x(step, stage);
    }
}

// Sums over blocks and warpgroups; stores this block's share of m.
__device__ __forceinline__ void finish(const Args &a, int tile, u32 sums, u32 rank, u32 blocks) {
    int share = (a.rows + blocks - 1) / blocks, to_row = min(a.rows, int(rank + 1) * share);
    const int quads = COLUMNS / 4;
    for (int i = threadIdx.x; i < share * quads; i += 256) {
        int row = rank * share + i / quads, quad = i % quads, n = tile * COLUMNS + quad * 4;
        if (row >= to_row || n >= a.n_total) continue;
        float total[2][4] = {};
        for (u32 block = 0; block < blocks; block++)
#pragma unroll
            for (int part = 0; part < 2; part++)
#pragma unroll
                for (int j = 0; j < 1 + GATED; j++) {
                    float4 x = load_remote(sums + ((part * ROWS + row) * STRIDE + j * 32 + quad * 4) * 4, block);
                    total[j][0] += x.x, total[j][1] += x.y, total[j][2] += x.z, total[j][3] += x.w;
                }
        O *to = a.out + (long long)row * a.n_total + n;
#pragma unroll
        for (int c = 0; c < 4; c++) {
            if (n + c >= a.n_total) break;
            float value = total[0][c] + (a.bias ? a.bias[n + c] : 0.f);
            if (GATED) value = activate(value, a.gelu) * (total[1][c] + (a.bias ? a.bias[a.n_total + n + c] : 0.f));
            to[c] = from_float<O>(a.add_to ? to_float(to[c]) + value : value);
        }
    }
}

extern "C" __global__ void __launch_bounds__(288, 1)
narrow(const __grid_constant__ TensorMap w, const __grid_constant__ TensorMap x, const Args a) {
    extern __shared__ unsigned char memory[];
    __shared__ u64 barrier_words[2 * 8];
    let_next_start();
    u32 ring = (shared_address(memory) + 1023) / 1024 * 1024;
    u32 full = shared_address(barrier_words), free = full + 8 * a.stages;
    u32 rank = cluster_rank(), blocks = cluster_size();
    int tile = blockIdx.x / blocks, steps = (a.k_total + STAGE - 1) / STAGE;
    int first = steps * rank / blocks, last = steps * (rank + 1) / blocks;
    if (threadIdx.x == 0) {
        for (int i = 0; i < a.stages; i++) barrier_init(full + 8 * i, 1), barrier_init(free + 8 * i, 8);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x & 31, part = warp / 4;
    if (warp == 8) {
        if (lane == 0) fetch(a, w, x, tile, first, last, ring, full, free);
        else wait_for_previous();
    } else {
        wait_for_previous();
        float d[ROWS / 2];
#pragma unroll
        for (int i = 0; i < ROWS / 2; i++) d[i] = 0.f;
        for (int step = first; step < last; step++) {
            int stage = (step - first) % a.stages;
            u32 from = ring + stage * STAGE_BYTES;
            barrier_wait(full + 8 * stage, (step - first) / a.stages & 1);
            pin(d);
            products_begin();
#pragma unroll
            for (int i = 0; i < 4; i++)
                Product<ROWS>::shared<0>(d, factor(from + part * W_BYTES + i * 32), factor(from + 2 * W_BYTES + part * X_BYTES + i * 32), 1);
            products_commit();
            products_wait<0>();
            pin(d);
            if (lane == 0) barrier_arrive(free + 8 * stage);
        }
        // The ring's memory is free for the sums once both warpgroups have read their last stage.
        named_barrier(1, 256);
        float *sums = (float *)(memory + (ring - shared_address(memory)));
        int row0 = (warp & 3) * 16 + lane / 4, t = lane & 3;
#pragma unroll
        for (int i = 0; i < ROWS / 2; i++)
            sums[(part * ROWS + i / 4 * 8 + 2 * t + (i & 1)) * STRIDE + row0 + (i >> 1 & 1) * 8] = d[i];
    }
    __syncwarp();
    cluster_barrier();
    if (warp < 8) finish(a, tile, ring, rank, blocks);
    // No block leaves while another reads its sums.
    __syncwarp();
    cluster_barrier();
}
