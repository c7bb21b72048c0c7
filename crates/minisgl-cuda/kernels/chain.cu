// A decode step of up to 8 rows in one launch, on compute capability 9.0: its products and attentions,
// one behind the other, without a barrier between them.
//
// A link is a product out[m, n] = Σ_k x[m, k] · w[n, k] with what is fused with it, or a layer's decode
// attention. Every block takes its share of each link, and there are no more blocks than the card runs at
// once. What a link leaves for later ones it writes in words of 8 bytes: two bf16 and a tag that no other
// link and no other launch has. Whoever needs them reads until the tags are right: no flag, no fence, no
// meeting lies between a value's writing and its reading (NCCL's LL protocol does the same between
// cards). Two such buffers for each tensor, in turn, are enough, since each link needs all that the link
// before has left, but for an attention, behind which a product does. What all blocks read is left in
// several copies, lest they queue for it.
//
// What a link reads is known long before what it computes on: a block's ninth warp walks the same links
// and fetches weights, K and V into a ring of slots without waiting for anybody, so that memory does not
// rest while values travel.
//
// A product's block walks tiles of 8 · TILES rows of w (gated: 8 of the gate and 8 of up), up to ROUNDS
// of them at once; a slot is 512 elements of each row. Eight warps take 64 of these each. Lane (g, t)
// reads 16 bytes of row g: with rows 64 bytes further apart than their lengths, a quarter warp's reads
// hit all banks. The order of k inside a chunk of 32 is permuted alike for x and w; a norm's factor is
// applied to the sums.
//
// An attention's unit is a row's KV head with its group of query heads, a tile 16 tokens of a unit, in a
// slot. All units' tiles, behind one another, are divided evenly between the blocks; warps take them in
// turn. Where a unit is spread over blocks, the first one merges what the others leave.

#define ROWS 8
#define WARPS 8
#define THREADS (WARPS * 32)
#define SLOTS 8
#define SLOT_BYTES (18 << 10)
#define CHUNK 64
#define SLOT_K (WARPS * CHUNK)
#define ROW_BYTES (SLOT_K * 2 + 64)
#define ROUNDS 4

#define TILE 16
#define MATRIX_BYTES (TILE * DIM * 2)
#define PAIRS_A_LANE (DIM / 128 + (DIM < 128))
#define Q_STRIDE (DIM + 8)

// Tensors between links are plain or tagged: what comes from before the chain is plain, and what nothing in
// the chain overwrites is written plain, too.
struct Matmul {
    const bf16 *x; const uint2 *x_tagged; const bf16 *w; const float *norm; const float *bias;
    const bf16 *old; const uint2 *old_tagged; void *out; uint2 *out_tagged;
    int rows, n, k, tiles, gated, gelu, out_f32;
    int x_copies, out_copies;  // `ROWS · k / 2` and `ROWS · n / 2` words apart
    u32 x_tag, out_tag, old_tag;
    float eps, shift;
};

struct Attend {
    const uint2 *qkv_tagged; bf16 *out; uint2 *out_tagged; uint2 *partial;
    bf16 *k_pages; bf16 *v_pages; const TensorMap *maps;
    const int *slots; const int *kv_len; const int *page_table; const int *store_at;
    const float *rope; const float *q_norm; const float *k_norm;
    int rows, pages_a_row, page_shift, q_heads, kv_heads, window;
    int out_copies;  // `ROWS · q_heads · DIM / 2` words apart
    u32 qkv_tag, out_tag;
    float q_eps, q_shift, k_eps, k_shift, scale, soft_cap;
};

struct Link {
    int is_attention;
    union { Matmul matmul; Attend attend; };
};

// ---- tagged words ----

__device__ __forceinline__ uint4 peek(const uint2 *at) {
    uint4 x;
    asm volatile("ld.volatile.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "l"(at) : "memory");
    return x;
}
__device__ __forceinline__ uint2 peek_one(const uint2 *at) {
    uint2 x;
    asm volatile("ld.volatile.global.v2.u32 {%0, %1}, [%2];" : "=r"(x.x), "=r"(x.y) : "l"(at) : "memory");
    return x;
}
__device__ __forceinline__ u32 await(const uint2 *at, u32 tag) {
    uint2 x;
    do x = peek_one(at);
    while (x.y != tag);
    return x.x;
}
__device__ __forceinline__ void leave(uint2 *at, u32 value, u32 tag) {
    asm volatile("st.volatile.global.v2.u32 [%0], {%1, %2};" :: "l"(at), "r"(value), "r"(tag) : "memory");
}
__device__ __forceinline__ void leave_two(uint2 *at, u32 first, u32 second, u32 tag) {
    asm volatile("st.volatile.global.v4.u32 [%0], {%1, %2, %3, %2};" :: "l"(at), "r"(first), "r"(tag), "r"(second) : "memory");
}

// ---- the ring ----

// Slots in shared memory. `used` counts those that were used up to the current link's, or slot's.
struct Slots {
    u32 memory, full, free, used;
    __device__ u32 at(u32 i) const { return memory + (used + i) % SLOTS * SLOT_BYTES; }
    __device__ u32 full_at(u32 i) const { return full + 8 * ((used + i) % SLOTS); }
    __device__ u32 free_at(u32 i) const { return free + 8 * ((used + i) % SLOTS); }
    __device__ u32 parity(u32 i) const { return (used + i) / SLOTS & 1; }
};
__device__ __forceinline__ void barrier_arrive_as(u32 barrier, u32 count) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], %1;" :: "r"(barrier), "r"(count) : "memory");
}
__device__ __forceinline__ uint4 load_shared(u32 at) {
    uint4 x;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "r"(at) : "memory");
    return x;
}

