// What compute capability 9.0 has brought: barriers that count bytes, copies of tiles by the bulk copy
// engine, and products of four warps, which only 9.0 has. Semantics: PTX ISA, "Asynchronous Warpgroup
// Level Matrix Instructions" and "Asynchronous copy".

struct __align__(128) TensorMap { u64 opaque[16]; };

__device__ __forceinline__ u32 shared_address(const void *p) { return u32(__cvta_generic_to_shared(p)); }

__device__ __forceinline__ void barrier_init(u32 barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(barrier), "r"(arrivals) : "memory");
}
// Behind the last `barrier_init`: other threads, blocks of the cluster and the copy engine see them.
__device__ __forceinline__ void publish_barriers() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
// Arrives, and makes the phase wait for so many bytes, too.
__device__ __forceinline__ void barrier_expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(barrier) : "memory");
}
// A barrier's count for the arrivals of so many warps; see RACE_CHECKED.
#define ARRIVALS(warps) ((RACE_CHECKED ? 32 : 1) * (warps))
// A warp's arrival, whose lanes are together anyway: behind a wait for products, say.
__device__ __forceinline__ void lanes_arrive(u32 barrier) {
    if (RACE_CHECKED || (threadIdx.x & 31) == 0) barrier_arrive(barrier);
}
// A warp's arrival, behind what each of its lanes did.
__device__ __forceinline__ void warp_arrives(u32 barrier) {
    __syncwarp();
    lanes_arrive(barrier);
}
__device__ __forceinline__ void barrier_wait(u32 barrier, u32 parity) {
    u32 done;
    do {
        asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
                     "selp.u32 %0, 1, 0, p;\n}" : "=r"(done) : "r"(barrier), "r"(parity) : "memory");
    } while (!done);
}
// Of `threads` threads: a barrier of its own number.
__device__ __forceinline__ void named_barrier(int number, int threads) {
    asm volatile("bar.sync %0, %1;" :: "r"(number), "r"(threads) : "memory");
}
// As `named_barrier`, for threads that do not wait: what they did before is seen by those that do.
__device__ __forceinline__ void named_arrive(int number, int threads) {
    asm volatile("bar.arrive %0, %1;" :: "r"(number), "r"(threads) : "memory");
}
// As `named_arrive`; with RACE_CHECKED the threads wait, too, since racecheck orders only what threads did that meet.
__device__ __forceinline__ void named_leave(int number, int threads) {
    if (RACE_CHECKED) named_barrier(number, threads);
    else named_arrive(number, threads);
}
__device__ __forceinline__ void store_shared(u32 address, u32 value) {
    asm volatile("st.shared.u32 [%0], %1;" :: "r"(address), "r"(value) : "memory");
}
__device__ __forceinline__ void store_shared(u32 address, uint4 x) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" :: "r"(address), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w) : "memory");
}
__device__ __forceinline__ void store_shared(u32 address, float a, float b, float c, float d) {
    asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" :: "r"(address), "f"(a), "f"(b), "f"(c), "f"(d) : "memory");
}
__device__ __forceinline__ void store_shared(u32 address, float a, float b) {
    asm volatile("st.shared.v2.f32 [%0], {%1, %2};" :: "r"(address), "f"(a), "f"(b) : "memory");
}
__device__ __forceinline__ uint4 load_shared_16(u32 address) {
    uint4 x;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "r"(address) : "memory");
    return x;
}
// Four matrices of 8 rows of 16 bytes, of which each lane names one.
__device__ __forceinline__ void load_matrices(u32 (&r)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}
__device__ __forceinline__ void load_transposed(u32 (&r)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}
// A matrix of 8 by 8, of which lane (g, t) has columns 2t and 2t + 1 of row g, transposed.
__device__ __forceinline__ u32 transposed(u32 x) {
    u32 y;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}
