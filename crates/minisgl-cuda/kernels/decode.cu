// One token a row, on compute capability 9.0 and up: its q and k normed and rotated, k and v written to
// their page, and softmax(scale · q·kᵀ) · v over the row's pages, in one kernel.
//
// A unit is a row's KV head with its whole group of query heads, a tile 16 tokens of a unit. All units'
// tiles, behind one another, are divided evenly between the blocks, whatever the rows' lengths: once a step, by
// `plan`, in front of its first layer. A block's warps have three trades, and none waits for another but through
// barriers in shared memory:
//   - FETCHERS fetch tiles by the bulk copy engine, `stages` ahead, begun before the kernels in front are done:
//     earlier tokens' K and V are older than this step, and the new token's are put into the tile in
//     shared memory;
//   - WARPS take the tiles in turn, and leave a unit's sums behind when they have done theirs of it;
//   - one merges these sums, and of each head of a unit that is spread over blocks, the last block to arrive
//     merges the blocks'. Units that are spread over blocks come first, so that no block ends with them. A
//     block's last unit is merged by those that summed it, all at once.
// CASCADE: rows that begin with the same pages are dealt into lots of as many as have 16 query heads
// together, and a lot's shared tokens are units of their own, which read K and V once for all of its rows. A
// row's result has two halves then, of its own tokens and of the shared ones; the unit that is done last merges
// them (cascade attention, as in FlashInfer, in one kernel).
// In shared memory: tiles [stage][K, V][part][16] of 128 bytes in the 128-byte swizzle, where a part is
// 64 dimensions; of units in turn, q [2][8 · HALVES][Q_STRIDE]; the warps' sums [warp][group][SUMS_STRIDE].

// The new token's k and v, into their page and into the tile at `tile`.
__device__ __forceinline__ void add_token(const Args &a, const Segment &s, u32 tile) {
    int slot = a.store_at[s.row];
    const bf16 *k = a.qkv + ((long long)s.row * (a.q_heads + 2 * a.kv_heads) + a.q_heads + s.kv_head) * DIM;
    long long to = (((long long)(slot >> a.page_shift) * a.kv_heads + s.kv_head << a.page_shift) + (slot & (1 << a.page_shift) - 1)) * DIM;
    NewToken token = {k, k + a.kv_heads * DIM, slot < 0 ? nullptr : a.k_pages + to, a.v_pages + to,
                      a.k_norm, a.rope + (long long)(s.kv_len - 1) * DIM, a.k_eps, a.k_shift};
    add_token(token, (s.kv_len - 1) & (TILE - 1), tile);
}

// The unit's q, normed and rotated, a warp a head. Behind the group, and of members that a lot does not have,
// whatever was there.
__device__ __forceinline__ void prepare_q(const Args &a, const Segment &s, bf16 *q) {
    int warp = threadIdx.x / 32, group = a.q_heads / a.kv_heads;
#pragma unroll 1
    for (int i = warp; i < UNIT_HEADS; i += WARPS) {
        int row = s.row, head = i, kv_len = s.kv_len;
#if CASCADE
        if (!is_own(a, row)) {
            row = member(a, row, i / group), head = i % group;
            if (row < 0) continue;
            kv_len = a.kv_len[row];
        }
#endif
        Head x;
        const bf16 *from = a.qkv + ((long long)row * (a.q_heads + 2 * a.kv_heads) + s.kv_head * group + head) * DIM;
        x.read(from, a.q_norm, a.q_eps, a.q_shift, a.rope + (long long)(kv_len - 1) * DIM);
#pragma unroll
        for (int j = 0; j < PAIRS_A_LANE; j++) {
            if (!Head::holds(j)) continue;
            uint2 rotated = x.rotated(j);
            *(u32 *)(q + i * Q_STRIDE + Head::index(j)) = rotated.x;
            *(u32 *)(q + i * Q_STRIDE + Head::index(j) + DIM / 2) = rotated.y;
        }
    }
}

