#include "machine.h"

#include <ucontext.h>

#include <algorithm>
#include <condition_variable>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <map>
#include <mutex>
#include <random>
#include <thread>
#include <utility>

namespace machine {

thread_local Thread *current;
bool previous_has_ended;
Index block_dim, grid_dim{0, 1};

namespace {

constexpr size_t STACK_BYTES = 64 << 10;
// Not a number, as a float and as bf16.
constexpr unsigned char POISON = 0xff;

// A shared address: the block in the highest byte, and how far behind its `anchor`, more than this.
constexpr uint32_t ANCHOR = 1 << 23;
alignas(1024) thread_local unsigned char anchor;

thread_local jmp_buf scheduler;
std::mutex turns;
std::mt19937 dice;
unsigned seed;

bool one_in(unsigned n) { return dice() % n == 0; }

// A warp runs in one of so many turns of its block: the slow ones only when nothing else goes on, each before
// all slower ones.
constexpr unsigned SLOW = 1u << 31;
unsigned some_pace() { return one_in(4) ? SLOW | dice() : 1u << dice() % 3; }
constexpr unsigned NO_PACE = ~0u;  // of no warp
// Warps of this pace or a faster one run in this round.
unsigned pace_now;

// What is under way, by the round in which it happens; and what is so late that all threads wait.
std::multimap<unsigned, std::function<void()>> under_way;
std::deque<std::function<void()>> late;
unsigned round_now;
// Of this run: whether something may be so late, whether the last of it comes first then, and whether slow
// warps run before what is under way comes to its end.
bool some_are_late, last_comes_first, threads_come_first;

}  // namespace

struct Block {
    const Launch &launch;
    unsigned index;
    unsigned char *anchor_here = nullptr;
    int alive;
    std::vector<Warp> warps;
    std::vector<unsigned> paces;
    std::vector<Thread> threads;
    // Not cleared: most of it is never touched.
    std::unique_ptr<char[]> stacks;
    Meeting named[16];
    bool has_turn = false, has_run = false;
    std::condition_variable turn_changes;
    std::thread system_thread;

    Block(const Launch &launch, unsigned index)
        : launch(launch), index(index), alive(launch.threads), warps(launch.threads / LANES), threads(launch.threads),
          stacks(new char[STACK_BYTES * launch.threads]) {
        std::generate_n(std::back_inserter(paces), warps.size(), some_pace);
        for (int i = 0; i < launch.threads; i++) {
            Thread &thread = threads[i];
            thread.block = this, thread.warp = &warps[i / LANES], thread.index = {unsigned(i)}, thread.lane = i % LANES;
            thread.copies.push_back(std::make_unique<CopyGroup>());
        }
        system_thread = std::thread([this] { live(); });
    }

    // Whether any of its threads ran.
    bool take_turn() {
        has_run = false;
        pass_turn(true);
        return has_run;
    }
    void pass_turn(bool to_block) {
        std::unique_lock lock(turns);
        has_turn = to_block;
        turn_changes.notify_one();
        turn_changes.wait(lock, [&] { return has_turn != to_block; });
    }

    // Of the warps that can run.
    unsigned fastest_pace() const {
        unsigned fastest = NO_PACE;
        for (const Thread &thread : threads) {
            unsigned pace = paces[thread.index.x / LANES];
            if (pace < fastest && !thread.has_ended && thread.ready()) fastest = pace;
        }
        return fastest;
    }

    // Everything from here on is called on the block's own thread of the system.
    void live() {
        {
            std::unique_lock lock(turns);
            turn_changes.wait(lock, [&] { return has_turn; });
        }
        unsigned char *memory = launch.memory();
        std::memset(memory, POISON, SHARED_BYTES + GUARD_BYTES);
        anchor_here = &anchor;
        std::vector<int> order;
        for (size_t warp = 0; warp < warps.size(); warp++) order.push_back(int(warp));
        while (alive) {
            std::shuffle(order.begin(), order.end(), dice);
            for (int warp : order)
                if (paces[warp] <= pace_now || (paces[warp] < SLOW && one_in(paces[warp])))
                    while (run_warp(warp)) {
                        has_run = true;
                        if (paces[warp] >= SLOW || one_in(16)) break;
                    }
            if (alive) pass_turn(false);
        }
        for (int i = SHARED_BYTES; i < SHARED_BYTES + GUARD_BYTES; i++)
            if (memory[i] != POISON) fail("block %u: written %d bytes behind its shared memory", index, i - SHARED_BYTES);
        std::unique_lock lock(turns);
        has_turn = false;
        turn_changes.notify_one();
    }

