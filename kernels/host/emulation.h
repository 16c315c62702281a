// CUDA on the host: what a .cu file needs to be compiled by a C++ compiler, and `emulation::launch` to run its kernels.
//
// A block runs on one host thread; each of its threads is a fiber, with a stack of its own, which runs until it waits for others
// (__syncthreads, __syncwarp, a shuffle, a vote, a matrix product of a warp) or ends. So a barrier means what it means on a GPU:
// what it is forgotten for is read too early, under some order of the fibers. That order is drawn from a seed, anew whenever they
// meet; seed 0 is the order of their indices. Waiting for a thread that can never come ends the launch with a sentence that names
// both.
//
// Compiled with -fsanitize=thread (and without that sanitizer's own library), every access to memory that is not a fiber's stack
// is reported to `races.h`, which knows which accesses a barrier orders. Compiled with -fsanitize=address, every one is checked.
//
// A launch takes what the CUDA driver takes: the extent of the grid and of a block, the bytes of dynamic shared memory, and one
// pointer per argument. Launches of several host threads wait for each other.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#define EMULATION_ADDRESS 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define EMULATION_ADDRESS 1
#endif
#endif
#ifdef EMULATION_ADDRESS
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static
#define __align__(bytes) alignas(bytes)

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};

inline dim3 gridDim, blockDim, blockIdx, threadIdx;
constexpr int warpSize = 32;

#include "races.h"

namespace emulation {

constexpr unsigned WARP = 32;
constexpr std::size_t STACK = 1 << 16;  // bytes; a CUDA thread has few registers and little local memory
constexpr unsigned PAYLOAD = 48;        // bytes that a lane hands to the others at most

enum class State { ready, barrier, collective, ended };

struct Fiber {
    ucontext_t context;
    State state;
    dim3 index;
    // What it waits for: a meeting of the lanes in `mask`, of one kind ("__shfl_sync"), and what it brings and takes away.
    const char* kind;
    unsigned mask;
    unsigned char brought[PAYLOAD], taken[PAYLOAD];
};

// Called by the last lane of a meeting, with the warp's fibers and the mask: fills what each lane takes away.
using Meeting = void (*)(Fiber* const* lanes, unsigned mask);

inline std::vector<Fiber> fibers;
inline std::vector<unsigned char> stacks, shared;
inline ucontext_t scheduler;
inline unsigned current;
inline std::uint64_t randomness;
inline std::string failure;
inline void (*body)();

// The kernel's own accesses are watched for races, those of the emulation are not.
class Outside {
   public:
    RACES_UNWATCHED Outside() : watched(races::watching) { races::watching = false; }
    RACES_UNWATCHED ~Outside() { races::watching = watched; }

