// CUDA's functions that kernels call, on the host: meetings of threads, atomics, vectors, bits and fast mathematics.
#pragma once

// Meetings

inline void __syncthreads() {
    const emulation::Outside outside;
    emulation::wait(emulation::State::barrier);
}

inline void __syncwarp(unsigned mask = 0xffffffffu) {
    const emulation::Outside outside;
    emulation::meet("__syncwarp", mask, [](emulation::Fiber* const* lanes, unsigned met) {
        unsigned lane = 0;
        while (lanes[lane] == nullptr) ++lane;
        races::order(static_cast<unsigned>(lanes[lane] - emulation::fibers.data()) - lane, met);
    });
}

namespace emulation {

// What a shuffle brings: the value, and the lane whose value it wants.
template <typename T>
struct Wish {
    T value;
    unsigned source;
};

template <typename T>
T shuffle(const char* kind, unsigned mask, T value, unsigned source) {
    static_assert(sizeof(Wish<T>) <= PAYLOAD, "a shuffle moves 32 bits or 64");
    const Outside outside;
    Fiber& self = fibers[current];
    const Wish<T> wish{value, source};
    std::memcpy(self.brought, &wish, sizeof wish);
    meet(kind, mask, [](Fiber* const* lanes, unsigned met) {
        for (unsigned lane = 0; lane < WARP; ++lane) {
            if (lanes[lane] == nullptr) continue;
            Wish<T> wanted, from;
            std::memcpy(&wanted, lanes[lane]->brought, sizeof wanted);
            if (!(met >> wanted.source & 1)) {
                const std::string caller = who(static_cast<unsigned>(lanes[lane] - fibers.data()));
                const std::string source = std::to_string(wanted.source);
                return fail(caller + " calls " + lanes[lane]->kind + " for the value of lane " + source + ", which is not in its mask");
            }
            std::memcpy(&from, lanes[wanted.source]->brought, sizeof from);
            std::memcpy(lanes[lane]->taken, &from.value, sizeof from.value);
        }
    });
    T result;
    std::memcpy(&result, self.taken, sizeof result);
    return result;
}

inline unsigned vote(const char* kind, unsigned mask, bool holds) {
    const Outside outside;
    Fiber& self = fibers[current];
    self.brought[0] = holds;
    meet(kind, mask, [](Fiber* const* lanes, unsigned) {
        unsigned ballot = 0;
        for (unsigned lane = 0; lane < WARP; ++lane)
            if (lanes[lane] != nullptr && lanes[lane]->brought[0]) ballot |= 1u << lane;
        for (unsigned lane = 0; lane < WARP; ++lane)
            if (lanes[lane] != nullptr) std::memcpy(lanes[lane]->taken, &ballot, sizeof ballot);
    });
    unsigned ballot;
    std::memcpy(&ballot, self.taken, sizeof ballot);
    return ballot;
}

inline unsigned lane() { return current % WARP; }

}  // namespace emulation

// A source outside the segment of `width` lanes is, as on a GPU, the caller's own value (of __shfl_sync: the index modulo width).
template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
    const unsigned lane = emulation::lane(), segment = lane / width * width;
    return emulation::shuffle("__shfl_sync", mask, value, segment + static_cast<unsigned>(source) % width);
}

template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
    const unsigned lane = emulation::lane(), segment = lane / width * width;
    return emulation::shuffle("__shfl_up_sync", mask, value, lane < segment + delta ? lane : lane - delta);
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
    const unsigned lane = emulation::lane(), segment = lane / width * width;
    return emulation::shuffle("__shfl_down_sync", mask, value, lane + delta >= segment + width ? lane : lane + delta);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
    const unsigned lane = emulation::lane(), other = lane ^ static_cast<unsigned>(bits);
    return emulation::shuffle("__shfl_xor_sync", mask, value, other >= lane / width * width + width ? lane : other);
}

inline unsigned __ballot_sync(unsigned mask, int predicate) { return emulation::vote("__ballot_sync", mask, predicate != 0); }
inline int __any_sync(unsigned mask, int predicate) { return emulation::vote("__any_sync", mask, predicate != 0) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return emulation::vote("__all_sync", mask, predicate != 0) == mask; }