// ---- products ----

// Columns of the output in a tile.
__device__ __forceinline__ int columns_of(const Matmul &p) { return p.gated ? 8 : 8 * p.tiles; }

// The tiles that a block takes at once, from column `base` on: `count` of them, `stride` apart.
struct Group {
    int count, stride;
    __device__ Group(const Matmul &p, int base) {
        stride = gridDim.x * columns_of(p);
        count = min(ROUNDS, (p.n - base + stride - 1) / stride);
    }
};

__device__ __forceinline__ void fetch_product(const Matmul &p, Slots &slots) {
    int lane = threadIdx.x & 31, rows = 8 * p.tiles, i = lane % rows;
    for (int base = blockIdx.x * columns_of(p); base < p.n;) {
        Group group(p, base);
        for (int k = 0; k < p.k; k += SLOT_K)
            for (int r = 0; r < group.count; r++, slots.used++) {
                int n = min(base + r * group.stride + (p.gated ? i & 7 : i), p.n - 1) + (p.gated && i >= 8 ? p.n : 0);
                u32 bytes = min(SLOT_K, p.k - k) * 2;
                barrier_wait(slots.free_at(0), slots.parity(0) ^ 1);
                if (lane == 0) barrier_expect(slots.full_at(0), bytes * rows);
                __syncwarp();
                if (lane < rows) fetch_bytes(slots.at(0) + i * ROW_BYTES, p.w + (long long)n * p.k + k, bytes, slots.full_at(0));
            }
        base += ROUNDS * group.stride;
    }
}

// x of HELD slots' parts of a warp, as factors.
template <int HELD> struct Factors {
    u32 f[HELD][2][4];

    // Where a lane reads its part of slot `i`: what is behind the end is read from before it.
    static __device__ __forceinline__ int at(const Matmul &p, int k0, int i, int s) {
        return min(k0 + i * SLOT_K + s * 32 + int(threadIdx.x & 3) * 8, p.k - 8);
    }
    // Reads until the tags are right. No branch keeps one read waiting for another.
    __device__ __forceinline__ void load(const Matmul &p, int k0, u32 epoch) {
        int row = min(int(threadIdx.x & 31) / 4, p.rows - 1);
        if (!p.x_tagged) {
#pragma unroll
            for (int i = 0; i < HELD; i++)
#pragma unroll
                for (int s = 0; s < 2; s++) {
                    uint4 v = __ldcg((const uint4 *)(p.x + (long long)row * p.k + at(p, k0, i, s)));
                    f[i][s][0] = v.x, f[i][s][1] = v.y, f[i][s][2] = v.z, f[i][s][3] = v.w;
                }
            return;
        }
        const uint2 *tagged = p.x_tagged + ((long long)(blockIdx.x % p.x_copies) * ROWS + row) * p.k / 2;
        u32 tag = epoch + p.x_tag, wrong;
        do {
            wrong = 0;
#pragma unroll
            for (int i = 0; i < HELD; i++)
#pragma unroll
                for (int s = 0; s < 2; s++) {
                    int k = at(p, k0, i, s);
                    uint4 a = peek(tagged + k / 2), b = peek(tagged + k / 2 + 2);
                    f[i][s][0] = a.x, f[i][s][1] = a.z, f[i][s][2] = b.x, f[i][s][3] = b.z;
                    wrong |= a.y ^ tag | a.w ^ tag | b.y ^ tag | b.w ^ tag;
                }
        } while (wrong);
        __syncwarp();
    }
    // As `load`, and by the norm's weights, which are read while x is awaited. The squares are summed up
    // where that is wanted.
    __device__ __forceinline__ void load_normed(const Matmul &p, int k0, u32 epoch, bool sum, float &squares) {
        float4 scale[HELD][2][2];
#pragma unroll
        for (int i = 0; i < HELD; i++)
#pragma unroll
            for (int s = 0; s < 2; s++) {
                const float4 *from = (const float4 *)(p.norm + at(p, k0, i, s));
                scale[i][s][0] = __ldg(from), scale[i][s][1] = __ldg(from + 1);
            }
        load(p, k0, epoch);
#pragma unroll
        for (int i = 0; i < HELD; i++)
#pragma unroll
            for (int s = 0; s < 2; s++) {
                bool counts = sum && k0 + i * SLOT_K + s * 32 + int(threadIdx.x & 3) * 8 < p.k;
                const float *by = (const float *)scale[i][s];
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    float low = low_half(f[i][s][j]), high = high_half(f[i][s][j]);
                    if (counts) squares += low * low + high * high;
                    f[i][s][j] = pack(low * (by[2 * j] + p.shift), high * (by[2 * j + 1] + p.shift));
                }
            }
    }
};