// Ordinary writes to shared memory become visible to the copy engine and the products.
__device__ __forceinline__ void publish_shared() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
// `bytes` bytes, a multiple of 16, between addresses that are one, too.
__device__ __forceinline__ void fetch_bytes(u32 to, const void *from, u32 bytes, u32 barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 :: "r"(to), "l"(from), "r"(bytes), "r"(barrier) : "memory");
}
// The same of what is read once: L2 lets go of it first.
__device__ __forceinline__ void fetch_bytes_once(u32 to, const void *from, u32 bytes, u32 barrier) {
    asm volatile("{\n.reg .b64 policy;\ncreatepolicy.fractional.L2::evict_first.b64 policy, 1.0;\n"
                 "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
                 "[%0], [%1], %2, [%3], policy;\n}"
                 :: "r"(to), "l"(from), "r"(bytes), "r"(barrier) : "memory");
}
// A line of 128 bytes into the L1 cache.
__device__ __forceinline__ void prefetch_near(const void *from) {
    asm volatile("prefetch.global.L1 [%0];" :: "l"(from) : "memory");
}
// A line of 128 bytes into the L2 cache.
__device__ __forceinline__ void prefetch_line(const void *from) {
    asm volatile("prefetch.global.L2 [%0];" :: "l"(from) : "memory");
}
__device__ __forceinline__ void prefetch_map(const TensorMap &map) {
    asm volatile("prefetch.tensormap [%0];" :: "l"(&map) : "memory");
}
// The box at column `x`, row `y` of the map's matrix; rows outside of it give zeros.
__device__ __forceinline__ void fetch_box(u32 to, const TensorMap &map, u32 barrier, int x, int y) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%3, %4}], [%2];"
                 :: "r"(to), "l"(&map), "r"(barrier), "r"(x), "r"(y) : "memory");
}
// For copies of what is read once: L2 lets go of it first.
__device__ __forceinline__ u64 read_once() {
    u64 policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}
// The box at column `x`, row `y` of groups of rows; see `Matrix::map_groups`.
__device__ __forceinline__ void fetch_groups(u32 to, const TensorMap &map, u32 barrier, int x, int y, u64 policy) {
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
                 "[%0], [%1, {%3, %5, %5, %4}], [%2], %6;"
                 :: "r"(to), "l"(&map), "r"(barrier), "r"(x), "r"(y), "r"(0), "l"(policy) : "memory");
}
// The box of parts of 64 columns from `part` on, all or one, from row `y` on: a part behind the other. Read once: L2 lets
// go of it before it does of weights and activations.
__device__ __forceinline__ void fetch_parts(u32 to, const TensorMap &map, u32 barrier, int y, int part = 0) {
    asm volatile("{\n.reg .b64 policy;\ncreatepolicy.fractional.L2::evict_first.b64 policy, 1.0;\n"
                 "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
                 "[%0], [%1, {%3, %4, %5}], [%2], policy;\n}"
                 :: "r"(to), "l"(&map), "r"(barrier), "r"(0), "r"(y), "r"(part) : "memory");
}

// Blocks of a cluster: they see each other's shared memory.
__device__ __forceinline__ int cluster_rank() {
    int rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
// The same address in block `rank`.
__device__ __forceinline__ u32 address_in(u32 address, int rank) {
    u32 there;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
    return there;
}
// Arrives at another block's barrier.
__device__ __forceinline__ void barrier_arrive_there(u32 barrier_there) {
    asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" :: "r"(barrier_there) : "memory");
}
// To another block's memory; its barrier counts the bytes.
__device__ __forceinline__ void send(u32 there, u32 barrier_there, float a, float b, float c, float d) {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%2, %3, %4, %5}, [%1];"
                 :: "r"(there), "r"(barrier_there), "f"(a), "f"(b), "f"(c), "f"(d) : "memory");
}
__device__ __forceinline__ void send(u32 there, u32 barrier_there, float x) {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %2, [%1];"
                 :: "r"(there), "r"(barrier_there), "f"(x) : "memory");
}
// As `barrier_wait`, for what other blocks sent.
__device__ __forceinline__ void barrier_wait_for_cluster(u32 barrier, u32 parity) {
    u32 done;
    do {
        asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
                     "selp.u32 %0, 1, 0, p;\n}" : "=r"(done) : "r"(barrier), "r"(parity) : "memory");
    } while (!done);
}