// What the warps of a block share beside the tiles.
struct Shared {
    bf16 *q; float *sums;
    float2 (*tops)[16];  // [warp][head]: best score, in powers of 2, and sum
    u32 q_full, sums_full, sums_free;
};

// A head's sums while they are merged: a lane has `VALUES` neighbouring ones of every `32 * VALUES`.
#define VALUES (DIM < 128 ? 2 : 4)
#define PIECES (DIM / (32 * VALUES))
struct Merged {
    struct __align__(4 * VALUES) Piece { float x[VALUES]; };
    Piece pieces[PIECES];
    float best, total;

    static __device__ __forceinline__ int index(int piece) { return ((threadIdx.x & 31) + 32 * piece) * VALUES; }

    // `COUNT` lots at once: their values, and (best score, sum of weights).
    template <int COUNT, typename From> __device__ __forceinline__ void add(From from) {
        Piece more[COUNT][PIECES];
        float2 top[COUNT];
#pragma unroll
        for (int i = 0; i < COUNT; i++) from(i, more[i], top[i]);
        float old = best;
#pragma unroll
        for (int i = 0; i < COUNT; i++) best = fmaxf(best, top[i].x);
        float shrink = power_of_2(old - best);
        total *= shrink;
#pragma unroll
        for (int p = 0; p < PIECES; p++)
#pragma unroll
            for (int v = 0; v < VALUES; v++) pieces[p].x[v] *= shrink;
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            float factor = power_of_2(top[i].x - best);
            total += factor * top[i].y;
#pragma unroll
            for (int p = 0; p < PIECES; p++)
#pragma unroll
                for (int v = 0; v < VALUES; v++) pieces[p].x[v] += factor * more[i][p].x[v];
        }
    }
    __device__ __forceinline__ void clear() {
        best = -infinity(), total = 0.f;
#pragma unroll
        for (int p = 0; p < PIECES; p++)
#pragma unroll
            for (int v = 0; v < VALUES; v++) pieces[p].x[v] = 0.f;
    }
    __device__ __forceinline__ void write(bf16 *out) const {
        float share = 1.f / total;
#pragma unroll
        for (int p = 0; p < PIECES; p++)
#pragma unroll
            for (int v = 0; v < VALUES; v += 2)
                *(u32 *)(out + index(p) + v) = pack(pieces[p].x[v] * share, pieces[p].x[v + 1] * share);
    }
};
// What another block wrote.
__device__ __forceinline__ void load_from_blocks(float (&x)[2], const float *from) {
    float2 v = __ldcg((const float2 *)from);
    x[0] = v.x, x[1] = v.y;
}
__device__ __forceinline__ void load_from_blocks(float (&x)[4], const float *from) {
    float4 v = __ldcg((const float4 *)from);
    x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
}

// The warps that merge a unit: each has every `warps`-th head from its `rank` on, and a lane speaks for one of
// these.
struct Team {
    int rank, warps;
    __device__ __forceinline__ int head_of(int lane) const { return rank + lane * warps; }
};

#if CASCADE
// What becomes of a unit's head, all of whose sums are merged.
__device__ __forceinline__ void finish(const Args &a, const Segment &s, const Merged &m, int head, bf16 *out) {
    int group = a.q_heads / a.kv_heads;
    bool own = is_own(a, s.row);
    int row = own ? s.row : member(a, s.row, head / group);
    if (row < 0) return;
    if (!own || a.covered[row] > 0) {
        long long at = (long long)row * a.q_heads + s.kv_head * group + head % group;
        float *to = a.halves + (2 * at + (own ? 0 : 1)) * PARTIAL_STRIDE;
#pragma unroll
        for (int p = 0; p < PIECES; p++) *(Merged::Piece *)(to + Merged::index(p)) = m.pieces[p];
        if ((threadIdx.x & 31) == 0) *(float2 *)(to + DIM) = make_float2(m.best, m.total);
        return;
    }
    m.write(out + head * DIM);
}