// What the warps have summed: [tile][warp][8 rows of w][row][8], and the squares.
struct ProductSums {
    float (*sums)[WARPS][2][ROWS][8];
    float (*squares)[ROWS];
};

template <int TILES, int HELD, bool NORM>
__device__ __forceinline__ void multiply(const Matmul &p, const ProductSums &shared, Slots &slots, u32 epoch) {
    int warp = threadIdx.x / 32, lane = threadIdx.x & 31, g = lane / 4, t = lane & 3;
    int columns = columns_of(p), half_bits = TILES == 1 || p.gated ? 2 : 3;
    int steps = (p.k + SLOT_K - 1) / SLOT_K, held = -1, k0 = warp * CHUNK;
    float squares = 0.f;
    Factors<HELD> x;
    for (int base = blockIdx.x * columns; base < p.n;) {
        Group group(p, base);
        float acc[ROUNDS][TILES][4] = {};
        for (int first = 0; first < steps; first += HELD) {
            if (held != first) {
                if (NORM) x.load_normed(p, k0 + first * SLOT_K, epoch, base == blockIdx.x * columns, squares);
                else x.load(p, k0 + first * SLOT_K, epoch);
                held = first;
            }
#pragma unroll
            for (int i = 0; i < HELD; i++) {
                if (first + i >= steps) break;
#pragma unroll
                for (int r = 0; r < ROUNDS; r++) {
                    if (r >= group.count) break;
                    barrier_wait(slots.full_at(0), slots.parity(0));
                    uint4 w[2][TILES];
#pragma unroll
                    for (int s = 0; s < 2; s++)
#pragma unroll
                        for (int j = 0; j < TILES; j++) w[s][j] = load_shared(slots.at(0) + (j * 8 + g) * ROW_BYTES + (k0 + s * 32 + t * 8) * 2);
#pragma unroll
                    for (int s = 0; s < 2; s++) {
                        // Behind the row's end, a slot holds what was there before.
                        if ((first + i) * SLOT_K + k0 + s * 32 + t * 8 >= p.k)
#pragma unroll
                            for (int j = 0; j < TILES; j++) w[s][j] = make_uint4(0, 0, 0, 0);
#pragma unroll
                        for (int j = 0; j < TILES; j++) mma(acc[r][j], x.f[i][s][0], 0, x.f[i][s][1], 0, w[s][j].x, w[s][j].y);
#pragma unroll
                        for (int j = 0; j < TILES; j++) mma(acc[r][j], x.f[i][s][2], 0, x.f[i][s][3], 0, w[s][j].z, w[s][j].w);
                    }
                    __syncwarp();
                    if (lane == 0) barrier_arrive(slots.free_at(0));
                    slots.used++;
                }
            }
        }
#pragma unroll
        for (int r = 0; r < ROUNDS; r++)
#pragma unroll
            for (int j = 0; j < TILES; j++)
                if (r < group.count) *(float2 *)&shared.sums[r][warp][j][g][2 * t] = make_float2(acc[r][j][0], acc[r][j][1]);
        if (NORM) {
            float q = squares;
            q += __shfl_xor_sync(~0u, q, 1);
            q += __shfl_xor_sync(~0u, q, 2);
            if (t == 0) shared.squares[warp][g] = q;
        }
        // Two columns a thread, and no more: ROUNDS · ROWS · 16 columns.
        int c = (threadIdx.x & (1 << half_bits) - 1) * 2, row = threadIdx.x >> half_bits & ROWS - 1;
        int r = threadIdx.x >> half_bits + 3, n = base + r * group.stride + c;
        long long at = (long long)row * p.n + n;
        bool writes = r < group.count && row < p.rows && n < p.n;
        u32 old = 0;
        if (writes && p.old && !p.old_tagged) old = __ldcg((const u32 *)(p.old + at));
        named_barrier(1, THREADS);
        if (writes) {
            uint2 seen = make_uint2(old, 0);
            if (p.old_tagged) seen = peek_one(p.old_tagged + at / 2);
            float2 total = make_float2(0.f, 0.f), up = total;
            float factor = 1.f;
#pragma unroll
            for (int v = 0; v < WARPS; v++) {
                float2 part = *(float2 *)&shared.sums[r][v][p.gated ? 0 : c / 8][row][c & 7];
                total.x += part.x, total.y += part.y;
                if (!p.gated) continue;
                part = *(float2 *)&shared.sums[r][v][1][row][c];
                up.x += part.x, up.y += part.y;
            }
            if (NORM) {
                float q = 0.f;
#pragma unroll
                for (int v = 0; v < WARPS; v++) q += shared.squares[v][row];
                factor = rsqrtf(q / p.k + p.eps);
            }
            float first = total.x * factor, second = total.y * factor;
            bool two = n + 1 < p.n;
            if (p.bias) first += p.bias[n], second += two ? p.bias[n + 1] : 0.f;
            if (p.gated) {
                up.x *= factor, up.y *= factor;
                if (p.bias) up.x += p.bias[p.n + n], up.y += two ? p.bias[p.n + n + 1] : 0.f;
                first = activate(first, p.gelu) * up.x, second = activate(second, p.gelu) * up.y;
            }
            if (p.old_tagged) old = seen.y == epoch + p.old_tag ? seen.x : await(p.old_tagged + at / 2, epoch + p.old_tag);
            first += low_half(old), second += high_half(old);
            if (p.out_f32) {
                ((float *)p.out)[at] = first;
                if (two) ((float *)p.out)[at + 1] = second;
            } else {
                u32 both = pack(first, second);
                for (int copy = 0; copy < p.out_copies; copy++)
                    leave(p.out_tagged + ((long long)copy * ROWS * p.n + at) / 2, both, epoch + p.out_tag);
                if (p.out) *(u32 *)((bf16 *)p.out + at) = both;
            }
        }
        named_barrier(1, THREADS);
        base += ROUNDS * group.stride;
    }
}