   private:
    bool watched;
};

inline unsigned draw(unsigned below) {
    randomness ^= randomness << 13;
    randomness ^= randomness >> 7;
    randomness ^= randomness << 17;
    return static_cast<unsigned>((randomness >> 11) % below);
}

#ifdef EMULATION_ADDRESS
inline const void* scheduler_stack;
inline std::size_t scheduler_size;
#endif

RACES_UNWATCHED inline void resume(unsigned thread) {
    current = thread;
    threadIdx = fibers[thread].index;
#ifdef EMULATION_ADDRESS
    void* fake;
    __sanitizer_start_switch_fiber(&fake, stacks.data() + thread * STACK, STACK);
#endif
    races::enter(thread);
    swapcontext(&scheduler, &fibers[thread].context);
    races::watching = false;
#ifdef EMULATION_ADDRESS
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

// Back to the scheduler, until it resumes this fiber; for good where it has ended.
inline void wait(State state) {
    Fiber& self = fibers[current];
    self.state = state;
#ifdef EMULATION_ADDRESS
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(state == State::ended ? nullptr : &fake, scheduler_stack, scheduler_size);
#endif
    swapcontext(&self.context, &scheduler);
#ifdef EMULATION_ADDRESS
    __sanitizer_finish_switch_fiber(fake, &scheduler_stack, &scheduler_size);
#endif
}

inline void fail(const std::string& words) {
    if (failure.empty()) failure = words;
}

inline std::string who(unsigned thread) {
    const dim3 t = fibers[thread].index, b = blockIdx;
    char words[160];
    std::snprintf(words, sizeof words, "thread (%u, %u, %u) of block (%u, %u, %u)", t.x, t.y, t.z, b.x, b.y, b.z);
    return words;
}

RACES_UNWATCHED inline void run_fiber() {
#ifdef EMULATION_ADDRESS
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_size);
#endif
    races::watching = true;
    body();
    races::watching = false;
    wait(State::ended);
}

// Meet the lanes of `mask` of this warp, all of which must come with the same kind and mask.
inline void meet(const char* kind, unsigned mask, Meeting meeting) {
    const unsigned first = current / WARP * WARP, lane = current - first;
    Fiber& self = fibers[current];
    self.kind = kind;
    self.mask = mask;
    self.state = State::collective;
    if (!(mask >> lane & 1)) {
        char words[64];
        std::snprintf(words, sizeof words, " with mask 0x%08x, which leaves itself out", mask);
        fail(who(current) + " calls " + kind + words);
        wait(State::ended);
    }
    Fiber* lanes[WARP] = {};
    for (unsigned other = 0; other < WARP; ++other) {
        if (!(mask >> other & 1)) continue;
        if (first + other >= fibers.size()) {
            fail(who(current) + " calls " + kind + " with a mask that has more lanes than its warp");
            wait(State::ended);
        }
        lanes[other] = &fibers[first + other];
        const Fiber& fiber = *lanes[other];
        const bool there = fiber.state == State::collective && fiber.mask == mask && !std::strcmp(fiber.kind, kind);
        if (!there) {
            wait(State::collective);
            return;
        }
    }
    if (meeting != nullptr) meeting(lanes, mask);
    for (unsigned other = 0; other < WARP; ++other)
        if (lanes[other] != nullptr) lanes[other]->state = State::ready;
    wait(State::ready);
}

inline std::string stuck() {
    std::string words;
    for (unsigned thread = 0; thread < fibers.size(); ++thread) {
        const Fiber& fiber = fibers[thread];
        if (fiber.state != State::collective) continue;
        for (unsigned other = 0; other < WARP; ++other) {
            const unsigned awaited = thread / WARP * WARP + other;
            if (!(fiber.mask >> other & 1) || awaited == thread) continue;
            const Fiber& missed = fibers[awaited];
            if (missed.state == State::collective && missed.mask == fiber.mask && !std::strcmp(missed.kind, fiber.kind)) continue;
            char mask[32];
            std::snprintf(mask, sizeof mask, "0x%08x", fiber.mask);
            words = who(thread) + " waits at " + fiber.kind + " with mask " + mask + " for lane " + std::to_string(other);
            words += ", which ";
            if (missed.state == State::ended) return words + "has ended";
            return words + "waits at " + (missed.state == State::barrier ? "__syncthreads" : missed.kind);
        }
    }
    return "the threads of a block wait for each other";
}

inline void run_block(std::vector<unsigned>& order) {
    const unsigned count = static_cast<unsigned>(fibers.size());
    for (unsigned thread = 0; thread < count; ++thread) {
        Fiber& fiber = fibers[thread];
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = stacks.data() + thread * STACK;
        fiber.context.uc_stack.ss_size = STACK;
        fiber.context.uc_link = nullptr;
        fiber.index = {thread % blockDim.x, thread / blockDim.x % blockDim.y, thread / blockDim.x / blockDim.y};
        fiber.state = State::ready;
        makecontext(&fiber.context, run_fiber, 0);
    }
    if (!shared.empty()) std::memset(shared.data(), 0xff, shared.size());  // NaN, for who reads what nobody wrote
    races::begin_block(count);
    for (;;) {
        if (randomness != 0)
            for (unsigned k = count; k > 1; --k) std::swap(order[k - 1], order[draw(k)]);
        bool ran = false;
        for (const unsigned thread : order) {
            if (fibers[thread].state != State::ready) continue;
            resume(thread);
            ran = true;
            if (!failure.empty()) return;
        }
        if (ran) continue;
        unsigned waiting = 0, ended = 0;
        for (const Fiber& fiber : fibers) {
            waiting += fiber.state == State::barrier;
            ended += fiber.state == State::ended;
        }
        if (ended == count) return;
        if (waiting + ended != count) return fail(stuck());
        races::barrier();
        for (Fiber& fiber : fibers)
            if (fiber.state == State::barrier) fiber.state = State::ready;
    }
}

template <typename Kernel, typename... Parameters, std::size_t... Position>
void call(Kernel kernel, void** arguments, std::index_sequence<Position...>, void (*)(Parameters...)) {
    kernel(*static_cast<Parameters*>(arguments[Position])...);
}

inline std::mutex one_at_a_time;  // of all kernels of the library, which share everything above

// Run a kernel; null, or what went wrong, valid until this thread's next launch.
template <typename... Parameters>
const char* launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, std::size_t shared_bytes, std::uint64_t seed,
                   void** arguments) {
    const std::lock_guard<std::mutex> lock(one_at_a_time);
    static void (*running)(Parameters...);
    static void** given;
    running = kernel;
    given = arguments;
    body = [] { call(running, given, std::index_sequence_for<Parameters...>{}, running); };
    failure.clear();
    gridDim = grid;
    blockDim = block;
    randomness = seed * 0x9e3779b97f4a7c15u;
    const unsigned count = block.x * block.y * block.z;
    fibers.resize(count);
    stacks.resize(count * STACK);
    shared.assign(shared_bytes, 0);
    std::vector<unsigned> order(count);
    for (unsigned thread = 0; thread < count; ++thread) order[thread] = thread;
    races::begin_launch(stacks.data(), stacks.size(), shared.data(), shared.size());
    const unsigned blocks = grid.x * grid.y * grid.z, shift = seed == 0 ? 0 : draw(blocks);
    for (unsigned k = 0; k < blocks && failure.empty(); ++k) {
        const unsigned index = (k + shift) % blocks;
        blockIdx = {index % grid.x, index / grid.x % grid.y, index / grid.x / grid.y};
        run_block(order);
        if (failure.empty() && !races::found.empty()) failure = races::found;
    }
    static thread_local std::string words;  // the failure itself is the next launch's, maybe another thread's, once this returns
    words = failure;
    return words.empty() ? nullptr : words.c_str();
}

}  // namespace emulation

#include "intrinsics.h"