// Behind `finish` of the heads that lanes `done` speak for: of each, whoever comes second merges the halves.
__device__ __forceinline__ void join(const Args &a, const Segment &s, const Team &team, u32 done) {
    int lane = threadIdx.x & 31, group = a.q_heads / a.kv_heads, head = team.head_of(lane), row = -1;
    bool own = is_own(a, s.row);
    if (own && a.covered[s.row] == 0) return;
    if (done >> lane & 1) row = own ? s.row : member(a, s.row, head / group);
    int at = row * a.q_heads + s.kv_head * group + head % group;
    __syncwarp();
    bool is_second = row >= 0 && arrive_at(a.joined + at) == 1;
    if (is_second) a.joined[at] = 0;
    __syncwarp();
    for (u32 second = __ballot_sync(~0u, is_second); second; second &= second - 1) {
        long long from_lane = __shfl_sync(~0u, at, __ffs(second) - 1);
        Merged m;
        m.clear();
        m.add<2>([&](int half, Merged::Piece (&pieces)[PIECES], float2 &top) {
            const float *from = a.halves + (2 * from_lane + half) * PARTIAL_STRIDE;
            top = __ldcg((const float2 *)(from + DIM));
#pragma unroll
            for (int p = 0; p < PIECES; p++) load_from_blocks(pieces[p].x, from + Merged::index(p));
        });
        m.write(a.out + from_lane * DIM);
    }
}
#define FINISH finish(a, s, m, head, out)
#else
#define FINISH m.write(out + head * DIM)
#endif

// A unit's sums become its output, or, of a part of a unit, go to `partial`, where the last block to arrive
// merges a head's parts.
__device__ __forceinline__ void merge(const Args &a, const Work &work, const Segment &s, const Shared &shared, const Team &team) {
    int lane = threadIdx.x & 31, group = a.q_heads / a.kv_heads;
    bool whole = s.last - s.first == s.tiles;
    // Two places a block: of the unit that began before it, and of the one that goes on behind it.
    float *partial = a.partial + (2 * blockIdx.x + (s.first > 0 ? 0 : 1)) * 16 * PARTIAL_STRIDE;
    bf16 *out = a.out + ((long long)s.row * a.q_heads + s.kv_head * group) * DIM;
    Merged m;
#pragma unroll 1
    for (int head = team.rank; head < UNIT_HEADS; head += team.warps) {
        m.clear();
        m.add<WARPS>([&](int warp, Merged::Piece (&pieces)[PIECES], float2 &top) {
            const float *from = shared.sums + (warp * SUM_HEADS + head) * SUMS_STRIDE;
            bool has = s.has_for(warp);
            top = has ? shared.tops[warp][head] : make_float2(-infinity(), 0.f);
#pragma unroll
            for (int p = 0; p < PIECES; p++) pieces[p] = has ? *(const Merged::Piece *)(from + Merged::index(p)) : Merged::Piece{};
        });
        if (whole) { FINISH; continue; }
        float *to = partial + head * PARTIAL_STRIDE;
#pragma unroll
        for (int p = 0; p < PIECES; p++) *(Merged::Piece *)(to + Merged::index(p)) = m.pieces[p];
        if (lane == 0) *(float2 *)(to + DIM) = make_float2(m.best, m.total);
    }
    __syncwarp();
    if (team.warps == 1) lanes_arrive(shared.sums_free);
    bool is_done = team.head_of(lane) < UNIT_HEADS;
    if (!whole) {
        int begin = work.entries[s.row].before * a.kv_heads + s.kv_head * s.tiles;
        int first_block = begin / work.size, blocks = (begin + s.tiles - 1) / work.size - first_block + 1;
        int *arrived = a.arrived + (s.row * a.kv_heads + s.kv_head) * 16 + team.head_of(lane);
        is_done = is_done && arrive_at(arrived) == blocks - 1;
        if (is_done) *arrived = 0;
        __syncwarp();
        for (u32 left = __ballot_sync(~0u, is_done); left; left &= left - 1) {
            int head = team.head_of(__ffs(left) - 1);
            m.clear();
#pragma unroll 1
            for (int first = 0; first < blocks; first += 4)
                m.add<4>([&](int i, Merged::Piece (&pieces)[PIECES], float2 &top) {
                    // Only the first block's part begins where the unit does. What is read twice is left out.
                    int b = min(first + i, blocks - 1), place = 2 * (first_block + b) + (b == 0 ? 1 : 0);
                    const float *from = a.partial + (place * 16 + head) * PARTIAL_STRIDE;
                    top = __ldcg((const float2 *)(from + DIM));
                    if (first + i >= blocks) top.x = -infinity();
#pragma unroll
                    for (int p = 0; p < PIECES; p++) load_from_blocks(pieces[p].x, from + Merged::index(p));
                });
            FINISH;
        }
    }
#if CASCADE
    join(a, s, team, __ballot_sync(~0u, is_done));
#endif
}

