// A machine that runs CUDA kernels on the CPU, thread by thread, in an order that a seed names.
//
// A thread of a kernel is a fibre, and a block is a thread of the system: so `__shared__` can be
// `thread_local`, and kernels compile as they are. Only one block runs at a time, and in it one fibre, until
// it waits for something. Some warps run only when nothing else can, and some of what goes on beside the
// threads (copies, messages between blocks, the kernel in front) ends only when all of them wait. So where
// a wait is missing, the result is wrong for most seeds, and a wait for what never comes is seen at once.
//
// Not modelled: caches, fences (all see a write at once), lanes of a warp that fall behind others between
// two waits, and whatever only a kernel's time depends on.
#pragma once

#include <csetjmp>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <vector>

namespace machine {

constexpr int LANES = 32;
// Dynamic shared memory of a block, and behind it what nobody may write.
constexpr int SHARED_BYTES = 227 << 10, GUARD_BYTES = 4 << 10;

// Where a number of threads meet again and again.
struct Meeting {
    int arrived = 0;
    unsigned phase = 0;

    void arrive(int threads) {
        if (++arrived == threads) arrived = 0, phase++;
    }
    void meet(int threads);
};

// What lanes give one another, in two places by turns: a lane may give again before all others have taken.
struct Warp {
    Meeting meeting;
    unsigned char given[2][LANES][32];
};

struct Block;
// Grids have one row.
struct Index { unsigned x, y = 0; };

// Copies for which a thread waits together. Half of them do not land before it does.
struct CopyGroup {
    int under_way = 0;
    std::vector<std::function<void()>> held_back;
};

struct Thread {
    Block *block;
    Warp *warp;
    Index index;
    int lane;
    bool has_begun = false, has_ended = false, has_waited_for_previous = false;
    // What it waits for, and whether that is there.
    const char *waits_for = "its turn";
    std::function<bool()> ready = [] { return true; };
    std::deque<std::unique_ptr<CopyGroup>> copies;
    // Products of four warps that are under way, by the groups in which they are waited for.
    std::deque<std::vector<std::function<void()>>> products{1};
    unsigned cluster_phase = 0;
    jmp_buf resume;
};

struct Launch {
    int blocks, cluster, threads;
    // The calling block's dynamic shared memory: SHARED_BYTES and GUARD_BYTES.
    std::function<unsigned char *()> memory;
    // What the kernel in front does, by its end.
    std::function<void()> previous;
    std::function<void()> kernel;
};

// The fibre that runs; null between their turns.
extern thread_local Thread *current;
extern bool previous_has_ended;
extern Index block_dim, grid_dim;

void set_seed(unsigned seed);
void run(const Launch &launch);

// Prints what is wrong and where, and ends the program.
[[noreturn]] void fail(const char *format, ...);

// Lets others run until `ready`, which is asked on any thread of the system.
void sleep_until(const char *what, std::function<bool()> ready);
template <typename Ready> void wait_until(const char *what, Ready ready) {
    if (!ready()) sleep_until(what, ready);
}
inline void Meeting::meet(int threads) {
    unsigned before = phase;
    arrive(threads);
    wait_until("other threads", [this, before] { return phase != before; });
}

// `what` happens at a random moment.
void later(std::function<void()> what);

// Copies of a thread, which waits for all but the last `pending` ended groups of them.
void copy_later(std::function<void()> copy);
void end_copy_group();
void wait_for_copy_groups(int pending);

// The same for a thread's share of products; whether the next one's factors are read now or only then.
void product_later(std::function<void()> product);
void end_products();
void wait_for_products(int pending);
bool takes_factors_early();

Index block_index();
Meeting &named_meeting(int number);
Meeting &cluster_meeting();
int cluster_size();

// The address of something in the block's shared memory; that of the same place in a block of its cluster;
// what is there.
uint32_t address_of(const void *shared);
uint32_t address_in_block(uint32_t address, int rank);
unsigned char *bytes_at(uint32_t address);

}  // namespace machine
