// out[m, n] = Σ_k x[m, k] · w[n, k] for up to 8 rows m and rows of w so long that `stream.cu`, which
// names each row's bytes a kilobyte at a time, cannot name them as fast as the memory gives them.
//
// A block walks tiles of 8 rows of w (gated: 8 of the gate, then 8 of up). Its warps take units of 64
// elements of k, every eighth, for all tiles: so x lies in shared memory from the first tile to the last,
// in bf16 and times the norm's weights. Each warp copies its own w, unit by unit through a ring of its
// own, and runs ahead of itself over the ends of tiles: the only warps that wait for one another are the
// eight with a ninth, which adds up their sums, ends a tile while the next ones are on their way, and is
// all that waits for the residual stream. The first units of w are copied before the kernels ahead are
// done.
//
// Where x does not fit, `blocks` blocks of a cluster divide k. All send a tile's sums to the first, which
// has room for those of SLOTS tiles, and tells the others when it has read one.
//
// As in `gemv.cu`, the order of k inside 32 is permuted alike for x and w, and a norm's factor is applied
// to the sums.

#define WARPS 8
// `STAGES`: units that a warp's ring holds.
#define UNIT 64
#define UNIT_BYTES (UNIT * 2)
#define STAGE_BYTES (8 * UNIT_BYTES)
#define ROWS 8
#define SIDES (GATED ? 2 : 1)
// Sums of a tile: [SIDES][ROWS][8]. The ninth warp's lane has one of every 32 of a side.
#define SUMS (ROWS * 8)
#define OURS (SUMS / 32)
#define SLOTS 4
// Pieces of 16 bytes of a row of x that a lane norms at once.
#define PIECES 3

#if OUT_F32
typedef float O;
#else
typedef T O;
#endif

struct Args {
    const bf16 *x; const bf16 *w; const float *norm; const float *bias; O *out;
    int rows, n_total, k_total, blocks, add_to, gelu;
    float eps, shift;
};

// What this block has: every `clusters`th tile, and `units` units of k.
struct Part {
    int rank, cluster, clusters, tiles, first, units;

    __device__ explicit Part(const Args &a)
        : rank(a.blocks > 1 ? cluster_rank() : 0), cluster(blockIdx.x / a.blocks), clusters(gridDim.x / a.blocks),
          tiles((a.n_total + 7) / 8) {
        int all = (a.k_total + UNIT - 1) / UNIT, share = (all + a.blocks - 1) / a.blocks;
        first = rank * share, units = max(0, min(share, all - first));
    }
};

struct Shared {
    unsigned char *x;
    u32 ring, stride, x_here, full, free, arrived, read;
    // Of each warp; and of the other blocks: [SLOTS][blocks - 1], and squares once.
    float *sums, *squares, *gathered, *gathered_squares;

    __device__ Shared(const Args &a, unsigned char *memory, u64 *barriers) {
        int all = (a.k_total + UNIT - 1) / UNIT, share = (all + a.blocks - 1) / a.blocks;
        // Half a line beyond whole ones: two rows' reads of half a unit hit all banks.
        stride = share * UNIT_BYTES + 64;
        ring = shared_address(memory);
        x = memory + WARPS * STAGES * STAGE_BYTES;
        sums = (float *)(x + a.rows * stride);
        squares = sums + WARPS * SIDES * SUMS;
        gathered = squares + WARPS * ROWS;
        gathered_squares = gathered + SLOTS * (a.blocks - 1) * SIDES * SUMS;
        x_here = shared_address(barriers), full = x_here + 8, free = full + 8;
        arrived = free + 8, read = arrived + 8 * SLOTS;
    }
};

// A warp's copies of w, in the order in which it uses them.
struct Ahead {
    // Where the lane copies from, in each half of the tile, and to, in the first stage of the ring.
    const bf16 *from[2];
    u32 to;
    int tile, side, unit;
    // Elements of k from the lane's place in the first unit on.
    int left;

