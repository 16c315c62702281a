// Selection without a sort: the number of rank r among many is found digit by digit, by counting how many have which digit.
//
// A number's key is its bits, changed so that keys order as unsigned integers as the numbers do. Of the keys that begin with the
// digits already known, those of each value of the next digit are counted (a histogram); the digit sought is where the counts,
// added from the smallest value on, pass r. Integers can be counted in any order, so the result is the same every time.
#pragma once

#include "chunks.cuh"

template <int BYTES>
struct WordOf;
template <>
struct WordOf<2> {
    using type = unsigned short;
};
template <>
struct WordOf<4> {
    using type = unsigned;
};
template <>
struct WordOf<8> {
    using type = unsigned long long;
};

template <typename T>
using Word = typename WordOf<sizeof(T)>::type;

template <typename T>
__device__ inline Word<T> to_word(T x) {
    Word<T> word;
    memcpy(&word, &x, sizeof x);
    return word;
}

template <typename T>
__device__ inline T from_word(Word<T> word) {
    T x;
    memcpy(static_cast<void*>(&x), &word, sizeof x);
    return x;
}

template <typename T>
constexpr int bits_of = 8 * sizeof(T);

template <typename T>
constexpr Word<T> sign_bit = static_cast<Word<T>>(Word<T>(1) << (bits_of<T> - 1));

// The key of a number: a positive one's bits above all negative ones', whose bits grow the other way.
template <typename T>
__device__ inline Word<T> to_key(T x) {
    const Word<T> word = to_word(x);
    return static_cast<Word<T>>(word & sign_bit<T> ? ~word : word | sign_bit<T>);
}

template <typename T>
__device__ inline T from_key(Word<T> key) {
    return from_word<T>(static_cast<Word<T>>(key & sign_bit<T> ? key ^ sign_bit<T> : ~key));
}

constexpr int DIGIT = 11, BINS = 1 << DIGIT;

// How many digits a key of so many bits has, the first the highest, and how many bits one of them.
__device__ inline int digits_of(int bits) { return (bits + DIGIT - 1) / DIGIT; }
__device__ inline int width_of(int bits, int digit) { return min(DIGIT, bits - digit * DIGIT); }

// What is known after some digits: those digits, the rank sought among the keys that share them, and how many do.
struct Choice {
    unsigned long long prefix;
    unsigned rank, count;
};

// One selection: for each digit a histogram of BINS counts, zero at first, and the choice after it.
struct Selection {
    unsigned* histograms;
    Choice* choices;
    int bits;
};

// The choice after one digit more, in every thread of a block of 2^n threads, from 32 to BINS. A rank that no key has (there is
// none, or it is -1) gives the smallest prefix, and count 0.
__device__ inline Choice narrow(const Choice& before, const unsigned* histogram, int width) {
    __shared__ unsigned totals[LANES];
    __shared__ Choice found;
    const unsigned thread = threadIdx.x, lane = thread % LANES, warp = thread / LANES;
    const unsigned bins = BINS / blockDim.x;  // of this thread, neighbours
    unsigned sum = 0;
    for (unsigned bin = thread * bins; bin < (thread + 1) * bins; ++bin) sum += histogram[bin];
    unsigned through = sum;  // of the warp's threads up to this one
    for (unsigned distance = 1; distance < LANES; distance *= 2) {
        const unsigned before_it = __shfl_up_sync(EVERY_LANE, through, distance);
        if (lane >= distance) through += before_it;
    }
    if (lane == LANES - 1) totals[warp] = through;
    if (thread == 0) found = {before.prefix << width, 0, 0};
    __syncthreads();
    unsigned below = through - sum;
    for (unsigned other = 0; other < warp; ++other) below += totals[other];
    if (below <= before.rank && before.rank - below < sum) {
        unsigned bin = thread * bins, rank = before.rank - below;
        while (rank >= histogram[bin]) rank -= histogram[bin++];
        found = {before.prefix << width | bin, rank, histogram[bin]};
    }
    __syncthreads();
    const Choice now = found;
    __syncthreads();  // before `found` is written again
    return now;
}

// The choice after `digit` digits. One block of a launch `keeps` what it finds, for the launches that come after.
__device__ inline Choice choice_after(const Selection& selection, int digit, const Choice& start, bool keeps) {
    if (digit == 0) return start;
    const int digits = digits_of(selection.bits);
    if (digit > digits) return selection.choices[digits - 1];
    const Choice before = digit == 1 ? start : selection.choices[digit - 2];
    const Choice now = narrow(before, selection.histograms + (digit - 1) * BINS, width_of(selection.bits, digit - 1));
    if (keeps && threadIdx.x == 0) selection.choices[digit - 1] = now;
    return now;
}

// What a thread needs to count one digit of keys: whether a key has the digits known, and then in which bin it is.
template <typename Key>
struct Counter {
    int width, shift;
    Key prefix;

    __device__ Counter(int bits, int digit, unsigned long long known)
        : width(width_of(bits, digit)), shift(bits - digit * DIGIT - width), prefix(static_cast<Key>(known)) {}

    __device__ void count(Key key, unsigned* bins) const {
        const Key shifted = static_cast<Key>(key >> shift);
        if (static_cast<Key>(shifted >> width) == prefix) atomicAdd(&bins[shifted & ((1u << width) - 1)], 1u);
    }
};

// Counts of a block: set to zero by all its threads, and added to those of the image.
__device__ inline void clear_bins(unsigned* bins, int count) {
    for (int bin = static_cast<int>(threadIdx.x); bin < count; bin += static_cast<int>(blockDim.x)) bins[bin] = 0;
    __syncthreads();
}

__device__ inline void add_bins(const unsigned* bins, unsigned* histogram) {
    __syncthreads();
    for (int bin = static_cast<int>(threadIdx.x); bin < BINS; bin += static_cast<int>(blockDim.x)) {
        if (bins[bin] != 0) atomicAdd(&histogram[bin], bins[bin]);
    }
}
