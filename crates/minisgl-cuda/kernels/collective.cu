// Sums and gathers over ranks that can read each other's memory: one pass, one meeting.
//
// Each rank owns a mailbox: flags, counters, and two slots for data. In exchange e every block lays
// its share of the rank's data into slot e % 2, tells the same block of every other rank, waits
// until they have told it, and reads their slots. All sums are taken in the order of the ranks, so
// that every rank has the same bits.
//
// Two slots are enough: a rank that lays down exchange e has finished e − 1, for which every other
// rank has flagged; a rank flags e − 1 only when its kernel of e − 2 is done, and with it its
// reading of the slot that is now written again. For the same reason all exchanges have one grid.
//
// Grid: BLOCKS blocks of THREADS. They must all run while they wait for the other ranks': there are
// few enough of them for a card to hold those of several ranks.

#define BLOCKS 32
#define THREADS 512
#define RANKS_MAX 8
#define HEADER_BYTES 4096

struct Mailbox {
    u32 flags[BLOCKS][RANKS_MAX]; // written by the others: the exchange that they have laid down
    u32 exchanges[BLOCKS];        // this rank's own count
};

struct Group {
    char *mailboxes[RANKS_MAX];
    u64 slot_bytes;
    u32 *broken; // on the host, for all ranks: 0, or why the group has ended
    u64 limit;   // of a wait, in nanoseconds
    int rank;
    int next_early; // whether the kernel behind may start while this one waits for the others
};

__device__ __forceinline__ void store_release(u32 *address, u32 value) {
    asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}
__device__ __forceinline__ u32 load_acquire(const u32 *address) {
    u32 value;
    asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
    return value;
}
__device__ __forceinline__ u64 nanoseconds() {
    u64 now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now)::"memory");
    return now;
}

__device__ __forceinline__ Mailbox *mailbox(const Group &g, int rank) {
    return (Mailbox *)g.mailboxes[rank];
}
__device__ __forceinline__ char *slot(const Group &g, int rank, u32 exchange) {
    return g.mailboxes[rank] + HEADER_BYTES + (exchange & 1) * g.slot_bytes;
}

// The number of this exchange.
__device__ __forceinline__ u32 begin(const Group &g) {
    if (g.next_early) let_next_start();
    wait_for_previous();
    return mailbox(g, g.rank)->exchanges[blockIdx.x] + 1;
}

// Waits until every rank's block of this index has laid its share down. False when the group has
// ended, or ends here because a rank is late: then there is nothing to read.
__device__ __forceinline__ bool meet(const Group &g, u32 exchange) {
    bool met = true;
    int other = threadIdx.x;
    __syncthreads();
    if (threadIdx.x == 0) mailbox(g, g.rank)->exchanges[blockIdx.x] = exchange;
    if (other < RANKS && other != g.rank) {
        store_release(&mailbox(g, other)->flags[blockIdx.x][g.rank], exchange);
        const u32 *flag = &mailbox(g, g.rank)->flags[blockIdx.x][other];
        u64 start = nanoseconds();
        for (u32 tries = 1; int(load_acquire(flag) - exchange) < 0; tries++) {
            if (tries % 1024) continue;
            bool late = nanoseconds() - start > g.limit;
            if (late) store_release(g.broken, 1 + other);
            if (late || load_acquire(g.broken)) {
                met = false;
                break;
            }
        }
    }
    met = __syncthreads_and(met);
    if (!g.next_early) let_next_start();
    return met;
}

#if EXACT
#define WIDTH 4
#else
#define WIDTH 8
#endif

// The elements of 16 bytes.
struct __align__(16) Vector { T x[WIDTH]; };

struct Reduce {
    Group group;
    T *x; // [count], on 16 bytes, no more than a slot
    long long count;
};

// x = Σ over ranks of x, summed in f32 and rounded once.
extern "C" __global__ void __launch_bounds__(THREADS, 1) all_reduce(const __grid_constant__ Reduce a) {
    u32 exchange = begin(a.group);
    long long vectors = a.count / WIDTH, first = blockIdx.x * THREADS + threadIdx.x;
    // Behind the vectors there are less than WIDTH elements: block 0's.
    long long last = vectors * WIDTH + first;
    T *mine = (T *)slot(a.group, a.group.rank, exchange);
    for (long long i = first; i < vectors; i += BLOCKS * THREADS) ((uint4 *)mine)[i] = ((const uint4 *)a.x)[i];
    if (last < a.count) mine[last] = a.x[last];
    if (!meet(a.group, exchange)) return;
    const T *parts[RANKS];
#pragma unroll
    for (int rank = 0; rank < RANKS; rank++) parts[rank] = (const T *)slot(a.group, rank, exchange);
    for (long long i = first; i < vectors; i += BLOCKS * THREADS) {
        Vector part[RANKS], sum;
#pragma unroll
        for (int rank = 0; rank < RANKS; rank++) part[rank] = ((const Vector *)parts[rank])[i];
#pragma unroll
        for (int j = 0; j < WIDTH; j++) {
            float total = 0.f;
#pragma unroll
            for (int rank = 0; rank < RANKS; rank++) total += to_float(part[rank].x[j]);
            sum.x[j] = from_float<T>(total);
        }
        ((Vector *)a.x)[i] = sum;
    }
    if (last < a.count) {
        float total = 0.f;
        for (int rank = 0; rank < RANKS; rank++) total += to_float(parts[rank][last]);
        a.x[last] = from_float<T>(total);
    }
}

struct Gather {
    Group group;
    const u32 *part; // [rows, width] words, no more than a slot
    u32 *out;        // [rows, RANKS · width]
    long long rows, width;
};

// out[row][rank · width + i] = part of rank [row][i].
extern "C" __global__ void __launch_bounds__(THREADS, 1) all_gather(const __grid_constant__ Gather a) {
    u32 exchange = begin(a.group);
    int width = int(a.width), count = int(a.rows) * width, first = blockIdx.x * THREADS + threadIdx.x;
    u32 *mine = (u32 *)slot(a.group, a.group.rank, exchange);
    for (int i = first; i < count; i += BLOCKS * THREADS) mine[i] = a.part[i];
    if (!meet(a.group, exchange)) return;
    for (int rank = 0; rank < RANKS; rank++) {
        const u32 *part = (const u32 *)slot(a.group, rank, exchange);
        for (int i = first; i < count; i += BLOCKS * THREADS) {
            int row = i / width, column = i % width;
            a.out[(row * RANKS + rank) * width + column] = part[i];
        }
    }
}

// As all_gather, from parts that lie one behind the other: [RANKS, rows, width] words. A thread a
// word.
extern "C" __global__ void interleave(const u32 *parts, long long rows, long long width, u32 *out) {
    let_next_start();
    wait_for_previous();
    long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x;
    if (i >= rows * RANKS * width) return;
    long long column = i % width, rank = i / width % RANKS, row = i / width / RANKS;
    out[i] = parts[(rank * rows + row) * width + column];
}
