// Tokens from logits, without a sort. `survey` reads the logits once and leaves each chunk's
// maximum, where it is, and its sum of exponentials, if `head.cu` has not; `choose` then needs one chunk more for a
// plain draw, and histograms over the bits of the logits for top-k and top-p. Sums that decide
// are 64-bit integers, so that they do not depend on the order of addition.

#ifndef CHUNK
#define CHUNK 512
#endif

__device__ __forceinline__ u32 ordered(float x) {  // larger floats have larger keys
    u32 bits = __float_as_uint(x);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// Philox-4x32-10 (Salmon et al., 2011): key = seed, counter = (position, 0, 0, 0).
__device__ float uniform(u32 k0, u32 k1, u32 position) {
    u32 c[4] = {position, 0, 0, 0};
    for (int round = 0; round < 10; round++) {
        u32 h0 = __umulhi(0xD2511F53u, c[0]), l0 = 0xD2511F53u * c[0];
        u32 h1 = __umulhi(0xCD9E8D57u, c[2]), l1 = 0xCD9E8D57u * c[2];
        c[0] = h1 ^ c[1] ^ k0, c[1] = l1, c[2] = h0 ^ c[3] ^ k1, c[3] = l0;
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    return (c[0] >> 8) * (1.f / 16777216.f);
}

// stats [rows, chunks]: (max, index of it as bits, Σ exp((x − max) / temperature)). A warp a chunk, the last ones
// of all rows first: of logits that L2 does not hold as a whole, it has those that were written last.
extern "C" __global__ void survey(const float *logits, const float *temperature, int vocab, int chunks, float4 *stats) {
    let_next_start();
    wait_for_previous();
    int chunk = (gridDim.y - 1 - blockIdx.y) * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x & 31, row = blockIdx.x;
    if (chunk >= chunks) return;
    const float *x = logits + (long long)row * vocab;
    float held[CHUNK / 32], best = -infinity();
    int index = 0x7fffffff, first = chunk * CHUNK + lane * 4;
    bool by_fours = vocab % 4 == 0;
#pragma unroll
    for (int j = 0; j < CHUNK / 128; j++) {
        int i = first + j * 128;
        float4 four = make_float4(-infinity(), -infinity(), -infinity(), -infinity());
        if (by_fours && i < vocab) four = *(const float4 *)(x + i);
        held[4 * j] = four.x, held[4 * j + 1] = four.y, held[4 * j + 2] = four.z, held[4 * j + 3] = four.w;
    }
#pragma unroll
    for (int j = 0; j < CHUNK / 32; j++) {
        int i = first + j / 4 * 128 + j % 4;
        if (!by_fours && i < vocab) held[j] = x[i];
        if (held[j] > best) best = held[j], index = i;
    }
    float top = warp_max(best);
    if (best != top) index = 0x7fffffff;
    index = __reduce_min_sync(~0u, index);
    float t = temperature[row], inverse = t > 0.f ? 1.f / t : 0.f, sum = 0.f;
#pragma unroll
    for (int j = 0; j < CHUNK / 32; j++) sum += held[j] > -infinity() ? __expf((held[j] - top) * inverse) : 0.f;
    sum = warp_sum(sum);
    if (lane == 0) stats[(long long)row * chunks + chunk] = make_float4(top, __int_as_float(index), sum, 0.f);
}

// exp((x − top) / t) as an integer; the most likely token has 2³², what is no number nothing.
__device__ __forceinline__ u64 weight(float x, float top, float inverse) {
    return x > -infinity() ? u64(double(__expf((x - top) * inverse)) * 4294967296.0) : 0;
}

// A block's running sums: of `own` of all threads up to this one, it included, and of all 1,024.
struct Scan { u64 here, all; };
__device__ __forceinline__ Scan scan(u64 own, u64 (&warps)[32]) {
    int lane = threadIdx.x & 31, warp = threadIdx.x / 32;
    auto add_lanes_before = [lane](u64 x) {
#pragma unroll
        for (int d = 1; d < 32; d <<= 1) {
            u64 other = __shfl_up_sync(~0u, x, d);
            if (lane >= d) x += other;
        }
        return x;
    };
    own = add_lanes_before(own);
    // Whoever reads an earlier scan's has done so.
    __syncthreads();
    if (lane == 31) warps[warp] = own;
    __syncthreads();
    u64 sums = add_lanes_before(warps[lane]), before = __shfl_sync(~0u, sums, max(warp - 1, 0));
    return {own + (warp ? before : 0), __shfl_sync(~0u, sums, 31)};
}

extern "C" __global__ void __launch_bounds__(1024)
choose(float *logits, const float4 *stats, const float *temperature, const int *top_k,
       const float *top_p, const float *min_p, const int2 *seed, const int *position, const int *slots,
       int vocab, int chunks, int width, int is_last_use, int *token_table, int *tokens) {
    let_next_start();
    wait_for_previous();
    __shared__ u64 mass[256];
    __shared__ u32 count[256];
    __shared__ u64 warps[32];
    __shared__ int chosen;
    __shared__ u32 prefix, ties;
    __shared__ u64 budget;
    int row = blockIdx.x, lane = threadIdx.x;
    const float *x = logits + (long long)row * vocab;
    stats += (long long)row * chunks;
    // Everything that comes from afar is asked for at once.
    float t = temperature[row], p = top_p[row], least = min_p[row];
    int k = top_k[row];
    float u = uniform(u32(seed[row].x), u32(seed[row].y), u32(position[row]));
    float4 own_stats[2];
#pragma unroll
    for (int i = 0; i < 2; i++) own_stats[i] = 2 * lane + i < chunks ? stats[2 * lane + i] : make_float4(-infinity(), 0.f, 0.f, 0.f);
    // The highest logit, then the lowest index that has it. Where logits are no numbers, no thread finds anything.
    if (lane == 0) chosen = 0x7fffffff, prefix = 0, budget = 0;
    __shared__ float tops[32];
    float top = fmaxf(own_stats[0].x, own_stats[1].x);
    for (int c = lane + 2048; c < chunks; c += 1024) top = fmaxf(top, stats[c].x);
    top = warp_max(top);
    if ((lane & 31) == 0) tops[lane / 32] = top;
    __syncthreads();
    top = warp_max(tops[lane & 31]);
    auto finish = [&]() {
        __syncthreads();
        // Whole lines of the row.
        u64 begin = (u64(x) + 127) / 128, end = is_last_use ? u64(x + vocab) / 128 : 0;
        for (u64 line = begin + lane; line < end; line += 1024) discard_line((void *)(line * 128));
        if (lane == 0) {
            int token = min(max(chosen, 0), vocab - 1);
            tokens[row] = token;
            if (slots[row] >= 0) token_table[slots[row]] = token;
        }
    };
    if (t <= 0.f) {
        for (int c = lane; c < chunks; c += 1024)
            if (stats[c].x == top) atomicMin(&chosen, __float_as_int(stats[c].y));
        finish();
        return;
    }
    float inverse = 1.f / t;
    if ((k <= 0 || k >= vocab) && p >= 1.f && least <= 0.f && chunks <= 2048) {
        // A plain draw: the chunk by the survey's sums, then the token inside it.
        u64 own[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float4 s = own_stats[i];
            own[i] = s.x > -infinity() ? u64(double(s.z) * double(__expf((s.x - top) * inverse)) * 4294967296.0) : 0;
        }
        Scan chunks_to = scan(own[0] + own[1], warps);
        u64 target = u64(double(u) * double(chunks_to.all)), before = chunks_to.here - own[0] - own[1];
        if (target >= before && target < chunks_to.here) {
            bool second = target - before >= own[0];
            prefix = 2 * lane + second, budget = target - before - (second ? own[0] : 0);
        }
        __syncthreads();
        // Rounding may leave a little behind the chunk's last token: then that one is it.
        int i = prefix * width + lane;
        u64 w = lane < width && i < vocab ? weight(x[i], top, inverse) : 0;
        Scan tokens_to = scan(w, warps);
        u64 goal = min(budget, tokens_to.all - 1);
        if (goal >= tokens_to.here - w && goal < tokens_to.here) chosen = i;
        finish();
        return;
    }
    // Keep logits whose key is above `border`, and the first `tied` of those that equal it.
    u32 border = 0, tied = 0xffffffffu;
    for (int pass = 0; pass < 2; pass++) {
        bool by_count = pass == 0;
        if (by_count ? k <= 0 || k >= vocab : p >= 1.f) continue;
        if (lane == 0) { prefix = 0; budget = by_count ? u64(k) : 0; }
        __syncthreads();
        for (int shift = 24; shift >= 0; shift -= 8) {
            if (lane < 256) mass[lane] = 0, count[lane] = 0;
            __syncthreads();
            u32 before = tied;  // ties of an earlier pass count towards this one's mass in full
            for (int i = lane; i < vocab; i += 1024) {
                u32 key = ordered(x[i]);
                if (key < border || (shift < 24 && (key >> (shift + 8)) != prefix)) continue;
                u32 bin = key >> shift & 255;
                atomicAdd(&count[bin], 1u);
                if (!by_count) {
                    u64 w = weight(x[i], top, inverse);
                    if (w) atomicAdd(&mass[bin], w);
                }
            }
            __syncthreads();
            if (lane == 0) {
                if (!by_count && shift == 24) {
                    u64 all = 0;
                    for (int b = 0; b < 256; b++) all += mass[b];
                    if (border) {  // ties that top-k dropped have no mass
                        u64 dropped = 0;
                        u64 w = weight(__uint_as_float(border & 0x80000000u ? border & 0x7fffffffu : ~border), top, inverse);
                        if (ties > before) dropped = u64(ties - before) * w;
                        all -= dropped;
                    }
                    budget = u64(double(p) * double(all));
                    if (budget == 0) budget = 1;
                }
                int bin = 255;
                for (; bin > 0; bin--) {
                    u64 here = by_count ? u64(count[bin]) : mass[bin];
                    if (here >= budget) break;
                    budget -= here;
                }
                prefix = prefix << 8 | bin;
                if (shift == 0) ties = count[bin];
            }
            __syncthreads();
        }
        u32 found = prefix;
        u64 rest = budget;
        u32 keep;
        if (by_count) keep = u32(rest);
        else {
            u64 w = weight(__uint_as_float(found & 0x80000000u ? found & 0x7fffffffu : ~found), top, inverse);
            keep = w ? u32(min((rest + w - 1) / w, u64(ties))) : ties;
            if (found == border) keep = min(keep, tied);
        }
        border = found, tied = keep;
        __syncthreads();
    }
    if (least > 0.f) {
        u32 floor_key = ordered(top + t * __logf(least));
        if (floor_key > border) border = floor_key, tied = 0xffffffffu;
    }
    // Each thread sums its own run of ids; a tie's place among its equals needs a count first.
    int run = (vocab + 1023) / 1024, begin = lane * run, end = min(vocab, begin + run);
    u64 equal = 0;
    if (tied != 0xffffffffu)
        for (int i = begin; i < end; i++) equal += ordered(x[i]) == border;
    u64 rank0 = scan(equal, warps).here - equal, rank = rank0, own = 0;
    auto kept = [&](int i) {
        u32 key = ordered(x[i]);
        return key > border || (key == border && rank++ < tied);
    };
    for (int i = begin; i < end; i++) if (kept(i)) own += weight(x[i], top, inverse);
    Scan kept_to = scan(own, warps);
    u64 target = u64(double(u) * double(kept_to.all)), before = kept_to.here - own;
    if (target >= before && target < kept_to.here) {
        rank = rank0;
        for (int i = begin; i < end; i++) {
            if (!kept(i)) continue;
            before += weight(x[i], top, inverse);
            if (target < before) { chosen = i; break; }
        }
    }
    finish();
}

// A block a row: log-probability and rank of the target, then the `top` most likely.
extern "C" __global__ void __launch_bounds__(1024)
logprobs(const float *logits, const int *targets, int vocab, int top, float *logprob, int *rank,
         int *top_ids, float *top_logprobs) {
    let_next_start();
    wait_for_previous();
    __shared__ u64 best;
    __shared__ int above;
    const float *x = logits + (long long)blockIdx.x * vocab;
    int target = targets[blockIdx.x];
    if (threadIdx.x == 0) best = 0, above = 0;
    __syncthreads();
    // Order: higher logit first, then lower id.
    auto key = [&](int i) { return u64(ordered(x[i])) << 32 | u32(~i); };
    u64 mine = 0;
    int more = 0;
    for (int i = threadIdx.x; i < vocab; i += blockDim.x) {
        mine = max(mine, key(i));
        more += x[i] > x[target];
    }
    atomicMax(&best, mine);
    atomicAdd(&above, more);
    __syncthreads();
    float highest = x[~u32(best)], sum = 0.f;
    for (int i = threadIdx.x; i < vocab; i += blockDim.x) sum += expf(x[i] - highest);
    float norm = highest + logf(block_sum(sum));
    if (threadIdx.x == 0) logprob[blockIdx.x] = x[target] - norm, rank[blockIdx.x] = above + 1;
    u64 last = ~0ull;
    for (int n = 0; n < top; n++) {
        __syncthreads();
        if (threadIdx.x == 0) best = 0;
        __syncthreads();
        mine = 0;
        for (int i = threadIdx.x; i < vocab; i += blockDim.x) {
            u64 own = key(i);
            if (own < last) mine = max(mine, own);
        }
        atomicMax(&best, mine);
        __syncthreads();
        last = best;
        if (threadIdx.x == 0) {
            int id = int(~u32(last));
            top_ids[blockIdx.x * top + n] = id;
            top_logprobs[blockIdx.x * top + n] = x[id] - norm;
        }
    }
}