    __device__ Ahead(const Args &a, const Part &p, const Shared &s) : tile(p.cluster), side(0), unit(threadIdx.x / 32) {
        int lane = threadIdx.x & 31;
        // Odd rows' halves change places, so that two rows' reads of half a unit hit all banks.
        to = s.ring + unit * STAGES * STAGE_BYTES + lane / 8 * UNIT_BYTES + (lane % 8 ^ lane / 8 % 2 * 4) * 16;
        left = a.k_total - p.first * UNIT - lane % 8 * 8;
        if (unit >= p.units) tile = p.tiles;
        turn(a, p);
    }
    // To the rows of this tile. The next kernel may start with the copies of the last one: if its copies came
    // before this one's, memory would rest later, when it waits for this one's results.
    __device__ __forceinline__ void turn(const Args &a, const Part &p) {
        int lane = threadIdx.x & 31;
        if (threadIdx.x < 32 && tile + p.clusters >= p.tiles) let_next_start();
#pragma unroll
        for (int i = 0; i < 2; i++) {
            int n = min(tile * 8 + i * 4 + lane / 8, a.n_total - 1);
            from[i] = a.w + (long long)(side * a.n_total + n) * a.k_total + p.first * UNIT + lane % 8 * 8;
        }
    }
    __device__ __forceinline__ void next(const Args &a, const Part &p, int stage) {
        if (tile < p.tiles) {
#pragma unroll
            for (int i = 0; i < 2; i++)
                copy_16_once(to + stage * STAGE_BYTES + i * 4 * UNIT_BYTES, from[i] + unit * UNIT, unit * UNIT < left);
            unit += WARPS;
            if (unit >= p.units) {
                unit = threadIdx.x / 32;
                side = SIDES - 1 - side;
                if (side == 0) tile += p.clusters;
                turn(a, p);
            }
        }
        end_copies();
    }
};

// x of this block's units, zeros behind its end; see also `norm_x`. A warp copies a row.
__device__ __forceinline__ void fetch_x(const Args &a, const Part &p, const Shared &s) {
    if (threadIdx.x & 31) return;
    u32 bytes = min(p.units * UNIT, a.k_total - p.first * UNIT) * 2;
    for (int row = threadIdx.x / 32; row < a.rows; row += WARPS) {
        barrier_expect(s.x_here, p.units ? bytes : 0);
        if (p.units) fetch_bytes(shared_address(s.x) + row * s.stride, a.x + (long long)row * a.k_total + p.first * UNIT, bytes, s.x_here);
    }
}
__device__ __forceinline__ void clear_behind_x(const Args &a, const Part &p, const Shared &s) {
    int there = a.k_total - p.first * UNIT, missing = p.units ? p.units * UNIT - there : 0;
    for (int i = threadIdx.x; i < missing / 8 * a.rows; i += WARPS * 32)
        *(uint4 *)(s.x + i % a.rows * s.stride + (there + i / a.rows * 8) * 2) = make_uint4(0, 0, 0, 0);
}

// Multiplies this warp's units of x with the norm's weights, and keeps the sums of their squares. A lane
// takes pieces of 8 elements, of all rows.
struct NormPieces {
    float4 weight[PIECES][2];
    int at[PIECES];  // -1: none

    __device__ void load(const Args &a, const Part &p, int first) {
        int warp = threadIdx.x / 32, lane = threadIdx.x & 31;
#pragma unroll
        for (int i = 0; i < PIECES; i++) {
            int piece = first + i * 32 + lane, unit = piece / 8 * WARPS + warp, k = (p.first + unit) * UNIT + piece % 8 * 8;
            at[i] = unit < p.units && k < a.k_total ? unit * UNIT_BYTES + piece % 8 * 16 : -1;
            if (at[i] < 0) continue;
            weight[i][0] = __ldg((const float4 *)(a.norm + k)), weight[i][1] = __ldg((const float4 *)(a.norm + k) + 1);
        }
    }
    __device__ void apply(const Args &a, const Shared &s, float (&squares)[ROWS]) {
#pragma unroll
        for (int i = 0; i < PIECES; i++) {
            if (at[i] < 0) continue;
            float4 s0 = weight[i][0], s1 = weight[i][1];
            float scale[8] = {s0.x, s0.y, s0.z, s0.w, s1.x, s1.y, s1.z, s1.w};
#pragma unroll
            for (int row = 0; row < ROWS; row++) {
                if (row >= a.rows) break;
                uint4 *to = (uint4 *)(s.x + row * s.stride + at[i]), v = *to;
                u32 x[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    float low = low_half(x[e]), high = high_half(x[e]);
                    squares[row] += low * low + high * high;
                    x[e] = pack(low * (scale[2 * e] + a.shift), high * (scale[2 * e + 1] + a.shift));
                }
                *to = make_uint4(x[0], x[1], x[2], x[3]);
            }
        }
    }
};

