// What the compiler of kernels knows by itself, as far as the kernels here use it.
#pragma once

#include <algorithm>
#include <cmath>

#include "machine.h"

#define __CUDA_ARCH__ 900
#define __device__
#define __global__
#define __shared__ thread_local
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))

#define threadIdx (machine::current->index)
#define blockIdx (machine::block_index())
#define blockDim machine::block_dim
#define gridDim machine::grid_dim

struct __align__(8) float2 { float x, y; };
struct __align__(16) float4 { float x, y, z, w; };
struct __align__(8) int2 { int x, y; };
struct __align__(8) uint2 { unsigned x, y; };
struct __align__(16) uint4 { unsigned x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
inline unsigned long long min(unsigned long long a, unsigned long long b) { return a < b ? a : b; }
inline unsigned long long max(unsigned long long a, unsigned long long b) { return a > b ? a : b; }
inline float rsqrtf(float x) { return 1.f / sqrtf(x); }
inline float __expf(float x) { return expf(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline float __uint_as_float(unsigned bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}
inline float __int_as_float(int bits) { return __uint_as_float(unsigned(bits)); }
inline unsigned __float_as_uint(float x) {
    unsigned bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}
inline int __float_as_int(float x) { return int(__float_as_uint(x)); }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }
inline float __logf(float x) { return logf(x); }

inline void __syncthreads() { machine::named_meeting(0).meet(machine::block_dim.x); }
inline void __threadfence() {}
inline void __syncwarp() { machine::current->warp->meeting.meet(machine::LANES); }

// All lanes give a value, and `take` has what each of them gave.
template <typename V, typename Take> auto exchange(V mine, Take take) {
    machine::Warp &warp = *machine::current->warp;
    auto &given = warp.given[warp.meeting.phase & 1];
    static_assert(sizeof mine <= sizeof given[0]);
    memcpy(given[machine::current->lane], &mine, sizeof mine);
    __syncwarp();
    return take([&](int lane) {
        V theirs;
        memcpy(&theirs, given[lane], sizeof theirs);
        return theirs;
    });
}
template <typename V> V __shfl_sync(unsigned, V mine, int lane) {
    return exchange(mine, [&](auto of) { return of(lane & 31); });
}
template <typename V> V __shfl_xor_sync(unsigned lanes, V mine, int mask) {
    return __shfl_sync(lanes, mine, machine::current->lane ^ mask);
}
template <typename V> V __shfl_up_sync(unsigned lanes, V mine, int by) {
    int lane = machine::current->lane;
    return __shfl_sync(lanes, mine, lane < by ? lane : lane - by);
}
inline unsigned __ballot_sync(unsigned, bool mine) {
    return exchange(mine, [](auto of) {
        unsigned all = 0;
        for (int lane = 0; lane < machine::LANES; lane++) all |= unsigned(of(lane)) << lane;
        return all;
    });
}

inline unsigned __reduce_min_sync(unsigned, unsigned mine) {
    return exchange(mine, [](auto of) {
        unsigned least = of(0);
        for (int lane = 1; lane < machine::LANES; lane++) least = std::min(least, of(lane));
        return least;
    });
}

template <typename V> V __ldg(const V *from) { return *from; }
template <typename V> V __ldcg(const V *from) { return *from; }
template <typename V> V atomicAdd(V *to, V value) {
    V old = *to;
    *to += value;
    return old;
}
inline void atomicMin(int *to, int value) { *to = min(*to, value); }
template <typename V> void atomicMax(V *to, V value) { *to = std::max(*to, value); }