// ---- attention ----

#if DIM
// What a block takes of a unit: tiles `first..last` of the row's `tiles`, counted from its first seen one.
struct Segment { int row, kv_head, kv_len, first, last, tiles, seen_from; };

// The rows' lengths and slots, and this block's tiles.
struct Work {
    const int *lens, *slots;
    int rows, kv_heads, from, to, share, window;

    __device__ __forceinline__ int seen_from(int row) const { return window > 0 ? max(0, lens[row] - window) / TILE : 0; }
    __device__ __forceinline__ int tiles(int row) const { return (lens[row] + TILE - 1) / TILE - seen_from(row); }

    __device__ void divide(const Attend &a, const int *all_lens, const int *all_slots) {
        lens = all_lens, slots = all_slots, rows = a.rows, kv_heads = a.kv_heads, window = a.window;
        int all = 0;
        for (int row = 0; row < rows; row++) all += tiles(row);
        all *= kv_heads;
        // So few blocks that each warp of theirs has a tile.
        share = max(WARPS, (all + int(gridDim.x) - 1) / int(gridDim.x));
        from = min(all, int(blockIdx.x) * share), to = min(all, from + share);
    }
    __device__ __forceinline__ Segment at(int position) const {
        Segment s;
        int before = 0;
        for (s.row = 0; s.row < rows - 1 && before + tiles(s.row) * kv_heads <= position; s.row++) before += tiles(s.row) * kv_heads;
        s.tiles = tiles(s.row), s.kv_len = lens[s.row], s.seen_from = seen_from(s.row);
        s.kv_head = (position - before) / s.tiles, s.first = (position - before) % s.tiles;
        s.last = min(s.tiles, s.first + to - position);
        return s;
    }
};

// Where the tile at `position` begins in the cache, in rows.
__device__ __forceinline__ int find(const Attend &a, const Work &work, int position) {
    if (position >= work.to) return 0;
    Segment s = work.at(position);
    int token = (s.seen_from + s.first) * TILE, inside = token & (1 << a.page_shift) - 1;
    int page = a.page_table[(long long)work.slots[s.row] * a.pages_a_row + (token >> a.page_shift)];
    return (page * a.kv_heads + s.kv_head << a.page_shift) + inside;
}

// Lanes look up 32 tiles while 32 are fetched.
__device__ __forceinline__ void fetch_attention(const Attend &a, const Work &work, Slots &slots) {
    int lane = threadIdx.x & 31, next = find(a, work, work.from + lane);
    for (int first = work.from; first < work.to; first += 32) {
        int now = next;
        next = find(a, work, first + 32 + lane);
        for (int i = 0; i < min(32, work.to - first); i++, slots.used++) {
            int y = __shfl_sync(~0u, now, i);
            if (lane > 0) continue;
            barrier_wait(slots.free_at(0), slots.parity(0) ^ 1);
            barrier_expect(slots.full_at(0), 2 * MATRIX_BYTES);
            fetch_parts(slots.at(0), a.maps[0], slots.full_at(0), y);
            fetch_parts(slots.at(0) + MATRIX_BYTES, a.maps[1], slots.full_at(0), y);
        }
    }
}

// A row's q, k and v as the link before has left them.
struct Source {
    const uint2 *words; u32 tag;
    __device__ uint2 look(int i) const { return peek_one(words + i / 2); }
};

// A head's `DIM` numbers over a warp: lane l holds pairs l, l + 32, .. of the low half and of the high.
__device__ __forceinline__ bool holds(int j) { return 2 * (int(threadIdx.x & 31) + 32 * j) < DIM / 2; }
__device__ __forceinline__ int index(int j) { return 2 * ((threadIdx.x & 31) + 32 * j); }

