// What the forward and the backward pass of cross-entropy share: a logit interpolated at a pixel, and its exponential.
#pragma once

#include "bilinear.cuh"
#include "labels.cuh"

constexpr int LANES = 32;
constexpr unsigned ALL = 0xffffffffu;
constexpr int NONE = 0x7fffffff;  // no pixel

// The hardware's own exponential, accurate to 2 + 1.173 |x| units in the last place: of exp(x), x <= 0, the second is lost in
// the sum. double exists on the host alone.
__device__ inline float exponential(float x) { return __expf(x); }
__device__ inline double exponential(double x) { return exp(x); }

// A logit at one pixel, from its four cells.
template <typename T, typename A>
__device__ A interpolate(const T* plane, int width, const Taps<A>& vertical, const Taps<A>& horizontal) {
    const T* above = plane + static_cast<long long>(vertical.lower) * width;
    const T* below = plane + static_cast<long long>(vertical.upper) * width;
    return vertical.lower_weight * (horizontal.lower_weight * static_cast<A>(above[horizontal.lower]) +
                                    horizontal.upper_weight * static_cast<A>(above[horizontal.upper])) +
           vertical.upper_weight * (horizontal.lower_weight * static_cast<A>(below[horizontal.lower]) +
                                    horizontal.upper_weight * static_cast<A>(below[horizontal.upper]));
}

// A logit between two cells of a row.
template <typename T, typename A>
__device__ A along(const T* row, const Taps<A>& horizontal) {
    return horizontal.lower_weight * static_cast<A>(row[horizontal.lower]) +
           horizontal.upper_weight * static_cast<A>(row[horizontal.upper]);
}
