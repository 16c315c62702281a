// Bilinear resizing with align_corners=True, along one axis: what an output reads, and who reads an element.
//
// Output i of an axis reads that axis at
//
//     i * (in - 1) / (out - 1)                    (at 0 where out is 1)
//
// so the corners coincide. The position is kept as that fraction of integers: its whole part is a quotient and its
// fractional part a remainder over out - 1, both exact at any size, where a float position loses a bit of the weight every
// time the map doubles.
#pragma once

#include "element.cuh"

// The two elements of an axis that one output reads, and their weights. An output that falls on an element reads no other.
template <typename A>
struct Taps {
    int lower, upper;
    A lower_weight, upper_weight;
};

template <typename A>
__device__ Taps<A> taps(int i, int in, int out) {
    const long long steps = out > 1 ? out - 1 : 1;
    const long long position = static_cast<long long>(i) * (in - 1);  // in units of 1 / steps
    const int lower = static_cast<int>(position / steps);
    const long long remainder = position % steps;
    return {lower, lower + (remainder > 0), static_cast<A>(steps - remainder) / static_cast<A>(steps),
            static_cast<A>(remainder) / static_cast<A>(steps)};
}

// The outputs of an axis that read element i, first to last: those o with |o (in - 1) - i steps| < steps. Their weights are
// the forward ones, 1 - that distance / steps.
struct Readers {
    int first, last;
};

__device__ inline Readers readers(int i, int in, int out) {
    if (in == 1) return {0, out - 1};
    const long long steps = out > 1 ? out - 1 : 1;
    const long long first = i == 0 ? 0 : (i - 1) * steps / (in - 1) + 1;
    const long long last = ((i + 1) * steps - 1) / (in - 1);
    return {static_cast<int>(first), static_cast<int>(last < out ? last : out - 1)};
}

template <typename A>
__device__ A reader_weight(int o, int i, int in, int out) {
    const long long steps = out > 1 ? out - 1 : 1;
    const long long offset = static_cast<long long>(o) * (in - 1) - i * steps;
    return static_cast<A>(steps - (offset < 0 ? -offset : offset)) / static_cast<A>(steps);
}