// What a head is normed and rotated by, read while the head is awaited.
struct Turn {
    float2 low[PAIRS_A_LANE], high[PAIRS_A_LANE], cosines[PAIRS_A_LANE], sines[PAIRS_A_LANE];
    __device__ __forceinline__ Turn(const float *weight, const float *angles) {
#pragma unroll
        for (int j = 0; j < PAIRS_A_LANE; j++) {
            low[j] = high[j] = cosines[j] = sines[j] = make_float2(0.f, 0.f);
            if (!holds(j)) continue;
            int i = index(j);
            if (weight) low[j] = __ldg((const float2 *)(weight + i)), high[j] = __ldg((const float2 *)(weight + i + DIM / 2));
            cosines[j] = __ldg((const float2 *)(angles + i)), sines[j] = __ldg((const float2 *)(angles + i + DIM / 2));
        }
    }
};

struct Head {
    uint2 low[PAIRS_A_LANE], high[PAIRS_A_LANE];

    __device__ __forceinline__ void look(const Source &from, int first) {
#pragma unroll
        for (int j = 0; j < PAIRS_A_LANE; j++) {
            if (!holds(j)) continue;
            low[j] = from.look(first + index(j)), high[j] = from.look(first + index(j) + DIM / 2);
        }
    }
    // Looks again until the tags are right.
    __device__ __forceinline__ void await(const Source &from, int first) {
#pragma unroll
        for (int j = 0; j < PAIRS_A_LANE; j++)
            while (holds(j) && (low[j].y != from.tag || high[j].y != from.tag))
                low[j] = from.look(first + index(j)), high[j] = from.look(first + index(j) + DIM / 2);
        __syncwarp();
    }
    // Norms (a null weight does not) and rotates, in place.
    __device__ __forceinline__ void turn(const Turn &by, bool norm, float eps, float shift) {
        float2 l[PAIRS_A_LANE], h[PAIRS_A_LANE];
        float squares = 0.f, factor = 1.f;
#pragma unroll
        for (int j = 0; j < PAIRS_A_LANE; j++) {
            l[j] = h[j] = make_float2(0.f, 0.f);
            if (!holds(j)) continue;
            l[j] = make_float2(low_half(low[j].x), high_half(low[j].x)), h[j] = make_float2(low_half(high[j].x), high_half(high[j].x));
            squares += l[j].x * l[j].x + l[j].y * l[j].y + h[j].x * h[j].x + h[j].y * h[j].y;
        }
        if (norm) factor = rsqrtf(warp_sum(squares) / DIM + eps);
#pragma unroll
        for (int j = 0; j < PAIRS_A_LANE; j++) {
            if (!holds(j)) continue;
            if (norm) {
                float2 w = by.low[j], v = by.high[j];
                l[j].x *= factor * (w.x + shift), l[j].y *= factor * (w.y + shift);
                h[j].x *= factor * (v.x + shift), h[j].y *= factor * (v.y + shift);
            }
            float2 c = by.cosines[j], s = by.sines[j];
            low[j].x = pack(l[j].x * c.x - h[j].x * s.x, l[j].y * c.y - h[j].y * s.y);
            high[j].x = pack(h[j].x * c.x + l[j].x * s.x, h[j].y * c.y + l[j].y * s.y);
        }
    }
};

__device__ __forceinline__ void load_matrices(u32 (&r)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}
__device__ __forceinline__ void load_transposed(u32 (&r)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}
// Where 16 bytes of a tile's matrix lie.
__device__ __forceinline__ u32 in_tile(int row, int chunk) {
    return chunk / 8 * TILE * 128 + row * 128 + ((chunk ^ row) & 7) * 16;
}

__device__ __forceinline__ Source source_of(const Attend &a, int row, u32 epoch) {
    return {a.qkv_tagged + (long long)row * (a.q_heads + 2 * a.kv_heads) * DIM / 2, epoch + a.qkv_tag};
}

