// What kernels for all architectures need PTX for. `tests/emulator/ptx.h` has the same for the CPU, and for
// `hopper.cuh`.

__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void let_next_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Two floats as two bf16 in one register, `low` in the low half.
__device__ __forceinline__ u32 pack(float low, float high) {
    u32 packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

template <typename O> __device__ __forceinline__ O from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }
template <> __device__ __forceinline__ bf16 from_float<bf16>(float x) {
    unsigned short bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bf16{bits};
}

__device__ __forceinline__ float power_of_2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// What a line of 128 bytes holds is of no use any more: L2 need not write it to memory.
__device__ __forceinline__ void discard_line(void *line) {
    asm volatile("discard.global.L2 [%0], 128;" :: "l"(line) : "memory");
}

// How many have arrived at `count` before. What the thread, and those that it has met, wrote before is seen by
// whoever arrives later, and by those that it meets.
__device__ __forceinline__ int arrive_at(int *count) {
    int before;
    asm volatile("atom.add.acq_rel.gpu.global.s32 %0, [%1], 1;" : "=r"(before) : "l"(count) : "memory");
    return before;
}

// D = A·B + D on the tensor cores: A 16×16 row-major, B 16×8 column-major, f32 sums.
// Lane (g = lane / 4, t = lane % 4) holds A[g][2t..], A[g+8][2t..], A[g][2t+8..], A[g+8][2t+8..];
// B[2t..][g], B[2t+8..][g]; D[g][2t..], D[g+8][2t..].
__device__ __forceinline__ void mma(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// 16 bytes that are read once and not written by any kernel: past L1.
__device__ __forceinline__ uint4 load_weights(const void *address) {
    uint4 x;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "l"(address));
    return x;
}
// 16 bytes on their way to shared memory, past L1 and registers; zeros where there are none to copy. Rows of
// some hundred bytes come faster so than by the bulk copy engine, which takes its time for each of its copies.
__device__ __forceinline__ void copy_16(u32 to, const void *from, bool there = true) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;"
                 :: "r"(to), "l"(from), "r"(there ? 16 : 0) : "memory");
}
// The same of what is read once: L2 lets go of it first.
__device__ __forceinline__ void copy_16_once(u32 to, const void *from, bool there) {
    asm volatile("{\n.reg .b64 policy;\ncreatepolicy.fractional.L2::evict_first.b64 policy, 1.0;\n"
                 "cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2, policy;\n}"
                 :: "r"(to), "l"(from), "r"(there ? 16 : 0) : "memory");
}
// Ends a group of a thread's copies, maybe of none.
__device__ __forceinline__ void end_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most `PENDING` of the thread's groups are under way: the last ones.
template <int PENDING> __device__ __forceinline__ void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" :: "n"(PENDING) : "memory");
}
