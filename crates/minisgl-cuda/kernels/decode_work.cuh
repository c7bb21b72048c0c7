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
// Named barriers: of the summing warps, behind the last sums; of all, before the first tile.
#define SUMMED 1
#define READY 2
// A head's sums in `partial`: with its best score and its sum of weights behind them.
#define PARTIAL_STRIDE (DIM + 4)

struct Args {
    bf16 *qkv; bf16 *k_pages; bf16 *v_pages; bf16 *out;
    const int *slots; const int *kv_len; const int *page_table; const int *store_at;
    const float *rope; const float *q_norm; const float *k_norm;
    float *partial;
    int *arrived;          // [entries, kv_heads, 16]: parts of a head that are there
    int rows, pages_a_row, page_shift, q_heads, kv_heads, stages, window, early;
    float q_eps, q_shift, k_eps, k_shift, scale, soft_cap;
#if CASCADE
    const int *lot_rows;   // [lots, lot_size], -1 behind a lot's rows
    const int *lot_tokens; // [lots], whole tiles; 0 for a lot that is not there
    const int *covered;    // [rows]: the tokens of a row's lot; 0 without one
    float *halves;         // [rows, q_heads, own and shared, PARTIAL_STRIDE]
    int *joined;           // [rows, q_heads]: halves that are there
    int lots, lot_size;
#endif
};

#if CASCADE
// Whether an entry is a row's own tokens and not a lot's shared ones.
__device__ __forceinline__ bool is_own(const Args &a, int entry) { return entry < a.rows; }
// The row of a lot's member; -1 where there is none.
__device__ __forceinline__ int member(const Args &a, int entry, int i) { return a.lot_rows[(entry - a.rows) * a.lot_size + i]; }
#endif

// What a block takes of a unit, from its tile `index` on: tiles `first..last` of the row's `tiles`, counted
// from its first seen one.
// With CASCADE, a `row` is an entry: one of the rows, or behind them one of the lots.
struct Segment {
    int row, kv_head, kv_len, index, first, last, tiles, seen_from;
    __device__ __forceinline__ int end() const { return index + last - first; }
    // Whether a warp that sums takes any of its tiles.
    __device__ __forceinline__ bool has_for(int warp) const { return (warp + WARPS - index % WARPS) % WARPS < last - first; }
};

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
// the order in which it takes them: those of a unit that goes on in the next block first. They are of rows
// `first_row` to `last_row`.
struct Work {
    const int *before, *lens, *slots;
#if CASCADE
    const int *skipped;
#endif
    int kv_heads, from, to, share, window, ahead = 0, first_row = 0, last_row = 0;