// From unit `s` on: all but the block's last one are merged by a warp of its own, the last one by those that
// summed it, all at once. Both run the same instructions: the last merge finds them in the cache.
__device__ __forceinline__ void merge_all(const Args &a, const Work &work, const Shared &shared, Segment s) {
    int warp = threadIdx.x / 32;
    bool has_summed = warp < WARPS;
    Team team = has_summed ? Team{warp, WARPS} : Team{0, 1};
#pragma unroll 1
    for (int turn = 0;; turn++) {
        bool is_last = s.end() == work.tiles();
        if (!has_summed && is_last) return;
        if (!has_summed) barrier_wait(shared.sums_full, turn & 1);
        merge(a, work, s, shared, team);
        if (is_last) return;
        s = work.at(s.end());
    }
}

// A warp that sums tiles, from unit `s` on, whose q is there. Returns the last one, when all warps have left
// their sums of it.
__device__ __forceinline__ Segment sum_all(const Args &a, const Work &work, const Shared &shared, Ring ring, Segment s) {
    int warp = threadIdx.x / 32, group = a.q_heads / a.kv_heads;
    const Scores scores = {a.scale, a.soft_cap, a.window};
    float scale = scores.power_of_2_scale();
    ring.skip(warp);
    auto prepare = [&](const Segment &of, int turn) {
        prepare_q(a, of, shared.q + (turn & 1) * 8 * HALVES * Q_STRIDE);
        warp_arrives(shared.q_full + 8 * (turn & 1));
    };
    for (int next = warp, turn = 0;; turn++) {
        bool is_last = s.end() == work.tiles(), prepared = is_last;
        Queries q;
        if (turn > 0) barrier_wait(shared.q_full + 8 * (turn & 1), turn - 1 >> 1 & 1);
        q.load(shared.q + (turn & 1) * 8 * HALVES * Q_STRIDE);
        Sums sums;
        sums.clear();
        bool has_any = next < s.end();
        do {
            if (next < s.end()) {
                int tile = s.first + next - s.index;
                u32 at = ring.memory + ring.stage * STAGE_BYTES;
                barrier_wait(ring.full + 8 * ring.stage, ring.parity);
#if CASCADE
                if (tile == s.tiles - 1 && is_own(a, s.row)) add_token(a, s, at);
#else
                if (tile == s.tiles - 1) add_token(a, s, at);
#endif
                sums.add(scores, s.kv_len, (s.seen_from + tile) * TILE, at, q);
                warp_arrives(ring.free + 8 * ring.stage);
                next += WARPS, ring.skip(WARPS);
            }
            // While the stage is filled again. All warps have made their heads of this unit's q by now, and
            // so have read the one before, whose place this is.
            if (!prepared) prepare(work.at(s.end()), turn + 1), prepared = true;
        } while (next < s.end());
        // A warp without tiles leaves nothing, and need not wait for the merge of the last unit's sums.
        if (turn > 0) barrier_wait(shared.sums_full, turn - 1 & 1);
        if (turn > 0 && has_any) barrier_wait(shared.sums_free, turn - 1 & 1);
        if (has_any) sums.leave(scale, UNIT_HEADS, shared.tops[warp], shared.sums + warp * SUM_HEADS * SUMS_STRIDE);
        if (is_last) break;
        warp_arrives(shared.sums_full);
        s = work.at(s.end());
    }
    named_barrier(SUMMED, WARPS * 32);
    return s;
}

