// How `decode.cu` divides a step's rows between blocks, and fetches a block's tiles.
//
// `plan` divides once a step, for all layers whose heads and window are alike, and leaves in memory:
//   - for each block a `BlockPlan`: its share, and where its first tiles begin, which the fetching warps then ask
//     for after one read. Later tiles are looked up while earlier ones come;
//   - the `Entry`s, of which a block's merging warp reads those that the block needs.
// A place in the cache is counted in rows of DIM, KV heads in between, from the layer's first: the same in all layers.

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
// Named barriers: of the summing warps, behind the last sums; of all, before the first tile; of the fetching and the
// merging warps, when the block's entries are there.
#define SUMMED 1
#define READY 2
#define ENTRIES_READ 3
// A head's sums in `partial`: with its best score and its sum of weights behind them.
#define PARTIAL_STRIDE (DIM + 4)

// When `decode` waits for the kernel in front. In a graph, its plan, page table and lengths are older than all of the
// layer: it fetches before that. Outside of one, the kernel that writes the page table may be close in front. Behind the
// prefill of a step's other rows, which let it start when all that is older was done, it waits as it ends: the
// next kernel comes after both.
enum Wait { WAIT_FIRST, WAIT_FETCHING, WAIT_LAST };

struct BlockPlan;
struct Entry;
struct Args {
    bf16 *qkv; bf16 *k_pages; bf16 *v_pages; bf16 *out;
    const int *slots; const int *kv_len; const int *page_table; const int *store_at;
    const float *rope; const float *q_norm; const float *k_norm;
    float *partial;
    int *arrived;          // [entries, kv_heads, 16]: parts of a head that are there
    BlockPlan *plan;       // [blocks]
    Entry *entries;        // [entries + 1]
    int rows, pages_a_row, page_shift, q_heads, kv_heads, stages, window; Wait wait;
    float q_eps, q_shift, k_eps, k_shift, scale, soft_cap;
    int ahead;             // tiles on their way at once
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
struct __align__(16) Segment {
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

// One KV head's tiles before the entry (behind the last entry: all of them), the entry's tokens, its slot in the page
// table, and the tiles of it that are not its own or not seen.
struct __align__(16) Entry { int before, len, slot, skipped; };

// A block's tiles: `from` to `to` of all, of rows `first_row` to `last_row`; `size` of them where there are so many. The
// block begins with those behind its first `ahead`: of a unit that goes on in the next block.
struct __align__(16) Share { int from, to, size, ahead, first_row, last_row, kv_heads; };

// A block's share, and the entries in its shared memory: of its rows, and the one behind these.
struct Work : Share {
    const Entry *entries;

