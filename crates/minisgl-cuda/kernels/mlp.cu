// A gated MLP of up to 8 rows in one kernel; see `half_layer.cuh`. A cluster has `inner` of the inner
// features. In shared memory: the block's rows of the first matrix, in tiles of 8 of the gate and 8 of up,
// then those of the second; the normed rows; the cluster's inner values; sums.

// Tiles of a block: FIRST of its rows of the first matrix, and SECOND of the second.

struct Args {
    Residual residual;
    const bf16 *gate_up; const bf16 *down; float *part;
    int inner_total, inner, gelu;
};

extern "C" __global__ void __launch_bounds__(THREADS + 32, 1) mlp(const Args a) {
    extern __shared__ __align__(128) unsigned char memory[];
    __shared__ u64 barriers[4];
    let_next_start();
    const Residual &r = a.residual;
    Block b = {memory, shared_address(memory), cluster_rank(), int(blockIdx.x) / CLUSTER};
    int warp = threadIdx.x / 32, mine = FIRST * 8;
    int second = FIRST * 16 * STRIDE(r.hidden), x = second + SECOND * 16 * STRIDE(a.inner), mid = x + ROWS * STRIDE(r.hidden);
    int squares = mid + ROWS * STRIDE(a.inner), sums = squares + ROWS * CLUSTER * 4;
    u32 first_here = shared_address(barriers), second_here = first_here + 8, residual_here = first_here + 16, mid_here = first_here + 24;
    if (threadIdx.x == 0) {
        for (int i = 0; i < 4; i++) barrier_init(first_here + 8 * i, 1);
        publish_barriers();
        barrier_expect(residual_here, residual_bytes(r));
        barrier_expect(mid_here, r.rows * (CLUSTER - 1) * mine * 2);
    }
    __syncthreads();
    cluster_arrive();
    if (warp == WARPS) {
        fetch_rows(b.at(0), first_here, FIRST * 16, r.hidden, [&](int i) {
            int n = b.cluster * a.inner + b.rank * mine + i / 16 * 8 + i % 8;
            return a.gate_up + (long long)(n + (i & 8 ? a.inner_total : 0)) * r.hidden;
        });
        fetch_rows(b.at(second), second_here, SECOND * 16, a.inner, [&](int i) {
            return a.down + (long long)(b.rank * SECOND * 16 + i) * a.inner_total + b.cluster * a.inner;
        });
        cluster_wait();
        wait_for_previous();
        return;
    }
    cluster_wait();
    wait_for_previous();

    share_residual(b, r, x, squares, residual_here);
    barrier_wait(first_here, 0);
    barrier_wait_for_cluster(residual_here, 0);
    multiply<FIRST>(memory, memory + x, r.hidden, (float *)(memory + sums));
    for (int i = threadIdx.x; i < r.rows * mine / 2; i += THREADS) {
        int row = i / (mine / 2), n = i % (mine / 2) * 2, m = n / 8 * 16 + n % 8;
        float factor = norm_factor(r, (const float *)(memory + squares), row), value[2];
#pragma unroll
        for (int e = 0; e < 2; e++) {
            float gate = total<FIRST>((const float *)(memory + sums), row, m + e) * factor;
            value[e] = activate(gate, a.gelu) * (total<FIRST>((const float *)(memory + sums), row, m + 8 + e) * factor);
        }
        *(u32 *)(memory + mid + row * STRIDE(a.inner) + (b.rank * mine + n) * 2) = pack(value[0], value[1]);
    }
    send_to_all(b, r.rows * FIRST, mid_here, [&](int piece) {
        return mid + piece / FIRST * STRIDE(a.inner) + b.rank * mine * 2 + piece % FIRST * 16;
    });
    barrier_wait(second_here, 0);
    barrier_wait_for_cluster(mid_here, 0);
    add_later<SECOND>(b, r, memory + second, memory + mid, a.inner, (float *)(memory + sums), a.part);
}