// A factor in shared memory: rows of 128 bytes in the 128-byte swizzle, groups of 8 rows behind one
// another. `columns_apart`: bytes between blocks of 64 columns, where the columns are not summed over.
__device__ __forceinline__ u64 factor(u32 address, u32 columns_apart = 16) {
    return u64((address & 0x3ffff) >> 4) | u64(columns_apart >> 4) << 16 | u64(1024 >> 4) << 32 | 1ull << 62;
}
// The factor `bytes` further on.
__device__ __forceinline__ u64 along(u64 factor, u32 bytes) { return factor + (bytes >> 4); }
// A warpgroup takes more of the multiprocessor's registers, or leaves it some: `COUNT` a thread.
template <int COUNT> __device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(COUNT));
}
template <int COUNT> __device__ __forceinline__ void leave_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(COUNT));
}
__device__ __forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most `PENDING` groups of products are under way.
template <int PENDING> __device__ __forceinline__ void products_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(PENDING) : "memory");
}
// Keeps registers where they are: nothing moves over this.
template <int N> __device__ __forceinline__ void pin(float (&d)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(d[i]) :: "memory");
}
template <int N> __device__ __forceinline__ void pin(u32 (&d)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+r"(d[i]) :: "memory");
}

#define SUMS_4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define SUMS_8(d, i) SUMS_4(d, i), SUMS_4(d, i + 4)
#define SUMS_16(d, i) SUMS_8(d, i), SUMS_8(d, i + 8)
#define SUMS_24(d, i) SUMS_16(d, i), SUMS_8(d, i + 16)
#define SUMS_32(d, i) SUMS_16(d, i), SUMS_16(d, i + 16)
#define SUMS_64(d, i) SUMS_32(d, i), SUMS_32(d, i + 32)
// The same registers' names in the instruction.
#define NAMES_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define NAMES_16 NAMES_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define NAMES_24 NAMES_16 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define NAMES_32 NAMES_24 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define NAMES_64 NAMES_32 \
    ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
    ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// d[64 × N] (+)= a[64 × 16] · b[16 × N]; `accumulate` 0 starts a new sum. Lane (g, t) of warp w holds
// d[4j + 2h + e]: row 16w + g + 8h, column 8j + 2t + e. `shared`: both factors from shared memory;
// `registers`: the first one from registers.
template <int N> struct Product;

// `I` to `N`: the numbers of the operands behind the sums.
#define PRODUCT(COLUMNS, COUNT, I, J, K, L, M, N, O)                                                        \
    template <> struct Product<COLUMNS> {                                                                   \
        template <int TRANSPOSED_B>                                                                         \
        static __device__ __forceinline__ void shared(float (&d)[COUNT], u64 a, u64 b, int accumulate) {    \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #K ", 0;\n"                                  \
                         "wgmma.mma_async.sync.aligned.m64n" #COLUMNS "k16.f32.bf16.bf16 {" NAMES_##COUNT   \
                         "}, %" #I ", %" #J ", p, 1, 1, 0, %" #L ";\n}"                                     \
                         : SUMS_##COUNT(d, 0) : "l"(a), "l"(b), "r"(accumulate), "n"(TRANSPOSED_B));        \
        }                                                                                                   \
        template <int TRANSPOSED_B>                                                                         \
        static __device__ __forceinline__ void registers(float (&d)[COUNT], const u32 *a, u64 b, int accumulate) { \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #N ", 0;\n"                                  \
                         "wgmma.mma_async.sync.aligned.m64n" #COLUMNS "k16.f32.bf16.bf16 {" NAMES_##COUNT   \
                         "}, {%" #I ", %" #J ", %" #K ", %" #L "}, %" #M ", p, 1, 1, %" #O ";\n}"           \
                         : SUMS_##COUNT(d, 0)                                                               \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate), "n"(TRANSPOSED_B)); \
        }                                                                                                   \
    };

PRODUCT(16, 8, 8, 9, 10, 11, 12, 13, 14)
PRODUCT(32, 16, 16, 17, 18, 19, 20, 21, 22)
PRODUCT(48, 24, 24, 25, 26, 27, 28, 29, 30)
PRODUCT(64, 32, 32, 33, 34, 35, 36, 37, 38)
PRODUCT(128, 64, 64, 65, 66, 67, 68, 69, 70)
