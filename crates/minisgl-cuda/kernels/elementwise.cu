// The small operations around the matrix products: embedding, norms, rotary with the write of K
// and V, activation, sums, gather, edits of logits.

// out[t] = table[id] · scale; ids that this rank does not hold give zeros. A block a token.
extern "C" __global__ void embed(const int *input_ids, const int *token_table, const T *table,
                                 int first_id, int ids, int hidden, float scale, T *out) {
    let_next_start();
    wait_for_previous();
    int id = input_ids[blockIdx.x];
    if (id < 0) id = token_table[-1 - id];
    id -= first_id;
    bool held = id >= 0 && id < ids;
    const T *from = table + (long long)id * hidden;
    T *to = out + (long long)blockIdx.x * hidden;
    for (int i = threadIdx.x; i < hidden; i += blockDim.x)
        to[i] = from_float<T>(held ? to_float(from[i]) * scale : 0.f);
}

// out = x / rms(x) · (weight + shift). A block a row; x and out may be the same.
extern "C" __global__ void rms_norm(const T *x, const float *weight, float eps, float shift,
                                    int width, T *out) {
    let_next_start();
    wait_for_previous();
    const T *from = x + (long long)blockIdx.x * width;
    T *to = out + (long long)blockIdx.x * width;
#if !EXACT
    if (width % 8 == 0 && width <= 8 * 4 * blockDim.x) {
        uint4 held[4];
        float squares = 0.f;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            int i = (threadIdx.x + j * blockDim.x) * 8;
            held[j] = make_uint4(0, 0, 0, 0);
            if (i < width) held[j] = *(const uint4 *)(from + i);
            const u32 *pairs = (const u32 *)&held[j];
#pragma unroll
            for (int p = 0; p < 4; p++) {
                float a = low_half(pairs[p]), b = high_half(pairs[p]);
                squares += a * a + b * b;
            }
        }
        float scale = rsqrtf(block_sum(squares) / width + eps);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            int i = (threadIdx.x + j * blockDim.x) * 8;
            if (i >= width) break;
            u32 *pairs = (u32 *)&held[j];
            float4 w0 = *(const float4 *)(weight + i), w1 = *(const float4 *)(weight + i + 4);
            float w[8] = {w0.x, w0.y, w0.z, w0.w, w1.x, w1.y, w1.z, w1.w};
#pragma unroll
            for (int p = 0; p < 4; p++)
                pairs[p] = pack(low_half(pairs[p]) * scale * (w[2 * p] + shift),
                                high_half(pairs[p]) * scale * (w[2 * p + 1] + shift));
            *(uint4 *)(to + i) = held[j];
        }
        return;
    }
#endif
    float squares = 0.f;
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        float value = to_float(from[i]);
        squares += value * value;
    }
    float scale = rsqrtf(block_sum(squares) / width + eps);
    for (int i = threadIdx.x; i < width; i += blockDim.x)
        to[i] = from_float<T>(to_float(from[i]) * scale * (weight[i] + shift));
}

// w[m, k] *= weight[k] + shift. A thread has 8 elements. No kernel may start before it is done: others read weights
// before they wait.
extern "C" __global__ void scale_columns(T *w, const float *weight, float shift, int cols, long long count) {
    wait_for_previous();
    long long from = (blockIdx.x * (long long)blockDim.x + threadIdx.x) * 8;
    for (long long i = from; i < min(from + 8, count); i++) w[i] = from_float<T>(to_float(w[i]) * (weight[i % cols] + shift));
}

// x += delta.
extern "C" __global__ void add(T *x, const T *delta, long long count) {
    let_next_start();
    wait_for_previous();
    long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x;
    if (i < count) x[i] = from_float<T>(to_float(x[i]) + to_float(delta[i]));
}