// The new token's k and v, into their page and into the tile at `tile`; what is behind it there becomes
// zeros, since 0 · NaN is NaN. A whole warp.
__device__ __forceinline__ void add_token(const Attend &a, const Segment &s, u32 tile, u32 epoch) {
    int lane = threadIdx.x & 31, row = (s.kv_len - 1) & (TILE - 1), slot = a.store_at[s.row];
    Source from = source_of(a, s.row, epoch);
    int at_k = (a.q_heads + s.kv_head) * DIM, at_v = at_k + a.kv_heads * DIM;
    long long to = (((long long)(slot >> a.page_shift) * a.kv_heads + s.kv_head << a.page_shift) + (slot & (1 << a.page_shift) - 1)) * DIM;
    Turn by(a.k_norm, a.rope + (long long)(s.kv_len - 1) * DIM);
    Head k, v;
    k.look(from, at_k), v.look(from, at_v);
    k.await(from, at_k), v.await(from, at_v);
    k.turn(by, a.k_norm, a.k_eps, a.k_shift);
#pragma unroll
    for (int j = 0; j < PAIRS_A_LANE; j++) {
        if (!holds(j)) continue;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int i = index(j) + half * DIM / 2;
            u32 x = half ? k.high[j].x : k.low[j].x, y = half ? v.high[j].x : v.low[j].x, at = tile + in_tile(row, i / 8) + i % 8 * 2;
            asm volatile("st.shared.u32 [%0], %1;" :: "r"(at), "r"(x) : "memory");
            asm volatile("st.shared.u32 [%0], %1;" :: "r"(at + MATRIX_BYTES), "r"(y) : "memory");
            if (slot >= 0) *(u32 *)(a.k_pages + to + i) = x, *(u32 *)(a.v_pages + to + i) = y;
        }
    }
    for (int i = lane; i < (TILE - 1 - row) * (DIM / 8); i += 32) {
        u32 at = tile + MATRIX_BYTES + in_tile(row + 1 + i / (DIM / 8), i % (DIM / 8));
        asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" :: "r"(at), "r"(0) : "memory");
    }
    // The copy engine may overwrite this only behind it.
    publish_shared();
    __syncwarp();
}

// A warp's sums over its tiles of a unit. Lane (g, t) holds o[j][2h + e]: head g + 8h, dimension 8j + 2t + e.
struct Sums {
    float o[DIM / 8][4], top[2], sum[2];

    __device__ void clear() {
#pragma unroll
        for (int j = 0; j < DIM / 8; j++) o[j][0] = o[j][1] = o[j][2] = o[j][3] = 0.f;
        top[0] = top[1] = -infinity(), sum[0] = sum[1] = 0.f;
    }

    __device__ void add(const Attend &a, const Segment &s, int base, u32 tile, const u32 (&q)[DIM / 16][4]) {
        int lane = threadIdx.x & 31, t = lane & 3;
        float x[2][4] = {};
        u32 b[4];
#pragma unroll
        for (int i = 0; i < DIM / 16; i++) {
            load_matrices(b, tile + in_tile((lane & 7) + (lane >> 4) * 8, 2 * i + (lane >> 3 & 1)));
            mma(x[0], q[i][0], q[i][1], q[i][2], q[i][3], b[0], b[1]);
            mma(x[1], q[i][0], q[i][1], q[i][2], q[i][3], b[2], b[3]);
        }
        float scale = (a.soft_cap > 0.f ? 1.f : a.scale) * 1.4426950408889634f;
        bool whole = base + TILE <= s.kv_len && (a.window <= 0 || base >= s.kv_len - a.window);
#pragma unroll
        for (int h = 0; h < HALVES; h++) {
            float best = top[h];
#pragma unroll
            for (int n = 0; n < 2; n++)
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    float &y = x[n][2 * h + e];
                    if (a.soft_cap > 0.f) y = a.soft_cap * tanhf(y * a.scale / a.soft_cap);
                    int token = base + n * 8 + 2 * t + e;
                    if (!whole && (token >= s.kv_len || (a.window > 0 && token < s.kv_len - a.window))) y = -infinity();
                    best = fmaxf(best, y);
                }
            best = fmaxf(best, __shfl_xor_sync(~0u, best, 1));
            best = fmaxf(best, __shfl_xor_sync(~0u, best, 2));
            float safe = best == -infinity() ? 0.f : best * scale, shrink = power_of_2(top[h] * scale - safe);
            top[h] = best, sum[h] *= shrink;
#pragma unroll
            for (int n = 0; n < 2; n++)
#pragma unroll
                for (int e = 0; e < 2; e++) sum[h] += x[n][2 * h + e] = power_of_2(x[n][2 * h + e] * scale - safe);
#pragma unroll
            for (int j = 0; j < DIM / 8; j++) o[j][2 * h] *= shrink, o[j][2 * h + 1] *= shrink;
        }
        u32 p0 = pack(x[0][0], x[0][1]), p1 = HALVES > 1 ? pack(x[0][2], x[0][3]) : 0;
        u32 p2 = pack(x[1][0], x[1][1]), p3 = HALVES > 1 ? pack(x[1][2], x[1][3]) : 0;
#pragma unroll
        for (int j = 0; j < DIM / 16; j++) {
            load_transposed(b, tile + MATRIX_BYTES + in_tile((lane & 7) + (lane >> 3 & 1) * 8, 2 * j + (lane >> 4)));
            mma(o[2 * j], p0, p1, p2, p3, b[0], b[1]);
            mma(o[2 * j + 1], p0, p1, p2, p3, b[2], b[3]);
        }
    }
};

struct AttentionSums {
    bf16 *q;
    float *sums;             // [warp][head][DIM]
    float (*tops)[16][2];    // [warp][head]: best score, in powers of 2, and sum
};

