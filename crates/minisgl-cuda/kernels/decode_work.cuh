// How `decode.cu` divides a step's rows between blocks, and fetches a block's tiles.

// With 9 warps in all, a thread can have the registers that heads of 256 take, and on 10.0 all heads.
#define WARPS (DIM <= 128 && __CUDA_ARCH__ < 1000 ? 8 : 6)
// One thread names a tile in some 0.3 µs, in which an H200's memory gives a block more than one. On 10.0
// there are registers for one such warp.
#define FETCHERS (__CUDA_ARCH__ < 1000 ? 2 : 1)
#if CASCADE
#define ROWS_MAX 256
// What is divided between blocks: the rows, each behind what it shares, and lots of rows that share.
#define ENTRIES_MAX (ROWS_MAX + ROWS_MAX / 2)
#else
#define ROWS_MAX 512
#define ENTRIES_MAX ROWS_MAX
#endif
#define STAGES_MAX 48
// A head's sums in `partial`: with its best score and its sum of weights behind them.
#define PARTIAL_STRIDE (DIM + 4)

struct Args {
    bf16 *qkv; bf16 *k_pages; bf16 *v_pages; bf16 *out;
    const int *slots; const int *kv_len; const int *page_table; const int *store_at;
    const float *rope; const float *q_norm; const float *k_norm;
    float *partial; int *arrived;
    int rows, pages_a_row, page_shift, q_heads, kv_heads, stages, window, early;
    float q_eps, q_shift, k_eps, k_shift, scale, soft_cap;
#if CASCADE
    const int *lot_rows;   // [lots, lot_size], -1 behind a lot's rows
    const int *lot_tokens; // [lots], whole tiles; 0 for a lot that is not there
    const int *covered;    // [rows]: the tokens of a row's lot; 0 without one
    float *halves;         // [rows, q_heads, own and shared, PARTIAL_STRIDE]
    int *joined;           // [rows, kv_heads]: halves that are there
    int lots, lot_size;
#endif
};

#if CASCADE
// Whether an entry is a row's own tokens and not a lot's shared ones.
__device__ __forceinline__ bool is_own(const Args &a, int entry) { return entry < a.rows; }
// The row of a lot's member; -1 where there is none.
__device__ __forceinline__ int member(const Args &a, int entry, int i) { return a.lot_rows[(entry - a.rows) * a.lot_size + i]; }
#endif

// What a block takes of a unit: tiles `first..last` of the row's `tiles`, counted from its first seen one.
// With CASCADE, a `row` is an entry: one of the rows, or behind them one of the lots.
struct Segment { int row, kv_head, kv_len, first, last, tiles, seen_from; };

// The entries, the query heads of unit `s`, and those that have a place in a warp's sums.
#if CASCADE
#define ENTRIES (a.rows + a.lots)
#define UNIT_HEADS (group * (is_own(a, s.row) ? 1 : a.lot_size))
#define SUM_HEADS 16
#else
#define ENTRIES a.rows
#define UNIT_HEADS group
#define SUM_HEADS group
#endif

// All rows: the tiles before each one for one KV head, its length, its slot. And this block's tiles, in
// the order in which it takes them: those of a unit that goes on in the next block first.
struct Work {
    const int *before, *lens, *slots;
#if CASCADE
    const int *skipped;
#endif
    int rows, kv_heads, from, to, share, window, ahead;

    __device__ __forceinline__ int tiles() const { return to - from; }
    // The last row that begins at or before `position`.
    __device__ __forceinline__ int row_at(int position) const {
        int low = 0, high = rows - 1;
        while (low < high) {
            int middle = (low + high + 1) / 2;
            if (before[middle] * kv_heads <= position) low = middle;
            else high = middle - 1;
        }
        return low;
    }
    // From the block's tile `index` on.
    __device__ __forceinline__ Segment at(int index) const {
        int position = from + index + ahead;
        if (position >= to) position -= tiles();
        Segment s;
        s.row = row_at(position);
        s.tiles = before[s.row + 1] - before[s.row], s.kv_len = lens[s.row];
        int inside = position - before[s.row] * kv_heads;
        s.kv_head = inside / s.tiles, s.first = inside % s.tiles;
        s.last = min(s.tiles, s.first + to - position);
#if CASCADE
        s.seen_from = skipped[s.row];
#else
        s.seen_from = window > 0 ? max(0, s.kv_len - window) / TILE : 0;
#endif
        return s;
    }
};