// The lanes of `mask` whose value has the same bits as the caller's.
template <typename T>
unsigned __match_any_sync(unsigned mask, T value) {
    static_assert(sizeof value == 4 || sizeof value == 8, "CUDA compares 32 bits or 64");
    const emulation::Outside outside;
    emulation::Fiber& self = emulation::fibers[emulation::current];
    std::memcpy(self.brought, &value, sizeof value);
    emulation::meet("__match_any_sync", mask, [](emulation::Fiber* const* lanes, unsigned) {
        for (unsigned lane = 0; lane < emulation::WARP; ++lane) {
            if (lanes[lane] == nullptr) continue;
            unsigned same = 0;
            for (unsigned other = 0; other < emulation::WARP; ++other) {
                if (lanes[other] == nullptr) continue;
                if (!std::memcmp(lanes[lane]->brought, lanes[other]->brought, sizeof(T))) same |= 1u << other;
            }
            std::memcpy(lanes[lane]->taken, &same, sizeof same);
        }
    });
    unsigned same;
    std::memcpy(&same, self.taken, sizeof same);
    return same;
}

// Atomics

namespace emulation {

template <typename T, typename Change>
T atomically(T* address, Change change) {
    const Outside outside;
    races::atomic(address, sizeof(T));
    const T old = *address;
    *address = change(old);
    return old;
}

}  // namespace emulation

#define EMULATION_ATOMIC(T)                                                                                             \
    inline T atomicAdd(T* address, T value) {                                                                           \
        return emulation::atomically(address, [=](T old) { return static_cast<T>(old + value); });                      \
    }                                                                                                                   \
    inline T atomicMax(T* address, T value) {                                                                           \
        return emulation::atomically(address, [=](T old) { return old > value ? old : value; });                        \
    }                                                                                                                   \
    inline T atomicMin(T* address, T value) {                                                                           \
        return emulation::atomically(address, [=](T old) { return old < value ? old : value; });                        \
    }                                                                                                                   \
    inline T atomicExch(T* address, T value) {                                                                          \
        return emulation::atomically(address, [=](T) { return value; });                                                \
    }                                                                                                                   \
    inline T atomicCAS(T* address, T expected, T value) {                                                               \
        return emulation::atomically(address, [=](T old) { return old == expected ? value : old; });                    \
    }
EMULATION_ATOMIC(int)
EMULATION_ATOMIC(unsigned)
EMULATION_ATOMIC(unsigned long long)
#undef EMULATION_ATOMIC

inline float atomicAdd(float* address, float value) {
    return emulation::atomically(address, [=](float old) { return old + value; });
}
inline double atomicAdd(double* address, double value) {
    return emulation::atomically(address, [=](double old) { return old + value; });
}
inline unsigned atomicOr(unsigned* address, unsigned value) {
    return emulation::atomically(address, [=](unsigned old) { return old | value; });
}

inline void __threadfence() {}

// Vectors

struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

// Bits and numbers

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __clz(int bits) { return bits == 0 ? 32 : __builtin_clz(static_cast<unsigned>(bits)); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }

template <typename To, typename From>
To emulation_bits(From value) {
    static_assert(sizeof(To) == sizeof(From), "the same bits");
    To result;
    std::memcpy(&result, &value, sizeof result);
    return result;
}
inline unsigned __float_as_uint(float value) { return emulation_bits<unsigned>(value); }
inline float __uint_as_float(unsigned bits) { return emulation_bits<float>(bits); }
inline int __float_as_int(float value) { return emulation_bits<int>(value); }
inline float __int_as_float(int bits) { return emulation_bits<float>(bits); }
inline long long __double_as_longlong(double value) { return emulation_bits<long long>(value); }
inline double __longlong_as_double(long long bits) { return emulation_bits<double>(bits); }

template <typename T>
T __ldg(const T* address) {
    return *address;
}

using std::max;
using std::min;

inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