    // Whether any of its threads could run.
    bool run_warp(int warp) {
        bool could_run = false, backwards = one_in(2);
        for (int i = 0; i < LANES; i++) {
            Thread &thread = threads[warp * LANES + (backwards ? LANES - 1 - i : i)];
            if (thread.has_ended || !thread.ready()) continue;
            resume(thread);
            could_run = true;
        }
        return could_run;
    }

    // Contexts only begin threads: `swapcontext` would ask the system at each turn.
    void resume(Thread &thread) {
        current = &thread;
        if (!_setjmp(scheduler)) {
            if (thread.has_begun) _longjmp(thread.resume, 1);
            thread.has_begun = true;
            ucontext_t context;
            getcontext(&context);
            context.uc_stack.ss_sp = stacks.get() + STACK_BYTES * thread.index.x;
            context.uc_stack.ss_size = STACK_BYTES;
            makecontext(&context, begin, 0);
            setcontext(&context);
        }
        current = nullptr;
    }

    static void begin() {
        current->block->launch.kernel();
        if (!current->has_waited_for_previous) fail("ends without having waited for the kernel in front");
        for (const auto &group : current->copies)
            if (group->under_way) fail("ends without having waited for its copies");
        if (current->products.size() > 1 || !current->products.front().empty()) fail("ends without having waited for its products");
        current->has_ended = true;
        current->block->alive--;
        _longjmp(scheduler, 1);
    }
};

namespace {

std::vector<std::unique_ptr<Block>> blocks;
std::vector<Meeting> clusters;

[[noreturn]] void fail_asleep() {
    for (const auto &block : blocks)
        for (const Thread &thread : block->threads)
            if (!thread.has_ended && (thread.lane == 0 || thread.warp->meeting.arrived == 0))
                std::fprintf(stderr, "block %u, thread %u waits for %s\n", block->index, thread.index.x, thread.waits_for);
    fail("all wait, and nothing is under way");
}

void happen_late() {
    for (unsigned count = 1 + dice() % 16; !late.empty() && count > 0; count--) {
        last_comes_first ? late.back()() : late.front()();
        last_comes_first ? late.pop_back() : late.pop_front();
    }
}

}  // namespace

void run(const Launch &launch) {
    block_dim.x = launch.threads, grid_dim.x = launch.blocks, previous_has_ended = false, round_now = 0;
    some_are_late = one_in(2), last_comes_first = one_in(2), threads_come_first = one_in(2);
    under_way.emplace(dice() % 2048, [&] { launch.previous(), previous_has_ended = true; });
    clusters.assign(launch.blocks / launch.cluster, {});
    for (int i = 0; i < launch.blocks; i++) blocks.push_back(std::make_unique<Block>(launch, i));
    std::vector<Block *> order;
    for (auto &block : blocks) order.push_back(block.get());
    auto is_alive = [](const Block *block) { return block->alive > 0; };
    for (; std::any_of(order.begin(), order.end(), is_alive); round_now++) {
        for (; !under_way.empty() && under_way.begin()->first <= round_now; under_way.erase(under_way.begin()))
            under_way.begin()->second();
        std::shuffle(order.begin(), order.end(), dice);
        unsigned fastest = NO_PACE;
        bool any_ran = false;
        for (Block *block : order) {
            unsigned pace = block->fastest_pace();
            if (pace < SLOW || pace <= pace_now) any_ran |= block->take_turn();
            fastest = std::min(fastest, pace);
        }
        pace_now = 0;
        if (any_ran) continue;
        if (fastest < NO_PACE && threads_come_first != one_in(16)) pace_now = fastest;
        else if (!under_way.empty()) round_now = under_way.begin()->first - 1;
        else if (!late.empty()) happen_late();
        else if (fastest < NO_PACE) pace_now = fastest;
        else fail_asleep();
    }
    if (!under_way.empty() || !late.empty()) fail("%zu copies are under way though all threads have ended", under_way.size() + late.size());
    for (auto &block : blocks) block->system_thread.join();
    blocks.clear();
}

void set_seed(unsigned value) { seed = value, dice.seed(value); }

void fail(const char *format, ...) {
    std::fprintf(stderr, "seed %u: ", seed);
    if (current) std::fprintf(stderr, "block %u, thread %u: ", current->block->index, current->index.x);
    va_list arguments;
    va_start(arguments, format);
    std::vfprintf(stderr, format, arguments);
    std::fputc('\n', stderr);
    std::_Exit(1);
}

void sleep_until(const char *what, std::function<bool()> ready) {
    current->waits_for = what, current->ready = std::move(ready);
    if (!_setjmp(current->resume)) _longjmp(scheduler, 1);
}

void later(std::function<void()> what) {
    if (some_are_late && one_in(2)) late.push_back(std::move(what));
    else under_way.emplace(round_now + 1 + dice() % (1u << dice() % 8), std::move(what));
}

void copy_later(std::function<void()> copy) {
    CopyGroup *group = current->copies.back().get();
    group->under_way++;
    auto land = [group, copy] { copy(), group->under_way--; };
    if (one_in(2)) later(land);
    else group->held_back.push_back(land);
}
void end_copy_group() { current->copies.push_back(std::make_unique<CopyGroup>()); }
void wait_for_copy_groups(int pending) {
    auto &groups = current->copies;
    // The last group is open, and never waited for.
    int awaited = int(groups.size()) - 1 - pending;
    if (awaited <= 0) return;
    for (int i = 0; i < awaited; i++)
        for (auto &land : std::exchange(groups[i]->held_back, {})) later(std::move(land));
    wait_until("copies", [&groups, awaited, landed = 0]() mutable {
        while (landed < awaited && groups[landed]->under_way == 0) landed++;
        return landed == awaited;
    });
    groups.erase(groups.begin(), groups.begin() + awaited);
}

void product_later(std::function<void()> product) { current->products.back().push_back(std::move(product)); }
void end_products() { current->products.emplace_back(); }
void wait_for_products(int pending) {
    auto &groups = current->products;
    // The last group is open, and never waited for.
    for (; int(groups.size()) - 1 > pending; groups.pop_front())
        for (auto &product : groups.front()) product();
}
bool takes_factors_early() { return one_in(2); }

Index block_index() { return {current->block->index}; }
Meeting &named_meeting(int number) { return current->block->named[number]; }
int cluster_size() { return int(blocks.size() / clusters.size()); }
Meeting &cluster_meeting() { return clusters[current->block->index / cluster_size()]; }

uint32_t address_of(const void *shared) {
    ptrdiff_t offset = (const unsigned char *)shared - &anchor;
    if (std::abs(offset) >= ptrdiff_t(ANCHOR)) fail("%p is not in shared memory", shared);
    return current->block->index << 24 | uint32_t(offset + ANCHOR);
}
uint32_t address_in_block(uint32_t address, int rank) {
    if (rank < 0 || rank >= cluster_size()) fail("a cluster has no block %d", rank);
    return (address & 0xffffff) | (current->block->index / cluster_size() * cluster_size() + rank) << 24;
}
unsigned char *bytes_at(uint32_t address) {
    const Block &block = *blocks.at(address >> 24);
    if (!block.anchor_here) fail("the shared memory of block %u may not be there yet", block.index);
    if (!block.alive) fail("the shared memory of block %u may not be there any more", block.index);
    return block.anchor_here + (ptrdiff_t(address & 0xffffff) - ANCHOR);
}

}  // namespace machine