// The unit's q, a warp a head, and as factors of products. What rows behind the group hold does not matter.
__device__ __forceinline__ void prepare_q(const Attend &a, const Segment &s, bf16 *shared, u32 (&q)[DIM / 16][4], u32 epoch) {
    int warp = threadIdx.x / 32, lane = threadIdx.x & 31, group = a.q_heads / a.kv_heads;
    Source from = source_of(a, s.row, epoch);
    for (int i = warp; i < group; i += WARPS) {
        Turn by(a.q_norm, a.rope + (long long)(s.kv_len - 1) * DIM);
        Head head;
        int first = (s.kv_head * group + i) * DIM;
        head.look(from, first), head.await(from, first);
        head.turn(by, a.q_norm, a.q_eps, a.q_shift);
#pragma unroll
        for (int j = 0; j < PAIRS_A_LANE; j++) {
            if (!holds(j)) continue;
            *(u32 *)(shared + i * Q_STRIDE + index(j)) = head.low[j].x;
            *(u32 *)(shared + i * Q_STRIDE + index(j) + DIM / 2) = head.high[j].x;
        }
    }
    named_barrier(1, THREADS);
    u32 address = shared_address(shared + (lane & 15) * Q_STRIDE + (lane >> 4) * 8);
#pragma unroll
    for (int i = 0; i < DIM / 16; i++) load_matrices(q[i], address + i * 32);
}

// Weighted values of one head and dimension pair, their best score and sum.
struct Part {
    float best, total;
    float2 value;
    __device__ void add(float top, float sum, float2 more) {
        float now = fmaxf(best, top), old = power_of_2(best - now), factor = power_of_2(top - now);
        best = now, total = total * old + sum * factor;
        value.x = value.x * old + more.x * factor, value.y = value.y * old + more.y * factor;
    }
};

// The warps' sums become the unit's, or, of a part of a unit, what the block leaves in `partial`.
__device__ __forceinline__ void merge(const Attend &a, const Work &work, const Segment &s, int position, const AttentionSums &shared, Sums &mine, u32 epoch) {
    int warp = threadIdx.x / 32, lane = threadIdx.x & 31, g = lane / 4, t = lane & 3, group = a.q_heads / a.kv_heads;
    float scale = (a.soft_cap > 0.f ? 1.f : a.scale) * 1.4426950408889634f;
    u32 tag = epoch + a.out_tag;
#pragma unroll
    for (int h = 0; h < HALVES; h++) {
        float sum = mine.sum[h];
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        int head = g + 8 * h;
        if (head >= group) continue;
        if (t == 0) shared.tops[warp][head][0] = mine.top[h] * scale, shared.tops[warp][head][1] = sum;
        float *to = shared.sums + (warp * group + head) * DIM + 2 * t;
#pragma unroll
        for (int j = 0; j < DIM / 8; j++) *(float2 *)(to + 8 * j) = make_float2(mine.o[j][2 * h], mine.o[j][2 * h + 1]);
    }
    named_barrier(1, THREADS);
    int begin = position - s.first, blocks = (begin + s.tiles - 1) / work.share - begin / work.share + 1;
    const int stride = 16 * (DIM + 2);
    long long out = ((long long)s.row * a.q_heads + s.kv_head * group) * DIM;
    for (int i = threadIdx.x; i < group * DIM / 2; i += THREADS) {
        int head = i / (DIM / 2), d = i % (DIM / 2) * 2;
        Part part = {-infinity(), 0.f, make_float2(0.f, 0.f)};
#pragma unroll
        for (int w = 0; w < WARPS; w++) part.best = fmaxf(part.best, shared.tops[w][head][0]);
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            float factor = power_of_2(shared.tops[w][head][0] - part.best);
            float2 value = *(const float2 *)(shared.sums + (w * group + head) * DIM + d);
            part.total += factor * shared.tops[w][head][1], part.value.x += factor * value.x, part.value.y += factor * value.y;
        }
        if (s.first > 0) {
            uint2 *to = a.partial + (long long)blockIdx.x * stride + head * (DIM + 2);
            leave_two(to + d, __float_as_uint(part.value.x), __float_as_uint(part.value.y), tag);
            if (d == 0) leave_two(to + DIM, __float_as_uint(part.best), __float_as_uint(part.total), tag);
            continue;
        }
        for (int b = 1; b < blocks; b++) {
            const uint2 *from = a.partial + (long long)(blockIdx.x + b) * stride + head * (DIM + 2);
            uint4 value, top;
            do value = peek(from + d), top = peek(from + DIM);
            while (value.y != tag || value.w != tag || top.y != tag || top.w != tag);
            part.add(__uint_as_float(top.x), __uint_as_float(top.z), make_float2(__uint_as_float(value.x), __uint_as_float(value.z)));
        }
        u32 both = pack(part.value.x / part.total, part.value.y / part.total);
        for (int copy = 0; copy < a.out_copies; copy++)
            leave(a.out_tagged + ((long long)copy * ROWS * a.q_heads * DIM + out + head * DIM + d) / 2, both, tag);
        if (a.out) *(u32 *)(a.out + out + head * DIM + d) = both;
    }
    named_barrier(1, THREADS);
}