// out = x + the sum of `parts` lots of `count` numbers, `count` even; x and out may be the same.
extern "C" __global__ void add_parts(const T *x, const float *added, int parts, long long count, T *out) {
    let_next_start();
    wait_for_previous();
    long long i = (blockIdx.x * (long long)blockDim.x + threadIdx.x) * 2;
    if (i >= count) return;
    float low = 0.f, high = 0.f;
    for (int p = 0; p < parts; p++) {
        float2 more = *(const float2 *)(added + p * count + i);
        low += more.x, high += more.y;
    }
    out[i] = from_float<T>(to_float(x[i]) + low), out[i + 1] = from_float<T>(to_float(x[i + 1]) + high);
}

// out[row] += bias, in out's own type: what a matrix product is then added to. `O` by name.
template <typename O>
__device__ void spread_bias(const float *bias, int width, long long count, int add_to, O *out) {
    let_next_start();
    wait_for_previous();
    long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x;
    if (i >= count) return;
    float value = bias[i % width];
    out[i] = from_float<O>(add_to ? to_float(out[i]) + value : value);
}
extern "C" __global__ void spread_bias_t(const float *b, int w, long long n, int add_to, T *out) {
    spread_bias(b, w, n, add_to, out);
}
extern "C" __global__ void spread_bias_f32(const float *b, int w, long long n, int add_to, float *out) {
    spread_bias(b, w, n, add_to, out);
}

// out = act(f · gate) · f · up; both [rows, 2·inner] → [rows, inner], with f = 1 / rms(x) where there is an
// x [rows, width], whose norm has no weights, and else 1. A thread has 8 columns of a row, up to GATE_PIECES times.
#define GATE_PIECES 4
extern "C" __global__ void __launch_bounds__(576, 2)
gate(const T *both, const T *x, int width, float eps, int inner, int gelu, T *out) {
    let_next_start();
    wait_for_previous();
    long long row = blockIdx.x;
    int first = (blockIdx.y * GATE_PIECES * blockDim.x + threadIdx.x) * 8, step = blockDim.x * 8;
    const T *from = both + row * 2 * inner;
    T *to = out + row * inner;
#if !EXACT
    if (inner % 8 == 0 && width % 8 == 0) {
        uint4 g[GATE_PIECES], u[GATE_PIECES];
#pragma unroll
        for (int j = 0; j < GATE_PIECES; j++) {
            g[j] = u[j] = make_uint4(0, 0, 0, 0);
            int column = first + j * step;
            if (column < inner) g[j] = *(const uint4 *)(from + column), u[j] = *(const uint4 *)(from + inner + column);
        }
        float squares = 0.f;
        for (int i = threadIdx.x * 8; x && i < width; i += step) {
            uint4 piece = *(const uint4 *)(x + row * width + i);
            const u32 *pairs = (const u32 *)&piece;
#pragma unroll
            for (int p = 0; p < 4; p++) squares += low_half(pairs[p]) * low_half(pairs[p]) + high_half(pairs[p]) * high_half(pairs[p]);
        }
        float factor = x ? rsqrtf(block_sum(squares) / width + eps) : 1.f;
#pragma unroll
        for (int j = 0; j < GATE_PIECES; j++) {
            int column = first + j * step;
            if (column >= inner) return;
            u32 *gp = (u32 *)&g[j], *up = (u32 *)&u[j];
#pragma unroll
            for (int p = 0; p < 4; p++)
                gp[p] = pack(activate(low_half(gp[p]) * factor, gelu) * (low_half(up[p]) * factor),
                             activate(high_half(gp[p]) * factor, gelu) * (high_half(up[p]) * factor));
            *(uint4 *)(to + column) = g[j];
        }
        return;
    }
#endif
    float squares = 0.f;
    for (int i = threadIdx.x; x && i < width; i += blockDim.x) squares += to_float(x[row * width + i]) * to_float(x[row * width + i]);
    float factor = x ? rsqrtf(block_sum(squares) / width + eps) : 1.f;
    for (int j = 0; j < GATE_PIECES; j++)
        for (int i = first + j * step; i < min(first + j * step + 8, inner); i++)
            to[i] = from_float<T>(activate(to_float(from[i]) * factor, gelu) * (to_float(from[inner + i]) * factor));
}