// Fills the rows and divides the tiles. Every thread calls it.
__device__ __forceinline__ Work divide(const Args &a, int *before, int *lens, int *slots, int *skipped) {
    __shared__ int warp_sums[WARPS];
    int thread = threadIdx.x, warp = thread / 32, lane = thread & 31, total = 0;
    for (int base = 0; base < ENTRIES; base += WARPS * 32) {
        int row = base + thread, mine = 0;
        bool has = thread < WARPS * 32 && row < ENTRIES;
        if (has) {
#if CASCADE
            int len = is_own(a, row) ? a.kv_len[row] : a.lot_tokens[row - a.rows];
            lens[row] = len;
            slots[row] = len > 0 ? a.slots[is_own(a, row) ? row : member(a, row, 0)] : 0;
            skipped[row] = is_own(a, row) && len > 0 ? a.covered[row] / TILE : 0;
            mine = (len + TILE - 1) / TILE - skipped[row];
#else
            int len = a.kv_len[row];
            lens[row] = len, slots[row] = a.slots[row];
            mine = (len + TILE - 1) / TILE - (a.window > 0 ? max(0, len - a.window) / TILE : 0);
#endif
        }
        int sum = mine;
#pragma unroll
        for (int i = 1; i < 32; i *= 2) {
            int other = __shfl_up_sync(~0u, sum, i);
            if (lane >= i) sum += other;
        }
        if (warp < WARPS && lane == 31) warp_sums[warp] = sum;
        __syncthreads();
        int ahead = total;
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            if (w < warp) ahead += warp_sums[w];
            total += warp_sums[w];
        }
        if (has) before[row] = ahead + sum - mine;
        __syncthreads();
    }
    if (thread == 0) before[ENTRIES] = total;
    __syncthreads();
    // So few blocks that each warp of theirs has a tile.
    int all = total * a.kv_heads, share = max(WARPS, (all + int(gridDim.x) - 1) / int(gridDim.x));
    int from = min(all, int(blockIdx.x) * share), to = min(all, from + share);
#if CASCADE
    Work work = {before, lens, slots, skipped, ENTRIES, a.kv_heads, from, to, share, a.window, 0};
#else
    Work work = {before, lens, slots, ENTRIES, a.kv_heads, from, to, share, a.window, 0};
#endif
    if (from == to) return work;
    Segment end = work.at(to - from - 1);
    if (end.last < end.tiles) work.ahead = max(0, to - end.last - from);
    return work;
}

struct Ring {
    u32 memory, full, free;
    int stages, stage = 0, parity = 0;
    __device__ void skip(int count) {
        stage += count;
        while (stage >= stages) stage -= stages, parity ^= 1;
    }
};

// Where the block's tile `index` begins in the cache, in rows.
__device__ __forceinline__ int find(const Args &a, const Work &work, int index) {
    if (index >= work.tiles()) return 0;
    Segment s = work.at(index);
    int token = (s.seen_from + s.first) * TILE, inside = token & (1 << a.page_shift) - 1;
    int page = a.page_table[(long long)work.slots[s.row] * a.pages_a_row + (token >> a.page_shift)];
    return (page * a.kv_heads + s.kv_head << a.page_shift) + inside;
}

// Of every FETCHERS tiles of the block's share, the one that is this warp's. Lanes look up 32 tiles while 32
// are fetched.
__device__ __forceinline__ void fetch_all(const Args &a, const Work &work, const TensorMap &k_map, const TensorMap &v_map, Ring ring, int fetcher) {
    int lane = threadIdx.x & 31, next = find(a, work, fetcher + lane * FETCHERS);
    ring.skip(fetcher);
    for (int first = fetcher; first < work.tiles(); first += 32 * FETCHERS) {
        int now = next;
        next = find(a, work, first + (32 + lane) * FETCHERS);
        for (int i = 0; i < 32 && first + i * FETCHERS < work.tiles(); i++, ring.skip(FETCHERS)) {
            int y = __shfl_sync(~0u, now, i);
            if (lane > 0) continue;
            u32 barrier = ring.full + 8 * ring.stage, to = ring.memory + ring.stage * STAGE_BYTES;
            barrier_wait(ring.free + 8 * ring.stage, ring.parity ^ 1);
            barrier_expect(barrier, STAGE_BYTES);
            fetch_parts(to, k_map, barrier, y);
            fetch_parts(to + MATRIX_BYTES, v_map, barrier, y);
        }
    }
}