    __device__ __forceinline__ int tiles() const { return to - from; }
    // The last of the block's rows that begins at or before `position`.
    __device__ __forceinline__ int row_at(int position) const {
        int low = first_row, high = last_row;
        while (low < high) {
            int middle = (low + high + 1) / 2;
            if (before[middle] * kv_heads <= position) low = middle;
            else high = middle - 1;
        }
        return low;
    }
    // The same of all `rows`. A whole warp looks: at 32 of them, then at those from one of these to the next.
    __device__ __forceinline__ int row_of_all_at(int position, int rows) const {
        static_assert(ENTRIES_MAX <= 32 * 32, "more rows than two looks are enough for");
        int row = 0, lane = threadIdx.x & 31;
#pragma unroll
        for (int apart = 32; apart > 0; apart /= 32) {
            int look = row + lane * apart;
            row += apart * (__popc(__ballot_sync(~0u, look < rows && before[look] * kv_heads <= position)) - 1);
        }
        return row;
    }
    // From the block's tile `index` on.
    __device__ __forceinline__ Segment at(int index) const {
        int position = from + index + ahead;
        if (position >= to) position -= tiles();
        Segment s;
        s.index = index;
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

// An entry's tokens, its slot in the page table, and the tiles of it that are not its own or not seen.
struct Entry { int len, slot, skipped; };
__device__ __forceinline__ Entry entry_at(const Args &a, int i) {
#if CASCADE
    if (!is_own(a, i)) {
        int len = a.lot_tokens[i - a.rows];
        return {len, len > 0 ? a.slots[member(a, i, 0)] : 0, 0};
    }
    int len = a.kv_len[i], slot = a.slots[i], covered = a.covered[i];
    return {len, slot, len > 0 ? covered / TILE : 0};
#else
    int len = a.kv_len[i], slot = a.slots[i];
    return {len, slot, a.window > 0 ? max(0, len - a.window) / TILE : 0};
#endif
}

// Fills the rows and divides the tiles. Each warp does so by itself, and writes what the others do: none waits
// for another.
__device__ __forceinline__ Work divide(const Args &a, int *before, int *lens, int *slots, int *skipped) {
    const int EACH = 4; // Rows of a lane that it reads at once.
    int lane = threadIdx.x & 31, total = 0;
#pragma unroll 1
    for (int base = 0; base < ENTRIES; base += 32 * EACH) {
        Entry entries[EACH];
        int row = base + lane * EACH, tiles[EACH], mine = 0;
#pragma unroll
        for (int i = 0; i < EACH; i++) entries[i] = row + i < ENTRIES ? entry_at(a, row + i) : Entry{0, 0, 0};
#pragma unroll
        for (int i = 0; i < EACH; i++) mine += tiles[i] = (entries[i].len + TILE - 1) / TILE - entries[i].skipped;
        int sum = mine;
#pragma unroll
        for (int i = 1; i < 32; i *= 2) {
            int other = __shfl_up_sync(~0u, sum, i);
            if (lane >= i) sum += other;
        }
        int ahead = total + sum - mine;
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            if (row + i < ENTRIES) {
                before[row + i] = ahead, lens[row + i] = entries[i].len, slots[row + i] = entries[i].slot;
#if CASCADE
                skipped[row + i] = entries[i].skipped;
#endif
            }
            ahead += tiles[i];
        }
        total += __shfl_sync(~0u, sum, 31);
    }
    if (lane == 0) before[ENTRIES] = total;
    if (RACE_CHECKED) __syncthreads();
    else __syncwarp();
    // So few blocks that each warp of theirs has a tile.
    int all = total * a.kv_heads, share = max(WARPS, (all + int(gridDim.x) - 1) / int(gridDim.x));
    int from = min(all, int(blockIdx.x) * share), to = min(all, from + share);
#if CASCADE
    Work work = {before, lens, slots, skipped, a.kv_heads, from, to, share, a.window};
#else
    Work work = {before, lens, slots, a.kv_heads, from, to, share, a.window};
#endif
    if (from == to) return work;
    work.first_row = work.row_of_all_at(from, ENTRIES), work.last_row = work.row_of_all_at(to - 1, ENTRIES);
    int row = work.last_row, begun = (to - before[row] * a.kv_heads) % (before[row + 1] - before[row]);
    work.ahead = max(0, to - from - begun);
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

// Of every FETCHERS tiles of the block's share, the one that is this warp's; the stages that it fetches into
// have their barriers from it. Lanes look up 32 tiles while 32 are fetched.
__device__ __forceinline__ void fetch_all(const Args &a, const Work &work, const TensorMap &k_map, const TensorMap &v_map, Ring ring, int fetcher) {
    int lane = threadIdx.x & 31, next = find(a, work, fetcher + lane * FETCHERS);
    if (lane == 0) {
#pragma unroll 1
        for (int i = fetcher; i < ring.stages; i += FETCHERS) barrier_init(ring.full + 8 * i, 1), barrier_init(ring.free + 8 * i, ARRIVALS(1));
        publish_barriers();
    }
    __syncwarp();
    named_arrive(READY, blockDim.x);
    ring.skip(fetcher);
    for (int first = fetcher; first < work.tiles(); first += 32 * FETCHERS) {
        int now = next;
        for (int i = 0; i < 32 && first + i * FETCHERS < work.tiles(); i++, ring.skip(FETCHERS)) {
            // When some are on their way.
            if (i == 4) next = find(a, work, first + (32 + lane) * FETCHERS);
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