// out[i] = x[indices[i]]. A block a row.
extern "C" __global__ void gather(const T *x, const int *indices, int width, T *out) {
    let_next_start();
    wait_for_previous();
    const T *from = x + (long long)indices[blockIdx.x] * width;
    T *to = out + (long long)blockIdx.x * width;
    for (int i = threadIdx.x; i < width; i += blockDim.x) to[i] = from[i];
}

struct RopeArgs {
    T *qkv; T *k_pages; T *v_pages;
    const float *q_weight; const float *k_weight; const float *rope;
    const int *positions; const int *store_at;
    int q_heads, kv_heads, first_head, dim, page_size;
    float q_eps, q_shift, k_eps, k_shift;
};

// Neighbouring elements that one thread loads at once.
template <typename E, int N> struct __align__(sizeof(E) * N) Piece { E x[N]; };

// A lane has `N` elements of a head's first half, and those that they rotate with. As many lanes as half a
// head takes, rounded up to a power of 2, have a head: a warp has several heads at once.
template <int N> __device__ __forceinline__ void rope_head(const RopeArgs &a) {
    int half = a.dim / 2, lanes = half > N ? 1 << (32 - __clz(half / N - 1)) : 1;
    int token = blockIdx.x, i = threadIdx.x % lanes * N, heads = a.q_heads + 2 * a.kv_heads;
    int head = a.first_head + (blockIdx.y * blockDim.x + threadIdx.x) / lanes;
    bool is_key = head >= a.q_heads, is_value = head >= a.q_heads + a.kv_heads, there = i < half && head < heads;
    T *to = a.qkv + (there ? ((long long)token * heads + head) * a.dim + i : 0);
    // Also of tokens that go nowhere: this does not wait for where they go.
    Piece<T, N> low = *(const Piece<T, N> *)to, high = *(const Piece<T, N> *)(to + half);
    int slot = a.store_at[token], first_angle = a.positions[token] * a.dim + i;
    float squares = 0.f;
#pragma unroll
    for (int e = 0; e < N; e++) {
        float l = to_float(low.x[e]), h = to_float(high.x[e]);
        squares += l * l + h * h;
    }
    // All lanes take part in this.
    if (!there) squares = 0.f;
    for (int lane = lanes / 2; lane; lane /= 2) squares += __shfl_xor_sync(~0u, squares, lane);
    if (!there || (is_key && slot < 0)) return;
    const float *weight = is_key ? a.k_weight : a.q_weight, *angles = a.rope + first_angle;
    float scale = rsqrtf(squares / a.dim + (is_key ? a.k_eps : a.q_eps)), shift = is_key ? a.k_shift : a.q_shift;
    // Few registers at once, so that many blocks are on a multiprocessor.
#pragma unroll
    for (int e = 0; e < N; e += 4) {
        if (is_value) break;
        Piece<float, 4> c = *(const Piece<float, 4> *)(angles + e), s = *(const Piece<float, 4> *)(angles + half + e);
        Piece<float, 4> v = {1.f, 1.f, 1.f, 1.f}, w = v;
        if (weight) {
            v = *(const Piece<float, 4> *)(weight + i + e), w = *(const Piece<float, 4> *)(weight + half + i + e);
#pragma unroll
            for (int j = 0; j < 4; j++) v.x[j] = scale * (v.x[j] + shift), w.x[j] = scale * (w.x[j] + shift);
        }
#pragma unroll
        for (int j = 0; j < 4; j++) {
            float l = to_float(low.x[e + j]) * v.x[j], h = to_float(high.x[e + j]) * w.x[j];
            low.x[e + j] = from_float<T>(l * c.x[j] - h * s.x[j]), high.x[e + j] = from_float<T>(h * c.x[j] + l * s.x[j]);
        }
    }
    if (is_key) {
        int kv_head = head - a.q_heads - (is_value ? a.kv_heads : 0), page = slot / a.page_size, row = slot % a.page_size;
        to = (is_value ? a.v_pages : a.k_pages) + (((long long)page * a.kv_heads + kv_head) * a.page_size + row) * a.dim + i;
    }
    *(Piece<T, N> *)to = low, *(Piece<T, N> *)(to + half) = high;
}

