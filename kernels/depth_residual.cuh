// The residual R of the depth loss, a pixel at a time: its value, whether it is kept, what it adds to the loss, its gradient.
// The formulae are in losses.cu.
#pragma once

#include "selection.cuh"

// What is kept of an image for the gradient: NUMBERS of type Accumulator<T>, COUNTS integers, COUNTS - SCALES scales at most.
// DEVIATION: before it is clamped. PULL: the sum of B dloss/dR (d - t). BALANCE: of the signs of d - t. SIGNS: of those of the
// kept R. FIRST: how far the first pixel that has the median is from the end, 0 where none has it. LIMIT: the last pixel kept
// of those that equal the threshold.
enum { MEDIAN, DEVIATION, TARGET_MEDIAN, TARGET_DEVIATION, THRESHOLD, PULL, NUMBERS };
enum { VALID, BALANCE, FIRST, SIGNS, LIMIT, SCALES, COUNTS = 32 };

template <typename A>
constexpr Word<A> INVALID = static_cast<Word<A>>(~Word<A>(0));

template <typename A>
__device__ bool is_valid(A r) {
    return to_word(r) != INVALID<A>;
}

// |R| orders as its bits without the sign do. Where a pixel is not valid they are above all others: it is in nobody's way.
template <typename A>
__device__ Word<A> magnitude(A r) {
    return to_word(r) & static_cast<Word<A>>(~sign_bit<A>);
}

template <typename A>
__device__ int sign(A x) {
    return (x > 0) - (x < 0);
}

template <typename A>
__device__ A absolute(A x) {
    return x < 0 ? -x : x;
}

// What both maps are aligned by. An image with a number that is not finite, in either map, has NaN for both means of |d - t|.
template <typename A>
__device__ void set_alignment(A* numbers, A median, A mean, A target_median, A target_mean) {
    const A spoilt = (mean - mean) + (target_mean - target_mean);  // NaN where one of them is not finite
    numbers[MEDIAN] = median;
    numbers[DEVIATION] = mean + spoilt;
    numbers[TARGET_MEDIAN] = target_median;
    numbers[TARGET_DEVIATION] = target_mean + spoilt;
}

// s of a map from its mean |d - t|.
template <typename A>
__device__ A clamped(A mean) {
    return mean < A(1e-6) ? A(1e-6) : mean;
}

template <typename A>
__device__ bool finite(A x) {
    return x - x == 0;
}

template <typename A>
__device__ A residual_at(A d, A target, bool valid, const A* numbers) {
    if (!valid) return from_word<A>(INVALID<A>);
    if (!finite(numbers[DEVIATION])) return from_word<A>(static_cast<Word<A>>(INVALID<A> ^ sign_bit<A>));  // another NaN
    return (d - numbers[MEDIAN]) / clamped(numbers[DEVIATION]) -
           (target - numbers[TARGET_MEDIAN]) / clamped(numbers[TARGET_DEVIATION]);
}

// Kept are the |R| below the threshold, and those equal to it up to the pixel LIMIT.
template <typename A>
__device__ bool is_kept(A r, int i, A threshold, int limit) {
    return magnitude(r) < to_word(threshold) || (magnitude(r) == to_word(threshold) && i <= limit);
}

// How many |R| are kept of M. In float64, as the definition says it.
__device__ inline int kept_of(int valid, double kept) { return static_cast<int>(floor(kept * valid)); }

// The absolute differences of a pixel at scale k to its right and lower neighbour: each counts once, where both are valid. pull
// is the same sum with sign(dR) dd for |dR|, which the gradient through s needs.
template <typename A>
struct Differences {
    A size, pull;
};

template <typename A, typename T>
__device__ Differences<A> differences(const A* residual, const T* prediction, int x, int y, int height, int width, int k) {
    const int step = 1 << k;
    const long long here = static_cast<long long>(y) * width + x, below = here + static_cast<long long>(step) * width;
    const A r = residual[here];
    Differences<A> sum = {0, 0};
    if (!is_valid(r)) return sum;
    const A d = static_cast<A>(prediction[here]);
    if (x < width - step && is_valid(residual[here + step])) {
        const A difference = residual[here + step] - r;
        sum.size += absolute(difference);
        sum.pull += sign(difference) * (static_cast<A>(prediction[here + step]) - d);
    }
    if (y < height - step && is_valid(residual[below])) {
        const A difference = residual[below] - r;
        sum.size += absolute(difference);
        sum.pull += sign(difference) * (static_cast<A>(prediction[below]) - d);
    }
    return sum;
}

// Whether a pixel is of scale k.
__device__ inline bool is_of_scale(int x, int y, int k) { return ((x | y) & ((1 << k) - 1)) == 0; }

// B dloss/dR of a valid pixel, for dloss = 1. shares[k] is weight / M_k. A neighbour that is not valid is NaN: sign(NaN) is 0.
template <typename A>
__device__ A residual_gradient(const A* residual, int x, int y, int height, int width, bool kept, A trimmed_share,
                               const A* shares, int scales) {
    const A* const here = residual + static_cast<long long>(y) * width + x;
    const A r = *here;
    A sum = kept ? sign(r) * trimmed_share : 0;
    for (int k = 0; k < scales && is_of_scale(x, y, k); ++k) {
        const int step = 1 << k;
        const long long rows = static_cast<long long>(step) * width;
        int signs = 0;
        if (x >= step) signs += sign(r - here[-step]);
        if (x < width - step) signs += sign(r - here[step]);
        if (y >= step) signs += sign(r - here[-rows]);
        if (y < height - step) signs += sign(r - here[rows]);
        sum += shares[k] * signs;
    }
    return sum;
}

template <typename A>
__device__ void set_shares(A* shares, const int* counts, int scales, double weight) {
    for (int k = static_cast<int>(threadIdx.x); k < scales; k += static_cast<int>(blockDim.x)) {
        shares[k] = static_cast<A>(weight) / static_cast<A>(max(counts[SCALES + k], 1));
    }
    __syncthreads();
}
