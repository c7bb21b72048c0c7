// What every kernel file starts with, followed by `ptx.cuh`. No header of the toolkit is included: NVRTC
// alone compiles this. `T` is the type of activations: `bf16`, or `float` in the exact mode.
//
// Every kernel calls `let_next_start()` first (`wide.cu` and `strip.cu` when they ask for their last weights, `prefill.cu`
// when it has waited, `scale_columns`, which writes weights, never):
// its successor may be launched as soon as all of its own blocks have (programmatic dependent launch). And
// every thread calls `wait_for_previous()` before it touches anything that an earlier kernel writes or reads.
// A kernel is done when its last thread is, so that this orders it behind all before it. `decode.cu` behind
// `prefill.cu` calls it last: what it reads is what the latter has waited for. Elsewhere, before that call stand only
// loads of what no kernel in front writes:
//   - weights; and of the host's memory, in `upload`;
//   - in a graph, lengths, pages and older tokens;
//   - in a graph, plans (`decode_work.cuh`): the first kernel behind a plan is launched so that it starts when the plan
//     is there, and so do all behind it.

typedef unsigned int u32;
typedef unsigned long long u64;
struct __align__(2) bf16 { unsigned short bits; };

// For a race checker: every lane of a warp arrives at a barrier, where otherwise one does for all, behind a
// `__syncwarp`. Racecheck takes for ordered only what was done by threads that arrive themselves. And threads
// meet where several of them have written the same.
#ifndef RACE_CHECKED
#define RACE_CHECKED 0
#endif

#if EXACT
typedef float T;
#else
typedef bf16 T;
#endif

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __uint_as_float(u32(x.bits) << 16); }
__device__ __forceinline__ float low_half(u32 x) { return __uint_as_float(x << 16); }
__device__ __forceinline__ float high_half(u32 x) { return __uint_as_float(x & 0xffff0000u); }

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int lane = 16; lane; lane >>= 1) x += __shfl_xor_sync(~0u, x, lane);
    return x;
}
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int lane = 16; lane; lane >>= 1) x = fmaxf(x, __shfl_xor_sync(~0u, x, lane));
    return x;
}

// The block's sum, for every thread. Up to 32 warps.
__device__ __forceinline__ float block_sum(float x) {
    __shared__ float partial[32];
    x = warp_sum(x);
    __syncthreads();
    if ((threadIdx.x & 31) == 0) partial[threadIdx.x >> 5] = x;
    __syncthreads();
    int warps = (blockDim.x + 31) >> 5, lane = threadIdx.x & 31;
    return warp_sum(lane < warps ? partial[lane] : 0.f);
}

__device__ __forceinline__ float infinity() { return __uint_as_float(0x7f800000u); }
__device__ __forceinline__ float silu(float x) { return __fdividef(x, 1.f + __expf(-x)); }
__device__ __forceinline__ float gelu_tanh(float x) {
    return 0.5f * x * (1.f + tanhf(0.7978845608028654f * (x + 0.044715f * x * x * x)));
}
__device__ __forceinline__ float activate(float x, int gelu) {
#if EXACT
    return gelu ? gelu_tanh(x) : x / (1.f + expf(-x));
#else
    return gelu ? gelu_tanh(x) : silu(x);
#endif
}
