// What rung 2 of the depth loss selects (selection.cuh) for each image, and where its histograms and choices lie.
#pragma once

#include "depth_residual.cuh"

// The selections of both medians of an image; each has the digits of Accumulator<T>, of which the prediction may need fewer.
template <typename T>
struct Medians {
    Selection prediction, target;

    __device__ Medians(unsigned* histograms, Choice* choices, int image) {
        const int digits = digits_of(bits_of<Accumulator<T>>);
        const long long place = static_cast<long long>(image) * 2 * digits;
        prediction = {histograms + place * BINS, choices + place, bits_of<T>};
        target = {histograms + (place + digits) * BINS, choices + place + digits, bits_of<Accumulator<T>>};
    }
};

__device__ inline Choice lower_median(int valid) {
    return {0, static_cast<unsigned>(max(valid - 1, 0)) / 2, static_cast<unsigned>(valid)};
}

// The selections of the trimming: first the |R| of rank floor(kept M) - 1, the threshold; then, among the pixels that equal it,
// the place of the last one kept. Places all differ.
template <typename A>
struct Trimming {
    Selection size, place;
    int used;

    __device__ Trimming(unsigned* histograms, Choice* choices, int image, int digits, int valid, double kept) {
        const int of_size = digits_of(bits_of<A> - 1);
        const long long first = static_cast<long long>(image) * digits;
        size = {histograms + first * BINS, choices + first, bits_of<A> - 1};
        place = {histograms + (first + of_size) * BINS, choices + first + of_size, (digits - of_size) * DIGIT};
        used = kept_of(valid, kept);
    }

    // With used = 0 the rank is that of no key.
    __device__ Choice start() const { return {0, static_cast<unsigned>(used) - 1u, 0}; }

    // Where the selection among the places of those that equal the threshold starts.
    __device__ static Choice among(const Choice& threshold) { return {0, threshold.rank, threshold.count}; }

    // Whether places decide nothing: none of the equal ones is kept, or all.
    __device__ bool is_decided(const Choice& threshold) const { return used == 0 || threshold.rank + 1 == threshold.count; }
};
