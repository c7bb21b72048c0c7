// `ptx.cuh` and `hopper.cuh` for the CPU: the same functions, each doing what its instruction does. What they
// are for is said there.
#pragma once

#include "cuda.h"

#include "common.cuh"

using machine::bytes_at, machine::current, machine::fail, machine::later, machine::wait_until;

inline void wait_for_previous() {
    wait_until("the kernel in front", [] { return machine::previous_has_ended; });
    current->has_waited_for_previous = true;
}
inline void let_next_start() {}

// To the nearest, to the even one where two are as near.
inline bf16 to_bf16(float x) {
    u32 bits;
    memcpy(&bits, &x, 4);
    if (std::isnan(x)) return {0x7fff};
    return {(unsigned short)((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline u32 pack(float low, float high) { return to_bf16(low).bits | u32(to_bf16(high).bits) << 16; }
template <typename O> O from_float(float x);
template <> inline float from_float<float>(float x) { return x; }
template <> inline bf16 from_float<bf16>(float x) { return to_bf16(x); }
inline float power_of_2(float x) { return exp2f(x); }
inline int arrive_at(int *count) { return (*count)++; }
inline void discard_line(void *line) { memset(line, 0xff, 128); }

inline void mma(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    struct Factors { u32 a[4], b[2]; };
    exchange(Factors{{a0, a1, a2, a3}, {b0, b1}}, [&](auto of) {
        int g = current->lane / 4, t = current->lane & 3;
        for (int quarter = 0; quarter < 4; quarter++) {
            Factors rows = of(g * 4 + quarter);
            for (int i = 0; i < 4; i++) {
                u32 b[2];
                memcpy(b, of((2 * t + i % 2) * 4 + quarter).b, sizeof b);
                for (int half = 0; half < 2; half++) {
                    u32 a = rows.a[i / 2 + 2 * half];
                    d[i] += low_half(a) * low_half(b[half]) + high_half(a) * high_half(b[half]);
                }
            }
        }
    });
}

inline void check_aligned(const char *what, uintptr_t place, int bytes) {
    if (place % bytes) fail("%s: %#zx is no multiple of %d", what, size_t(place), bytes);
}

inline uint4 load_weights(const void *address) {
    check_aligned("from", uintptr_t(address), 16);
    return *(const uint4 *)address;
}
inline void copy_16(u32 to, const void *from, bool there = true) {
    check_aligned("to", to, 16);
    if (there) check_aligned("from", uintptr_t(from), 16);
    machine::copy_later([=] {
        if (there) memcpy(bytes_at(to), from, 16);
        else memset(bytes_at(to), 0, 16);
    });
}
inline void copy_16_once(u32 to, const void *from, bool there) { copy_16(to, from, there); }
inline void end_copies() { machine::end_copy_group(); }
template <int PENDING> void wait_for_copies() { machine::wait_for_copy_groups(PENDING); }

inline u32 shared_address(const void *p) { return machine::address_of(p); }

// A barrier in shared memory: the phase is over when all have arrived, and all bytes that they expect.
struct Barrier {
    short arrivals, missing;
    int bytes : 31;
    unsigned phase : 1;

    void advance(int arrived, int more_bytes) {
        if (arrivals <= 0) fail("a barrier is not initialised");
        missing -= arrived, bytes += more_bytes;
        if (missing < 0) fail("more arrivals than a barrier expects");
        if (missing == 0 && bytes == 0) missing = arrivals, phase ^= 1;
    }
};
static_assert(sizeof(Barrier) == 8);
inline Barrier &barrier_at(u32 address) {
    check_aligned("barrier", address, 8);
    return *(Barrier *)bytes_at(address);
}
inline void barrier_init(u32 barrier, u32 arrivals) { barrier_at(barrier) = {short(arrivals), short(arrivals), 0, 0}; }
inline void publish_barriers() {}
inline void barrier_expect(u32 barrier, u32 bytes) { barrier_at(barrier).advance(1, int(bytes)); }
inline void barrier_arrive(u32 barrier) { barrier_at(barrier).advance(1, 0); }
#define ARRIVALS(warps) ((RACE_CHECKED ? 32 : 1) * (warps))
inline void lanes_arrive(u32 barrier) {
    if (RACE_CHECKED || current->lane == 0) barrier_arrive(barrier);
}
inline void warp_arrives(u32 barrier) {
    __syncwarp();
    lanes_arrive(barrier);
}
inline void barrier_wait(u32 barrier, u32 parity) {
    Barrier *b = &barrier_at(barrier);
    wait_until("a barrier in shared memory", [b, parity] { return b->phase != parity; });
}
inline void barrier_wait_for_cluster(u32 barrier, u32 parity) { barrier_wait(barrier, parity); }
// Bytes land, and their barrier counts them.
template <typename Land> void land_later(u32 barrier, int bytes, Land land) {
    later([=] { land(), barrier_at(barrier).advance(0, -bytes); });
}

inline void named_barrier(int number, int threads) { machine::named_meeting(number).meet(threads); }
inline void named_arrive(int number, int threads) { machine::named_meeting(number).arrive(threads); }
inline void named_leave(int number, int threads) {
    if (RACE_CHECKED) named_barrier(number, threads);
    else named_arrive(number, threads);
}

inline void store_shared(u32 address, u32 value) { memcpy(bytes_at(address), &value, 4); }
inline void store_shared(u32 address, uint4 x) {
    check_aligned("to", address, 16);
    memcpy(bytes_at(address), &x, 16);
}
inline void store_shared(u32 address, float a, float b, float c, float d) {
    float4 x = {a, b, c, d};
    check_aligned("to", address, 16);
    memcpy(bytes_at(address), &x, 16);
}
inline void store_shared(u32 address, float a, float b) {
    float2 x = {a, b};
    check_aligned("to", address, 8);
    memcpy(bytes_at(address), &x, 8);
}
inline uint4 load_shared_16(u32 address) {
    check_aligned("from", address, 16);
    uint4 x;
    memcpy(&x, bytes_at(address), 16);
    return x;
}
template <int COUNT> void take_registers() {}
template <int COUNT> void leave_registers() {}
inline void publish_shared() {}

// Lane 8m + i names row i of matrix m.
template <typename Read> void load_by_rows(u32 (&r)[4], u32 address, Read read) {
    check_aligned("a matrix's row", address, 16);
    exchange(address, [&](auto of) {
        for (int m = 0; m < 4; m++) r[m] = read([&](int row, int column) {
            unsigned short value;
            memcpy(&value, bytes_at(of(m * 8 + row)) + column * 2, 2);
            return u32(value);
        });
    });
}
inline void load_matrices(u32 (&r)[4], u32 address) {
    int g = current->lane / 4, t = current->lane & 3;
    load_by_rows(r, address, [&](auto at) { return at(g, 2 * t) | at(g, 2 * t + 1) << 16; });
}
inline void load_transposed(u32 (&r)[4], u32 address) {
    int g = current->lane / 4, t = current->lane & 3;
    load_by_rows(r, address, [&](auto at) { return at(2 * t, g) | at(2 * t + 1, g) << 16; });
}

inline u32 transposed(u32 x) {
    u32 y = 0;
    exchange(x, [&](auto of) {
        int g = current->lane / 4, t = current->lane & 3;
        auto at = [&](int row, int column) { return of(row * 4 + column / 2) >> 16 * (column % 2) & 0xffff; };
        y = at(2 * t, g) | at(2 * t + 1, g) << 16;
    });
    return y;
}

inline void prefetch_near(const void *) {}
inline void prefetch_line(const void *) {}

inline void fetch_bytes(u32 to, const void *from, u32 bytes, u32 barrier) {
    check_aligned("to", to, 16), check_aligned("from", uintptr_t(from), 16), check_aligned("bytes", bytes, 16);
    land_later(barrier, int(bytes), [=] { memcpy(bytes_at(to), from, bytes); });
}
inline void fetch_bytes_once(u32 to, const void *from, u32 bytes, u32 barrier) { fetch_bytes(to, from, bytes, barrier); }

// Where an address lies in the 128-byte swizzle.
inline u32 swizzled(u32 place) { return place ^ (place >> 7 & 7) << 4; }

// Of a matrix whose boxes are 64 columns in the 128-byte swizzle, as `Matrix` describes it.
struct TensorMap {
    const bf16 *from;
    int rows, columns, box_rows = 16, halves = 1;
    // Parts of 64 columns in a box, where these are not all.
    int box_parts = 0;
};
inline void prefetch_map(const TensorMap &) {}
// A box at column `x`, whose rows `row_at` names: zeros where the matrix has none.
template <typename RowAt> void fetch_rows(u32 to, const TensorMap &map, u32 barrier, int x, RowAt row_at) {
    check_aligned("to", to, 1024);
    land_later(barrier, map.box_rows * 128, [=] {
        for (int i = 0; i < map.box_rows; i++)
            for (int column = 0; column < 64; column += 8) {
                unsigned char *bytes = bytes_at(swizzled(to + i * 128 + column * 2));
                int row = row_at(i);
                if (row >= 0 && x + column < map.columns) memcpy(bytes, map.from + size_t(row) * map.columns + x + column, 16);
                else memset(bytes, 0, 16);
            }
    });
}
inline void fetch_box(u32 to, const TensorMap &map, u32 barrier, int x, int y) {
    fetch_rows(to, map, barrier, x, [rows = map.rows, y](int i) { return y + i < rows ? y + i : -1; });
}
inline u64 read_once() { return 0; }
inline void fetch_groups(u32 to, const TensorMap &map, u32 barrier, int x, int y, u64) {
    fetch_rows(to, map, barrier, x, [half = map.rows / map.halves, halves = map.halves, y](int i) {
        int row = (y + i / 8 / halves) * 8 + i % 8;
        return row < half ? i / 8 % halves * half + row : -1;
    });
}
inline void fetch_parts(u32 to, const TensorMap &map, u32 barrier, int y, int part = 0) {
    check_aligned("to", to, 1024);
    int columns = map.box_parts ? map.box_parts * 64 : map.columns;
    land_later(barrier, map.box_rows * columns * 2, [=] {
        for (int row = 0; row < map.box_rows; row++)
            for (int column = 0; column < columns; column += 8) {
                u32 place = to + column / 64 * map.box_rows * 128 + row * 128 + column % 64 * 2;
                unsigned char *bytes = bytes_at(swizzled(place));
                if (y + row < map.rows) memcpy(bytes, map.from + size_t(y + row) * map.columns + part * 64 + column, 16);
                else memset(bytes, 0, 16);
            }
    });
}

inline int cluster_rank() { return machine::block_index().x % machine::cluster_size(); }
inline void cluster_arrive() {
    current->cluster_phase = machine::cluster_meeting().phase;
    machine::cluster_meeting().arrive(machine::cluster_size() * int(machine::block_dim.x));
}
inline void cluster_wait() {
    machine::Meeting *meeting = &machine::cluster_meeting();
    wait_until("the cluster", [meeting, before = current->cluster_phase] { return meeting->phase != before; });
}
inline u32 address_in(u32 address, int rank) { return machine::address_in_block(address, rank); }
inline void barrier_arrive_there(u32 barrier) {
    later([=] { barrier_arrive(barrier); });
}
template <typename V> void send_value(u32 to, u32 barrier, V value) {
    check_aligned("to", to, sizeof value);
    if (to >> 24 != barrier >> 24) fail("sends to one block and tells another");
    land_later(barrier, sizeof value, [=] { memcpy(bytes_at(to), &value, sizeof value); });
}
inline void send(u32 to, u32 barrier, float a, float b, float c, float d) { send_value(to, barrier, float4{a, b, c, d}); }
inline void send(u32 to, u32 barrier, float x) { send_value(to, barrier, x); }

// A factor is its address, and how far apart its blocks of 64 columns are: rows of 128 bytes.
inline u64 factor(u32 address, u32 columns_apart = 16) { return address | u64(columns_apart) << 32; }
inline u64 along(u64 factor, u32 bytes) { return factor + bytes; }
// A number in row `row` of the factor.
inline float element(u64 factor, int row, int column) {
    u32 place = u32(factor) + column / 64 * u32(factor >> 32) + row * 128 + column % 64 * 2;
    bf16 x;
    memcpy(&x, bytes_at(swizzled(place)), sizeof x);
    return to_float(x);
}
inline void products_begin() {}
inline void products_commit() { machine::end_products(); }
template <int PENDING> void products_wait() {
    machine::wait_for_products(PENDING);
    // A warp waits as one: when a lane says that factors may be overwritten, all have read them.
    __syncwarp();
}
template <typename V, int COUNT> void pin(V (&)[COUNT]) {}

// Half of the products take their factors when they begin, half when they are waited for.
template <int COLUMNS> struct Product {
    // `of_a`: row and place in it.
    template <int TRANSPOSED_B, typename OfA> static void later(float (&d)[COLUMNS / 2], OfA of_a, u64 b, int accumulate) {
        int g = current->lane / 4, t = current->lane & 3;
        auto multiply = [=] {
            std::vector<float> sums(COLUMNS / 2);
            for (int i = 0; i < COLUMNS / 2; i++)
                for (int k = 0; k < 16; k++) {
                    int column = i / 4 * 8 + 2 * t + i % 2;
                    sums[i] += of_a(g + i / 2 % 2 * 8, k) * (TRANSPOSED_B ? element(b, k, column) : element(b, column, k));
                }
            return sums;
        };
        bool is_early = machine::takes_factors_early();
        machine::product_later([=, &d, taken = is_early ? multiply() : std::vector<float>()] {
            std::vector<float> sums = is_early ? taken : multiply();
            for (int i = 0; i < COLUMNS / 2; i++) d[i] = (accumulate ? d[i] : 0) + sums[i];
        });
    }
    template <int TRANSPOSED_B> static void shared(float (&d)[COLUMNS / 2], u64 a, u64 b, int accumulate) {
        int first = int(current->index.x) / 32 % 4 * 16;
        later<TRANSPOSED_B>(d, [=](int row, int k) { return element(a, first + row, k); }, b, accumulate);
    }
    template <int TRANSPOSED_B> static void registers(float (&d)[COLUMNS / 2], const u32 *a, u64 b, int accumulate) {
        struct Lane { u32 a[4]; };
        struct Rows { float at[16][16]; } rows;
        Lane mine;
        memcpy(mine.a, a, sizeof mine.a);
        exchange(mine, [&](auto of) {
            for (int lane = 0; lane < machine::LANES; lane++) {
                Lane from = of(lane);
                for (int i = 0; i < 4; i++) {
                    float *to = &rows.at[lane / 4 + i % 2 * 8][2 * (lane & 3) + i / 2 * 8];
                    to[0] = low_half(from.a[i]), to[1] = high_half(from.a[i]);
                }
            }
        });
        later<TRANSPOSED_B>(d, [=](int row, int k) {
            if (memcmp(mine.a, a, sizeof mine.a)) fail("a factor in registers is written before its product is there");
            return rows.at[row][k];
        }, b, accumulate);
    }
};
