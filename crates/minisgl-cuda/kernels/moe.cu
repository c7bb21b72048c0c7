// Mixture of experts without a word to the host: `route` picks each token's experts, `expand`
// computes act(gate)·up of the chosen ones, `reduce` the weighted sum of their down projections.
// A warp an output element: right, and bound by re-reads of the experts' weights at large batches.

// A block a token. x is normed already; logits in shared memory.
extern "C" __global__ void route(const T *x, const T *router, int hidden, int experts, int top_k,
                                 int renormalize, int *ids, float *weights) {
    let_next_start();
    wait_for_previous();
    extern __shared__ float logits[];
    const T *row = x + (long long)blockIdx.x * hidden;
    int lane = threadIdx.x & 31;
    for (int e = threadIdx.x / 32; e < experts; e += blockDim.x / 32) {
        float sum = 0.f;
        for (int i = lane; i < hidden; i += 32) sum += to_float(row[i]) * to_float(router[(long long)e * hidden + i]);
        sum = warp_sum(sum);
        if (lane == 0) logits[e] = sum;
    }
    __syncthreads();
    if (threadIdx.x != 0) return;
    float top = -infinity(), all = 0.f, kept = 0.f;
    for (int e = 0; e < experts; e++) top = fmaxf(top, logits[e]);
    for (int e = 0; e < experts; e++) all += logits[e] = expf(logits[e] - top);
    for (int k = 0; k < top_k; k++) {
        int best = 0;
        for (int e = 1; e < experts; e++) if (logits[e] > logits[best]) best = e;
        ids[blockIdx.x * top_k + k] = best;
        kept += weights[blockIdx.x * top_k + k] = logits[best] / all;
        logits[best] = -1.f;
    }
    if (renormalize) for (int k = 0; k < top_k; k++) weights[blockIdx.x * top_k + k] /= kept;
}

// mid[token, k, i] = act(g_i · x) · (u_i · x). Grid: x over inner, y = token · top_k + k.
extern "C" __global__ void expand(const T *x, const T *gate_up, const int *ids, int hidden, int inner,
                                  int top_k, T *mid) {
    let_next_start();
    wait_for_previous();
    int i = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x & 31;
    if (i >= inner) return;
    const T *row = x + (long long)(blockIdx.y / top_k) * hidden;
    const T *g = gate_up + ((long long)ids[blockIdx.y] * 2 * inner + i) * hidden, *u = g + (long long)inner * hidden;
    float a = 0.f, b = 0.f;
    for (int h = lane; h < hidden; h += 32) {
        float value = to_float(row[h]);
        a += value * to_float(g[h]), b += value * to_float(u[h]);
    }
    a = warp_sum(a), b = warp_sum(b);
    if (lane == 0) mid[(long long)blockIdx.y * inner + i] = from_float<T>(activate(a, 0) * b);
}

// out[token, h] (+)= Σ_k weight_k · (down_k[h] · mid[token, k]). Grid: x over hidden, y = token.
extern "C" __global__ void reduce(const T *mid, const T *down, const int *ids, const float *weights,
                                  int hidden, int inner, int top_k, int add_to, T *out) {
    let_next_start();
    wait_for_previous();
    int h = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x & 31;
    if (h >= hidden) return;
    float total = 0.f;
    for (int k = 0; k < top_k; k++) {
        int at = blockIdx.y * top_k + k;
        const T *from = mid + (long long)at * inner, *w = down + ((long long)ids[at] * hidden + h) * inner;
        float sum = 0.f;
        for (int i = lane; i < inner; i += 32) sum += to_float(from[i]) * to_float(w[i]);
        total += weights[at] * sum;
    }
    total = warp_sum(total);
    T *to = out + (long long)blockIdx.y * hidden + h;
    if (lane == 0) *to = from_float<T>(add_to ? to_float(*to) + total : total);
}