// Blocks on a multiprocessor. As many as do without spills: it is loads on their way that this waits for.
#define ROPE_BLOCKS (__CUDA_ARCH__ == 900 ? 5 : 4)

// Per head: norm (a null weight skips it), rotation of element i with i + dim/2, K and V to their
// pages, Q in place. qkv [tokens, (q + 2·kv)·dim], dim a multiple of 8; rope [positions, dim]. Heads before
// `first_head` stay as they are. Grid: x = token, y = as many of its heads as a block has lanes for.
extern "C" __global__ void __launch_bounds__(256, ROPE_BLOCKS) rope_store(const RopeArgs a) {
    let_next_start();
    wait_for_previous();
    // Loads of 16 bytes where halves of heads begin at multiples of them.
    constexpr int N = 16 / sizeof(T);
    if (a.dim % (2 * N) == 0) rope_head<N>(a);
    else rope_head<4>(a);
}

// logits = cap · tanh(logits / cap).
extern "C" __global__ void soft_cap(float *logits, float cap, long long count) {
    let_next_start();
    wait_for_previous();
    long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x;
    if (i < count) logits[i] = cap * tanhf(logits[i] / cap);
}

// One thread an edit (row, token, scale, bias).
extern "C" __global__ void edit_logits(float *logits, int vocab, const uint4 *edits, int count) {
    let_next_start();
    wait_for_previous();
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    uint4 edit = edits[i];
    float *logit = logits + (long long)edit.x * vocab + edit.y;
    float scale = __uint_as_float(edit.z), value = *logit;
    *logit = (value > 0.f ? value / scale : value * scale) + __uint_as_float(edit.w);
}

// Tokens whose bit is not set become impossible. A mask is its row, then the bits.
extern "C" __global__ void mask_logits(float *logits, int vocab, const u32 *masks, int words) {
    let_next_start();
    wait_for_previous();
    const u32 *mask = masks + (long long)blockIdx.y * (words + 1);
    float *row = logits + (long long)mask[0] * vocab;
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < vocab && !(mask[1 + i / 32] >> (i & 31) & 1)) row[i] = -infinity();
}

// Pseudo-random weights of standard deviation `deviation`: what a benchmark runs on.
extern "C" __global__ void fill_random(T *out, long long count, u32 seed, float deviation) {
    let_next_start();
    wait_for_previous();
    for (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < count;
         i += (long long)gridDim.x * blockDim.x) {
        u64 z = (i + 1) * 0x9e3779b97f4a7c15ull + seed;
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
        z ^= z >> 31;
        // The sum of four uniform numbers is near enough to normal.
        float sum = float(z & 0xffff) + float(z >> 16 & 0xffff) + float(z >> 32 & 0xffff) + float(z >> 48);
        out[i] = from_float<T>((sum / 65536.f - 2.f) * 1.7320508f * deviation);
    }
}

// For tests of how an engine ends: takes the context with it.
extern "C" __global__ void trap() { asm volatile("trap;"); }

// `count` words between the card and page-locked memory of the host's. In a step these take the place of a copy
// engine's, which begin several microseconds behind the kernels in front of them.
extern "C" __global__ void upload(const u32 *from, u32 *to, int count) {
    let_next_start();
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    // Of the host's memory no kernel writes this; and no cache may have what was there before.
    u32 word = i < count ? __ldcv(from + i) : 0;
    wait_for_previous();
    if (i < count) to[i] = word;
}
extern "C" __global__ void download(const u32 *from, u32 *to, int count) {
    let_next_start();
    wait_for_previous();
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) to[i] = from[i];
}

// out[indices[i]] = values[i]; negative indices are left out.
extern "C" __global__ void scatter(const int *indices, const int *values, int count, int *out) {
    let_next_start();
    wait_for_previous();
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count && indices[i] >= 0) out[indices[i]] = values[i];
}