__device__ __forceinline__ void take_x(const Args &a, const Part &p, const Shared &s) {
    int warp = threadIdx.x / 32, lane = threadIdx.x & 31;
    NormPieces pieces;
    if (NORM) pieces.load(a, p, 0);
    clear_behind_x(a, p, s);
    wait_for_previous();
    fetch_x(a, p, s);
    barrier_wait(s.x_here, 0);
    if (!NORM) return;
    float squares[ROWS] = {};
    for (int first = 0; first * WARPS < p.units * 8;) {
        pieces.apply(a, s, squares);
        first += PIECES * 32;
        pieces.load(a, p, first);
    }
#pragma unroll
    for (int row = 0; row < ROWS; row++) {
        float sum = warp_sum(squares[row]);
        if (lane == 0) s.squares[warp * ROWS + row] = sum;
    }
}

// A warp's sums over its units, tile by tile.
__device__ __forceinline__ void multiply(const Args &a, const Part &p, const Shared &s, Ahead &ahead, const unsigned char *memory) {
    int warp = threadIdx.x / 32, lane = threadIdx.x & 31, g = lane / 4, t = lane & 3, stage = 0;
    const unsigned char *w_here = memory + warp * STAGES * STAGE_BYTES + g * UNIT_BYTES + (g & 1) * 64 + t * 16;
    // Rows that are not there are another's: nobody reads their sums.
    const unsigned char *x_here = s.x + min(g, a.rows - 1) * s.stride + t * 16;
    int other_half = g & 1 ? -64 : 64;
    for (int tile = p.cluster, round = 0; tile < p.tiles; tile += p.clusters, round++) {
        // Two chains of products are done in half the time of one.
        float acc[SIDES][2][4] = {};
#pragma unroll
        for (int side = 0; side < SIDES; side++)
            for (int unit = warp; unit < p.units; unit += WARPS) {
                wait_for_copies<STAGES - 1>();
                __syncwarp();
                uint4 w[2], x[2];
#pragma unroll
                for (int c = 0; c < 2; c++) {
                    w[c] = *(const uint4 *)(w_here + stage * STAGE_BYTES + c * other_half);
                    x[c] = *(const uint4 *)(x_here + unit * UNIT_BYTES + c * 64);
                }
                // All lanes have read before the stage is written again.
                __syncwarp();
                ahead.next(a, p, stage);
                if (++stage == STAGES) stage = 0;
#pragma unroll
                for (int c = 0; c < 2; c++) {
                    mma(acc[side][c], x[c].x, 0, x[c].y, 0, w[c].x, w[c].y);
                    mma(acc[side][c], x[c].z, 0, x[c].w, 0, w[c].z, w[c].w);
                }
            }
        barrier_wait(s.free, ~round & 1);
#pragma unroll
        for (int side = 0; side < SIDES; side++)
            *(float2 *)(s.sums + (warp * SIDES + side) * SUMS + g * 8 + 2 * t) =
                make_float2(acc[side][0][0] + acc[side][1][0], acc[side][0][1] + acc[side][1][1]);
        warp_arrives(s.full);
    }
}

// The ninth warp: ends tiles. Its lane has the sums `lane + 32 i`: of row `lane / 8 + 4 i`, column `lane % 8`.
struct Tile {
    float total[OURS][SIDES], squares[OURS];

    // All warps' sums of this block.
    __device__ void add_up(const Shared &s, int round) {
        int lane = threadIdx.x & 31;
        barrier_wait(s.full, round & 1);
#pragma unroll
        for (int i = 0; i < OURS; i++) {
            squares[i] = 0.f;
#pragma unroll
            for (int side = 0; side < SIDES; side++) {
                total[i][side] = 0.f;
#pragma unroll
                for (int v = 0; v < WARPS; v++) total[i][side] += s.sums[(v * SIDES + side) * SUMS + i * 32 + lane];
            }
            if (NORM && round == 0)
#pragma unroll
                for (int v = 0; v < WARPS; v++) squares[i] += s.squares[v * ROWS + i * 4 + lane / 8];
        }
        warp_arrives(s.free);
    }
    // To the cluster's first block.
    __device__ void send_sums(const Args &a, const Part &p, const Shared &s, int round) {
        int lane = threadIdx.x & 31, slot = round % SLOTS;
        if (round >= SLOTS) barrier_wait_for_cluster(s.read + 8 * slot, ~(round / SLOTS) & 1);
        u32 barrier = address_in(s.arrived + 8 * slot, 0);
        u32 to = address_in(shared_address(s.gathered + (slot * (a.blocks - 1) + p.rank - 1) * SIDES * SUMS), 0);
        u32 squares_to = address_in(shared_address(s.gathered_squares + (p.rank - 1) * ROWS), 0);
#pragma unroll
        for (int i = 0; i < OURS; i++) {
#pragma unroll
            for (int side = 0; side < SIDES; side++) send(to + (side * SUMS + i * 32 + lane) * 4, barrier, total[i][side]);
            if (NORM && round == 0 && lane % 8 == 0) send(squares_to + (i * 4 + lane / 8) * 4, barrier, squares[i]);
        }
    }
    // What the others sent; `more`: they will send to this slot again.
    __device__ void add_others(const Args &a, const Shared &s, int round, bool more) {
        int lane = threadIdx.x & 31, slot = round % SLOTS;
        if (lane == 0)
            barrier_expect(s.arrived + 8 * slot, (a.blocks - 1) * (SIDES * SUMS + (NORM && round == 0 ? ROWS : 0)) * 4);
        barrier_wait_for_cluster(s.arrived + 8 * slot, round / SLOTS & 1);
        for (int other = 0; other < a.blocks - 1; other++) {
            const float *from = s.gathered + (slot * (a.blocks - 1) + other) * SIDES * SUMS;
#pragma unroll
            for (int i = 0; i < OURS; i++) {
#pragma unroll
                for (int side = 0; side < SIDES; side++) total[i][side] += from[side * SUMS + i * 32 + lane];
                if (NORM && round == 0) squares[i] += s.gathered_squares[other * ROWS + i * 4 + lane / 8];
            }
        }
        __syncwarp();
        if (more && lane > 0 && lane < a.blocks) barrier_arrive_there(address_in(s.read + 8 * slot, lane));
    }
};

