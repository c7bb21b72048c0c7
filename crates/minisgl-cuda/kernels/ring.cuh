// A place in a ring of stages, and the parity of its phase. Divisions would cost more than a step does.
struct Ring {
    int stages;
    u32 stage = 0, parity = 0;
    __device__ explicit Ring(int stages) : stages(stages) {}
    __device__ void next() {
        if (++stage == stages) stage = 0, parity ^= 1;
    }
};

// Σ x² of a thread's PIECES pieces of 16 bytes of a row of a step of x, which has 128 bytes in the 128-byte swizzle:
// the `sharer`th ones.
template <int PIECES> __device__ __forceinline__ float squares_of_row(u32 step, int row, int sharer) {
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
        uint4 piece = load_shared_16(step + row * 128 + ((sharer * PIECES + i ^ row) & 7) * 16);
        const u32 *pairs = (const u32 *)&piece;
#pragma unroll
        for (int p = 0; p < 4; p++) sum += low_half(pairs[p]) * low_half(pairs[p]) + high_half(pairs[p]) * high_half(pairs[p]);
    }
    return sum;
}