    __device__ __forceinline__ int tiles() const { return to - from; }
    // The last of the block's rows that begins at or before `position`.
    __device__ __forceinline__ int row_at(int position) const {
        int low = first_row, high = last_row;
        while (low < high) {
            int middle = (low + high + 1) / 2;
            if (entries[middle].before * kv_heads <= position) low = middle;
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
            row += apart * (__popc(__ballot_sync(~0u, look < rows && entries[look].before * kv_heads <= position)) - 1);
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
        const Entry &entry = entries[s.row];
        s.tiles = entries[s.row + 1].before - entry.before, s.kv_len = entry.len, s.seen_from = entry.skipped;
        int inside = position - entry.before * kv_heads;
        s.kv_head = inside / s.tiles, s.first = inside % s.tiles;
        s.last = min(s.tiles, s.first + to - position);
        return s;
    }
};

// Tiles of a block whose places are planned: so many for each lane of the fetching warps.
#define PLANNED (32 * FETCHERS)

struct BlockPlan {
    Share share;
    Segment first;        // the share's; not written where there are no tiles
    int places[PLANNED];  // [FETCHERS][32]: a fetching warp's tiles, 0 where there are none
};

// Of what `plan` wrote: past L1, which may hold another step's.
template <typename V> __device__ __forceinline__ V load_planned(const V *from) {
    union { uint4 words[sizeof(V) / 16]; V value; } x;
#pragma unroll
    for (int i = 0; i < int(sizeof(V) / 16); i++) x.words[i] = __ldcg((const uint4 *)from + i);
    return x.value;
}

// Without the tiles before it.
__device__ __forceinline__ Entry entry_at(const Args &a, int i) {
#if CASCADE
    if (!is_own(a, i)) {
        int len = a.lot_tokens[i - a.rows];
        return {0, len, len > 0 ? a.slots[member(a, i, 0)] : 0, 0};
    }
    int len = a.kv_len[i], slot = a.slots[i], covered = a.covered[i];
    return {0, len, slot, len > 0 ? covered / TILE : 0};
#else
    int len = a.kv_len[i], slot = a.slots[i];
    return {0, len, slot, a.window > 0 ? max(0, len - a.window) / TILE : 0};
#endif
}

// Fills the entries and divides the tiles. Each warp does so by itself, and writes what the others do: none waits
// for another.
__device__ __forceinline__ Work divide(const Args &a, Entry *entries) {
    const int EACH = 4; // Rows of a lane that it reads at once.
    int lane = threadIdx.x & 31, total = 0;
#pragma unroll 1
    for (int base = 0; base < ENTRIES; base += 32 * EACH) {
        Entry mine[EACH];
        int row = base + lane * EACH, tiles[EACH], sum = 0;
#pragma unroll
        for (int i = 0; i < EACH; i++) mine[i] = row + i < ENTRIES ? entry_at(a, row + i) : Entry{};
#pragma unroll
        for (int i = 0; i < EACH; i++) sum += tiles[i] = (mine[i].len + TILE - 1) / TILE - mine[i].skipped;
        int before = total - sum;
#pragma unroll
        for (int i = 1; i < 32; i *= 2) {
            int other = __shfl_up_sync(~0u, sum, i);
            if (lane >= i) sum += other;
        }
        before += sum;
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            mine[i].before = before, before += tiles[i];
            if (row + i < ENTRIES) entries[row + i] = mine[i];
        }
        total += __shfl_sync(~0u, sum, 31);
    }
    if (lane == 0) entries[ENTRIES] = {total, 0, 0, 0};
    if (RACE_CHECKED) __syncthreads();
    else __syncwarp();
    // So few blocks that each warp of theirs has a tile.
    int all = total * a.kv_heads, size = max(WARPS, (all + int(gridDim.x) - 1) / int(gridDim.x));
    int from = min(all, int(blockIdx.x) * size), to = min(all, from + size);
    Work work = {{from, to, size, 0, 0, 0, a.kv_heads}, entries};
    if (from == to) return work;
    work.first_row = work.row_of_all_at(from, ENTRIES), work.last_row = work.row_of_all_at(to - 1, ENTRIES);
    const Entry *last = entries + work.last_row;
    int begun = (to - last->before * a.kv_heads) % (last[1].before - last->before);
    work.ahead = max(0, to - from - begun);
    return work;
}

// The entries that the block needs, from memory: for all who meet at READY, and for warps that fetch tiles
// behind the planned ones.
__device__ __forceinline__ void read_entries(const Args &a, const Work &work, Entry *entries) {
    for (int row = work.first_row + int(threadIdx.x & 31); row <= work.last_row + 1; row += 32)
        entries[row] = load_planned(a.entries + row);
    __syncwarp();
    if (work.tiles() > PLANNED) named_leave(ENTRIES_READ, 32 * (FETCHERS + 1));
}

struct Ring {
    u32 memory, full, free;
    int stages, stage = 0, parity = 0;
    __device__ void skip(int count) {
        stage += count;
        while (stage >= stages) stage -= stages, parity ^= 1;
    }
};

// How much of a tile is fetched. Of a row's last one, what is in front of its new token, which comes by another way: all,
// half or nothing.
enum Extent { WHOLE_TILE, HALF_TILE, NO_TILE };

// Where the block's tile `index` begins in the cache, in rows, which is a multiple of TILE; and its extent.
__device__ __forceinline__ int find(const Args &a, const Work &work, int index) {
    if (index >= work.tiles()) return 0;
    Segment s = work.at(index);
    int token = (s.seen_from + s.first) * TILE, inside = token & (1 << a.page_shift) - 1;
    int page = a.page_table[(long long)work.entries[s.row].slot * a.pages_a_row + (token >> a.page_shift)];
    int older = TILE;
#if CASCADE
    if (is_own(a, s.row))
#endif
    if (s.first == s.tiles - 1) older = s.kv_len - 1 & TILE - 1;
    return (page * a.kv_heads + s.kv_head << a.page_shift) + inside + (older == 0 ? NO_TILE : older <= TILE / 2 ? HALF_TILE : WHOLE_TILE);
}

// The barriers of the stages that a warp fetches into, by this warp.
__device__ __forceinline__ void init_stages(const Ring &ring, int fetcher) {
    if ((threadIdx.x & 31) == 0) {
#pragma unroll 1
        for (int i = fetcher; i < ring.stages; i += FETCHERS) barrier_init(ring.full + 8 * i, 1), barrier_init(ring.free + 8 * i, ARRIVALS(1));
        publish_barriers();
    }
    __syncwarp();
}

// K and V: whole tiles, and a part of half of one.
struct Maps { const TensorMap &k, &v, &half_k, &half_v; };

__device__ __forceinline__ void fetch_tile(u32 to, const Maps &maps, u32 barrier, int place) {
    int y = place & ~(TILE - 1), extent = place & TILE - 1;
    if (extent == WHOLE_TILE) {
        barrier_expect(barrier, STAGE_BYTES);
        fetch_parts(to, maps.k, barrier, y);
        fetch_parts(to + MATRIX_BYTES, maps.v, barrier, y);
    } else if (extent == HALF_TILE) {
        barrier_expect(barrier, STAGE_BYTES / 2);
        for (int part = 0; part < DIM / 64; part++) {
            fetch_parts(to + part * TILE * 128, maps.half_k, barrier, y, part);
            fetch_parts(to + part * TILE * 128 + MATRIX_BYTES, maps.half_v, barrier, y, part);
        }
    } else {
        barrier_arrive(barrier);
    }
}

// Of every FETCHERS tiles of the block's share, the one that is this warp's, of which each lane has the `place` of one
// of the first 32. Lanes look up 32 tiles while 32 are fetched. No more than `ahead` tiles are on their way at once,
// also where there is room: memory serves more of them more slowly.
__device__ __forceinline__ void fetch_all(const Args &a, const Work &work, int place, const Maps &maps, Ring ring, int fetcher) {
    int lane = threadIdx.x & 31, next = place;
    // When some are on their way, which all had room at once: none waits for a warp that waits for the entries.
    int look = min(4, ring.stages / FETCHERS);
    named_arrive(READY, blockDim.x);
    ring.skip(fetcher);
    for (int first = fetcher; first < work.tiles(); first += PLANNED) {
        int now = next;
        for (int i = 0; i < 32 && first + i * FETCHERS < work.tiles(); i++, ring.skip(FETCHERS)) {
            if (i == look && work.tiles() > PLANNED) {
                __syncwarp();
                if (first == fetcher) named_barrier(ENTRIES_READ, 32 * (FETCHERS + 1));
                next = find(a, work, first + PLANNED + lane * FETCHERS);
            }
            int y = __shfl_sync(~0u, now, i);
            if (lane > 0) continue;
            u32 barrier = ring.full + 8 * ring.stage, to = ring.memory + ring.stage * STAGE_BYTES;
            if (first + i * FETCHERS >= a.ahead) {
                bool is_older = ring.stage < a.ahead;
                barrier_wait(barrier - 8 * a.ahead + (is_older ? 8 * ring.stages : 0), ring.parity ^ u32(is_older));
            }
            barrier_wait(ring.free + 8 * ring.stage, ring.parity ^ 1);
            fetch_tile(to, maps, barrier, y);
        }
    }
}