__device__ __forceinline__ void finish(const Args &a, const Part &p, const Shared &s) {
    int lane = threadIdx.x & 31;
    float factor[OURS];
    for (int tile = p.cluster, round = 0; tile < p.tiles; tile += p.clusters, round++) {
        int n = tile * 8 + lane % 8;
        float old[OURS], bias[SIDES] = {};
#pragma unroll
        for (int i = 0; i < OURS; i++) {
            int row = lane / 8 + 4 * i;
            old[i] = 0.f;
            if (a.add_to && p.rank == 0 && row < a.rows && n < a.n_total) old[i] = to_float(a.out[(long long)row * a.n_total + n]);
        }
#pragma unroll
        for (int side = 0; side < SIDES; side++)
            if (a.bias && n < a.n_total) bias[side] = a.bias[side * a.n_total + n];
        Tile sums;
        sums.add_up(s, round);
        if (p.rank) {
            sums.send_sums(a, p, s, round);
            continue;
        }
        if (a.blocks > 1) sums.add_others(a, s, round, tile + SLOTS * p.clusters < p.tiles);
#pragma unroll
        for (int i = 0; i < OURS; i++) {
            int row = lane / 8 + 4 * i;
            if (round == 0) factor[i] = NORM ? rsqrtf(sums.squares[i] / a.k_total + a.eps) : 1.f;
            float value = sums.total[i][0] * factor[i] + bias[0];
            if (GATED) value = activate(value, a.gelu) * (sums.total[i][SIDES - 1] * factor[i] + bias[SIDES - 1]);
            if (row < a.rows && n < a.n_total) a.out[(long long)row * a.n_total + n] = from_float<O>(value + old[i]);
        }
    }
}

// With as few registers as two blocks on a multiprocessor would leave: what was measured.
extern "C" __global__ void __launch_bounds__(32 * (WARPS + 1), 2) wide(const Args a) {
    extern __shared__ __align__(128) unsigned char memory[];
    __shared__ u64 barriers[3 + 2 * SLOTS];
    Part p(a);
    Shared s(a, memory, barriers);
    if (threadIdx.x == 0) {
        barrier_init(s.x_here, a.rows), barrier_init(s.full, ARRIVALS(WARPS)), barrier_init(s.free, ARRIVALS(1));
        for (int i = 0; i < SLOTS; i++) barrier_init(s.arrived + 8 * i, 1), barrier_init(s.read + 8 * i, 1);
        publish_barriers();
    }
    __syncthreads();
    if (a.blocks > 1) cluster_arrive();
    if (threadIdx.x >= WARPS * 32) {
        wait_for_previous();
        if (a.blocks > 1) cluster_wait();
        finish(a, p, s);
        return;
    }
    Ahead ahead(a, p, s);
    for (int i = 0; i < STAGES; i++) ahead.next(a, p, i);
    if (a.blocks > 1) cluster_wait();
    take_x(a, p, s);
    // Other warps' zeros, and other lanes' pieces.
    named_barrier(1, WARPS * 32);
    multiply(a, p, s, ahead, memory);
}