__device__ __forceinline__ void attend(const Attend &a, const Work &work, const AttentionSums &shared, Slots &slots, u32 epoch) {
    int warp = threadIdx.x / 32, lane = threadIdx.x & 31;
    for (int position = work.from, next = work.from + warp; position < work.to;) {
        Segment s = work.at(position);
        int end = position + s.last - s.first;
        u32 q[DIM / 16][4];
        prepare_q(a, s, shared.q, q, epoch);
        Sums sums;
        sums.clear();
        for (; next < end; next += WARPS) {
            int tile = s.first + next - position, i = next - work.from;
            barrier_wait(slots.full_at(i), slots.parity(i));
            if (tile == s.tiles - 1) add_token(a, s, slots.at(i), epoch);
            sums.add(a, s, (s.seen_from + tile) * TILE, slots.at(i), q);
            __syncwarp();
            if (lane == 0) barrier_arrive_as(slots.free_at(i), WARPS);
        }
        merge(a, work, s, position, shared, sums, epoch);
        position = end;
    }
    slots.used += work.to - work.from;
    // Rows without tokens are zeros to the next link.
    int width = a.q_heads * DIM / 2;
    for (int row = 0; row < a.rows; row++)
        if (work.lens[row] == 0 && row == blockIdx.x)
            for (int i = threadIdx.x; i < width * a.out_copies; i += THREADS)
                leave(a.out_tagged + (i / width * ROWS + row) * width + i % width, 0, epoch + a.out_tag);
}
#endif

// `state`: the epoch of this launch, and the blocks that are done with it.
extern "C" __global__ void __launch_bounds__(THREADS + 128, 1) chain(const Link *program, int count, u32 *state) {
    extern __shared__ __align__(16) unsigned char memory[];
    __shared__ u64 barrier_words[2 * SLOTS];
    let_next_start();
    u32 begin = (shared_address(memory) + 1023) / 1024 * 1024, first_barrier = shared_address(barrier_words);
    Slots slots = {begin, first_barrier, first_barrier + 8 * SLOTS, 0};
    Link *links = (Link *)(memory + (begin - shared_address(memory)) + SLOTS * SLOT_BYTES);
    // What a product and what an attention has of its own lie at the same place.
    unsigned char *own = (unsigned char *)links + (count * int(sizeof(Link)) + 15) / 16 * 16;
    ProductSums products = {(float (*)[WARPS][2][ROWS][8])own, (float (*)[ROWS])(own + ROUNDS * WARPS * 2 * ROWS * 8 * 4)};
    for (int i = threadIdx.x; i < count * int(sizeof(Link) / 8); i += blockDim.x) ((u64 *)links)[i] = ((const u64 *)program)[i];
    if (threadIdx.x == 0) {
        for (int i = 0; i < SLOTS; i++) barrier_init(slots.full + 8 * i, 1), barrier_init(slots.free + 8 * i, WARPS);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
#if DIM
    __shared__ int lens[ROWS], slots_of[ROWS];
    __shared__ Work work;
    __shared__ float tops[WARPS][16][2];
    AttentionSums attentions = {(bf16 *)own, (float *)(own + 16 * Q_STRIDE * 2), tops};
    int first = 0;
    while (!links[first].is_attention) first++;
    // In a graph, page table and lengths are older than all its kernels.
    if (threadIdx.x < links[first].attend.rows)
        lens[threadIdx.x] = links[first].attend.kv_len[threadIdx.x], slots_of[threadIdx.x] = links[first].attend.slots[threadIdx.x];
    __syncthreads();
    if (threadIdx.x == 0) work.divide(links[first].attend, lens, slots_of);
    __syncthreads();
#endif
    if (threadIdx.x >= THREADS) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        for (int i = 0; i < count && threadIdx.x < THREADS + 32; i++) {
#if DIM
            if (links[i].is_attention) { fetch_attention(links[i].attend, work, slots); continue; }
#endif
            fetch_product(links[i].matmul, slots);
        }
        wait_for_previous();
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
        wait_for_previous();
        u32 epoch = *(volatile u32 *)state;
        for (int i = 0; i < count; i++) {
#if DIM
            if (links[i].is_attention) { attend(links[i].attend, work, attentions, slots, epoch); continue; }
#endif
            const Matmul &p = links[i].matmul;
            if (p.norm) {
                if (p.tiles == 1) multiply<1, 2, true>(p, products, slots, epoch);
                else multiply<2, 2, true>(p, products, slots, epoch);
            } else {
                if (p.tiles == 1) multiply<1, 4, false>(p, products, slots, epoch);
                else multiply<2, 4, false>(p, products, slots, epoch);
            }
        }
        named_barrier(1, THREADS);
        if (threadIdx.x == 0 && atomicAdd(state + 1, 1u) == gridDim.x - 1) state[0] = epoch + 1024, state[1] = 0;
    }
}
