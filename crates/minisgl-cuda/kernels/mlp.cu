// A gated MLP of up to 8 rows in one kernel; see `half_layer.cuh`. A cluster has `inner` of the inner
// features. In shared memory: the block's rows of the first matrix, in tiles of 8 of the gate and 8 of up,
// and later, in the same place, sums; its rows of the second; the normed rows; the cluster's inner values.

// Tiles of a block: FIRST of its rows of the first matrix, and SECOND of the second.

struct Args {
    Residual residual;
    const bf16 *gate_up; const bf16 *down; float *part;
    int inner_total, inner, gelu;
};

extern "C" __global__ void __launch_bounds__(THREADS, 1) mlp(const Args a) {
    extern __shared__ __align__(128) unsigned char memory[];
    __shared__ u64 barriers[2];
    let_next_start();
    const Residual &r = a.residual;
    Block b = {memory, shared_address(memory), cluster_rank(), int(blockIdx.x) / CLUSTER};
    int warp = threadIdx.x / 32, mine = FIRST * 8;
    int second = max(FIRST * 16 * STRIDE(r.hidden), WARPS * ROWS * SUMS_ROW(max(FIRST, SECOND)) * 4);
    int x = second + SECOND * 16 * STRIDE(a.inner), mid = x + ROWS * STRIDE(r.hidden), squares = mid + ROWS * STRIDE(a.inner);
    float *sums = (float *)memory;
    u32 residual_here = shared_address(barriers), mid_here = residual_here + 8;
    fetch_rows(b.at(0), FIRST * 16, r.hidden, [&](int i) {
        int n = b.cluster * a.inner + b.rank * mine + i / 16 * 8 + i % 8;
        return a.gate_up + (long long)(n + (i & 8 ? a.inner_total : 0)) * r.hidden;
    });
    fetch_rows(b.at(second), SECOND * 16, a.inner, [&](int i) {
        return a.down + (long long)(b.rank * SECOND * 16 + i) * a.inner_total + b.cluster * a.inner;
    });
    if (warp == 0) prefetch_norm(b, r);
    if (threadIdx.x == 0) {
        barrier_init(residual_here, 1), barrier_init(mid_here, 1);
        publish_barriers();
        barrier_expect(residual_here, residual_bytes(r));
        barrier_expect(mid_here, r.rows * a.inner * 2);
    }
    __syncthreads();
    cluster_arrive();
    cluster_wait();
    wait_for_previous();

    share_residual(b, r, x, squares, residual_here);
    wait_for_copies<1>();
    named_barrier(1, THREADS);
    barrier_wait_for_cluster(residual_here, 0);
    multiply<FIRST>(memory, memory + x, r.hidden, sums, [] { named_barrier(1, THREADS); });
    for (int base = 0; base < r.rows * mine / 4; base += THREADS) {
        int i = base + threadIdx.x, row = i / (mine / 4), n = i % (mine / 4) * 4, m = n / 8 * 16 + n % 8;
        bool valid = row < r.rows;
        uint2 value = make_uint2(0, 0);
        if (valid) {
            float factor = norm_factor(r, (const float *)(memory + squares), row);
            float4 gate = total<FIRST>(sums, row, m), up = total<FIRST>(sums, row, m + 8);
            auto gated = [&](float gate, float up) { return activate(gate * factor, a.gelu) * (up * factor); };
            value.x = pack(gated(gate.x, up.x), gated(gate.y, up.y));
            value.y = pack(gated(gate.z, up.z), gated(gate.w, up.w));
        }
        send_to_all(b, valid, mid + row * STRIDE(a.inner) + (b.rank * mine + n) * 2, mid_here, value);
    }
    wait_for_copies<0>();
    named_barrier(1, THREADS);
    barrier_wait_for_cluster(mid_here, 0);
    add_later<SECOND>(b, r, memory + second, memory + mid, a.inner, sums, a.part);
}
