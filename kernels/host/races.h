// Races within a launch: two accesses to one byte, by different threads, at least one of which writes, that nothing orders.
//
// Between threads of a block __syncthreads orders, between lanes of a warp also __syncwarp (a shuffle or a vote does not order
// memory); between blocks nothing does. Atomic accesses do not race with each other. A lost update, s += x by many threads, gives
// the right sum under every order in which whole threads run one after the other; only this sees it. Shared memory, which here is
// static memory of the library or one buffer, is another's in every block: what one block leaves there does not race with the next.
//
// The compiler's -fsanitize=thread puts a call before every access; the functions it calls are here, not in its library.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <string>
#include <unordered_map>
#include <vector>

// Not instrumented itself, nor inlined into what is.
#define RACES_UNWATCHED __attribute__((noinline, no_sanitize("thread")))

// Where the linker has put the library's static memory.
extern "C" {
extern char __bss_start[] __attribute__((visibility("hidden")));
extern char _end[] __attribute__((visibility("hidden")));
}

namespace races {

inline bool watching = false;
inline std::string found;

#ifndef __SANITIZE_THREAD__

inline void begin_launch(const void*, std::size_t, const void*, std::size_t) {}
inline void begin_block(unsigned) {}
inline void enter(unsigned) {}
inline void barrier() {}
inline void order(unsigned, unsigned) {}
inline void atomic(const void*, std::size_t) {}

#else

constexpr unsigned LANES = 32;

// One access: by which thread of which block, and when: after how many barriers of its block, and of its own lane's orderings.
struct Access {
    std::uint32_t block = 0, thread = 0, period = 0, moment = 0;  // block 0: none yet
    bool atomic = false;
};

struct Cell {
    Access written, read, also_read;  // two readers are enough: a writer who is the one races with the other
};

inline std::unordered_map<std::uintptr_t, Cell> cells;
inline std::uintptr_t stack_begin, stack_end, shared_begin, shared_end;
inline std::uint32_t block, period, thread;
// known[thread * LANES + lane]: up to which of its moments that lane of the same warp is ordered before this thread.
inline std::vector<std::uint32_t> known;

inline void begin_launch(const void* stacks, std::size_t stack_bytes, const void* shared, std::size_t shared_bytes) {
    stack_begin = reinterpret_cast<std::uintptr_t>(stacks);
    stack_end = stack_begin + stack_bytes;
    shared_begin = reinterpret_cast<std::uintptr_t>(shared);
    shared_end = shared_begin + shared_bytes;
    cells.clear();
    found.clear();
    block = 0;
}

inline void begin_block(unsigned threads) {
    ++block;
    period = 0;
    known.assign((threads + LANES - 1) / LANES * LANES * LANES, 0);
    for (unsigned t = 0; t < threads; ++t) known[t * LANES + t % LANES] = 1;
}

inline void enter(unsigned resumed) { thread = resumed; }

inline void barrier() { ++period; }

// __syncwarp: what any lane of `mask` of the warp that begins at thread `first` has done or knows is before what all do next.
inline void order(unsigned first, unsigned mask) {
    std::uint32_t latest[LANES] = {};
    for (unsigned lane = 0; lane < LANES; ++lane)
        if (mask >> lane & 1)
            for (unsigned other = 0; other < LANES; ++other) {
                const std::uint32_t moment = known[(first + lane) * LANES + other];
                if (moment > latest[other]) latest[other] = moment;
            }
    for (unsigned lane = 0; lane < LANES; ++lane)
        if (mask >> lane & 1) {
            for (unsigned other = 0; other < LANES; ++other) known[(first + lane) * LANES + other] = latest[other];
            ++known[(first + lane) * LANES + lane];
        }
}

inline bool is_shared(std::uintptr_t address) {
    return (address >= shared_begin && address < shared_end) ||
           (address >= reinterpret_cast<std::uintptr_t>(__bss_start) && address < reinterpret_cast<std::uintptr_t>(_end));
}

inline bool unordered(const Access& earlier, std::uintptr_t address) {
    if (earlier.block == 0 || (earlier.block == block && earlier.thread == thread)) return false;
    if (earlier.block != block) return !is_shared(address);
    if (earlier.period != period) return false;
    if (earlier.thread / LANES != thread / LANES) return true;
    return known[thread * LANES + earlier.thread % LANES] < earlier.moment;
}

inline void report(const char* now, const char* before, const Access& earlier) {
    if (!found.empty()) return;
    char words[240];
    std::snprintf(words, sizeof words, "race: thread %u of block %u %s what thread %u of block %u %s, and nothing orders them",
                  thread, block - 1, now, earlier.thread, earlier.block - 1, before);
    found = words;
}

RACES_UNWATCHED inline void access(const void* address, std::size_t bytes, bool writes, bool is_atomic) {
    const std::uintptr_t first = reinterpret_cast<std::uintptr_t>(address);
    if (!watching || (first >= stack_begin && first < stack_end)) return;
    watching = false;
    const Access now{block, thread, period, known[thread * LANES + thread % LANES], is_atomic};
    for (std::size_t k = 0; k < bytes; ++k) {
        Cell& cell = cells[first + k];
        if (unordered(cell.written, first + k) && !(is_atomic && cell.written.atomic))
            report(writes ? "writes" : "reads", "wrote", cell.written);
        if (writes) {
            for (const Access& earlier : {cell.read, cell.also_read})
                if (unordered(earlier, first + k) && !(is_atomic && earlier.atomic)) report("writes", "read", earlier);
            cell.written = now;
            if (is_atomic) cell.read = now;
        } else if (unordered(cell.read, first + k)) {
            cell.also_read = now;
        } else {
            cell.read = now;
        }
    }
    watching = true;
}

// For the emulation's atomic functions, which are not watched themselves.
RACES_UNWATCHED inline void atomic(const void* address, std::size_t bytes) {
    watching = true;
    access(address, bytes, true, true);
    watching = false;
}

#endif

}  // namespace races

#ifdef __SANITIZE_THREAD__

#define RACES_ACCESS(bytes)                                                                          \
    RACES_UNWATCHED void __tsan_read##bytes(void* address) { races::access(address, bytes, false, false); }          \
    RACES_UNWATCHED void __tsan_write##bytes(void* address) { races::access(address, bytes, true, false); }          \
    RACES_UNWATCHED void __tsan_unaligned_read##bytes(void* address) { races::access(address, bytes, false, false); } \
    RACES_UNWATCHED void __tsan_unaligned_write##bytes(void* address) { races::access(address, bytes, true, false); }

extern "C" {
RACES_ACCESS(1)
RACES_ACCESS(2)
RACES_ACCESS(4)
RACES_ACCESS(8)
RACES_ACCESS(16)
RACES_UNWATCHED void __tsan_read_range(void* address, unsigned long bytes) { races::access(address, bytes, false, false); }
RACES_UNWATCHED void __tsan_write_range(void* address, unsigned long bytes) { races::access(address, bytes, true, false); }
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
}

#endif
