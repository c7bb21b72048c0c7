// What `narrow.cu` and `resident.cu` have in common. They take out[m, n] = Σ_k x[m, k] · w[n, k] the other way
// round: rows of w (gated: by turns 8 of the gate and 8 of up) are the first factor, all rows of x the second.

#if OUT_F32
typedef float O;
#else
typedef bf16 O;
#endif

struct Output {
    const float *bias; O *out;
    int rows, n_total, add_to, gelu;
};

// A place in a ring of stages, and the parity of its phase. Divisions would cost more than a step does.
struct Ring {
    int stages;
    u32 stage = 0, parity = 0;
    __device__ explicit Ring(int stages) : stages(stages) {}
    __device__ void next() {
        if (++stage == stages) stage = 0, parity ^= 1;
    }
};

// 8 rows of x from `row0` on and a warp's columns, 16 (gated: 8) from `column0` on. A thread has sums of columns
// g and g + 8 (gated: of gate and up) and rows 2t and 2t + 1. Of bf16, it loads and stores row g, columns 2t and
// 2t + 1.
struct Corner {
    int row0, column0;
    __device__ Corner(int row0, int column0) : row0(row0), column0(column0) {}
    __device__ __forceinline__ bool has(const Output &o, int h, int row) const {
        return row0 + row < o.rows && column0 + 8 * h < o.n_total;
    }
    __device__ __forceinline__ O *at(const Output &o, int h, int row, int column) const {
        return o.out + (long long)(row0 + row) * o.n_total + column0 + 8 * h + column;
    }
    // What the sums are added to.
    __device__ __forceinline__ uint2 before(const Output &o) const {
        int lane = threadIdx.x & 31, g = lane / 4, t = lane & 3;
        uint2 x = make_uint2(0, 0);
        if (GATED || sizeof(O) == 4 || !o.add_to) return x;
        if (has(o, 0, g)) x.x = *(const u32 *)at(o, 0, g, 2 * t);
        if (has(o, 1, g)) x.y = *(const u32 *)at(o, 1, g, 2 * t);
        return x;
    }
    // `factor`: of rows 2t and 2t + 1.
    __device__ __forceinline__ void store(const Output &o, float4 sums, uint2 before, float2 factor) const {
        int lane = threadIdx.x & 31, g = lane / 4, t = lane & 3;
        float value[2][2] = {{sums.x * factor.x, sums.y * factor.y}, {sums.z * factor.x, sums.w * factor.y}};
#pragma unroll
        for (int h = 0; h < 2; h++) {
            int n = GATED ? column0 + h * o.n_total + g : column0 + 8 * h + g;
            float bias = o.bias && (GATED ? column0 : column0 + 8 * h) < o.n_total ? o.bias[n] : 0.f;
            value[h][0] += bias, value[h][1] += bias;
        }
        if (GATED) {
#pragma unroll
            for (int e = 0; e < 2; e++) value[0][e] = activate(value[0][e], o.gelu) * value[1][e];
        }
#pragma unroll
        for (int h = 0; h < (GATED ? 1 : 2); h++) {
#if OUT_F32
#pragma unroll
            for (int e = 0; e < 2; e++) {
                if (!has(o, h, 2 * t + e)) continue;
                float *to = at(o, h, 2 * t + e, g);
                *to = value[h][e] + (o.add_to ? *to : 0.f);
            }
#else
            u32 old = transposed(h ? before.y : before.x);
            if (o.add_to) value[h][0] += low_half(old), value[h][1] += high_half(old);
            u32 x = transposed(pack(value[h][0], value[h][1]));
            if (has(o, h, g)) *(u32 *)at(o, h, g, 2 * t) = x;
#endif
        }
    }
};