extern "C" __global__ void __launch_bounds__(PLANNED) plan(const Args a) {
    __shared__ Entry entries[ENTRIES_MAX + 1];
    let_next_start();
    if (a.wait != WAIT_FETCHING) wait_for_previous();
    Work work = divide(a, entries);
    int place = find(a, work, threadIdx.x / 32 + (threadIdx.x & 31) * FETCHERS);
    // Kernels in front may still read the last plan.
    wait_for_previous();
    BlockPlan &block = a.plan[blockIdx.x];
    block.places[threadIdx.x] = place;
    if (threadIdx.x == 0) {
        block.share = work;
        if (work.tiles() > 0) block.first = work.at(0);
    }
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i <= ENTRIES; i += gridDim.x * blockDim.x) a.entries[i] = entries[i];
}

extern "C" __global__ void __launch_bounds__(32 * (WARPS + FETCHERS + 1), 1)
decode(const __grid_constant__ TensorMap k_map, const __grid_constant__ TensorMap v_map, const __grid_constant__ TensorMap half_k_map,
       const __grid_constant__ TensorMap half_v_map, const Args a) {
    extern __shared__ unsigned char memory[];
    __shared__ u64 barrier_words[2 * STAGES_MAX + 4];
    __shared__ Entry entries[ENTRIES_MAX + 1];
    __shared__ float2 tops[WARPS][16];
    let_next_start();
    int warp = threadIdx.x / 32;
    bool fetches = warp >= WARPS && warp < WARPS + FETCHERS;
    if (threadIdx.x == 32 * WARPS) prefetch_map(k_map), prefetch_map(v_map), prefetch_map(half_k_map), prefetch_map(half_v_map);
    u32 tiles = (shared_address(memory) + 1023) / 1024 * 1024, barriers = shared_address(barrier_words);
    unsigned char *behind = memory + (tiles - shared_address(memory)) + a.stages * STAGE_BYTES;
    bf16 *q = (bf16 *)behind;
    float *sums = (float *)(behind + 2 * 8 * HALVES * Q_STRIDE * 2);
    Shared shared = {q, sums, tops, barriers, barriers + 16, barriers + 24};
    Ring ring = {tiles, barriers + 32, barriers + 32 + 8 * a.stages, a.stages};
    if (a.wait == WAIT_FIRST) wait_for_previous();
    // What this multiprocessor still has in L1 may be older.
    if (a.wait == WAIT_LAST) __threadfence();
    const BlockPlan *plan = a.plan + blockIdx.x;
    int place = fetches ? __ldcg(plan->places + threadIdx.x - 32 * WARPS) : 0;
    Work work = {load_planned(&plan->share), entries};
    Segment s = load_planned(&plan->first);
    if (fetches) init_stages(ring, warp - WARPS);
    bool has_any = work.tiles() > 0;
    if (has_any && fetches) fetch_all(a, work, place, {k_map, v_map, half_k_map, half_v_map}, ring, warp - WARPS);
    else if (has_any && warp >= WARPS) read_entries(a, work, entries);
    if (a.wait != WAIT_LAST) wait_for_previous();
    if (has_any && !fetches) {
        if (warp < WARPS) {
            prepare_q(a, s, q);
        } else if ((threadIdx.x & 31) == 0) {
            barrier_init(shared.q_full, ARRIVALS(WARPS)), barrier_init(shared.q_full + 8, ARRIVALS(WARPS));
            barrier_init(shared.sums_full, ARRIVALS(WARPS)), barrier_init(shared.sums_free, ARRIVALS(1));
        }
        named_barrier(READY, blockDim.x);
        if (warp < WARPS) s = sum_all(a, work, shared, ring, s);
        merge_all(a, work, shared, s);
    }
    if (a.wait == WAIT_LAST) wait_for_previous();
}
