// How the blocks of a launch share images, and add what their threads found.
#pragma once

#include "element.cuh"

constexpr int LANES = 32;
constexpr unsigned EVERY_LANE = 0xffffffffu;

// The sum of all threads' values, by the first of them, in order.
template <typename N>
__device__ N sum_in_order(N value) {
    __shared__ N parts[1024];
    parts[threadIdx.x] = value;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (unsigned thread = 1; thread < blockDim.x; ++thread) parts[0] += parts[thread];
    }
    __syncthreads();
    const N sum = parts[0];
    __syncthreads();  // before `parts` is written again
    return sum;
}

// The sum of a value over the lanes of a warp, in its first lane.
template <typename N>
__device__ N warp_sum(N value) {
    for (int distance = LANES / 2; distance > 0; distance /= 2) value += __shfl_down_sync(EVERY_LANE, value, distance);
    return value;
}

// The sum of a value over the threads of a block, in every thread: within each warp, then warp by warp.
template <typename N>
__device__ N block_sum(N value) {
    __shared__ N sums[LANES];
    value = warp_sum(value);
    if (threadIdx.x % LANES == 0) sums[threadIdx.x / LANES] = value;
    __syncthreads();
    N total = 0;
    for (unsigned warp = 0; warp < blockDim.x / LANES; ++warp) total += sums[warp];
    __syncthreads();  // before `sums` is written again
    return total;
}

// Rung 2 cuts an image into chunks, a block each.
struct Chunk {
    int image, index;
    unsigned begin, end;  // its pixels
};

__device__ inline Chunk this_chunk(int pixels, int chunk, int chunks) {
    const int image = static_cast<int>(blockIdx.x) / chunks, index = static_cast<int>(blockIdx.x) % chunks;
    const unsigned begin = static_cast<unsigned>(index) * chunk, last = static_cast<unsigned>(pixels);
    return {image, index, begin, min(begin + chunk, last)};
}

// The first or second of the pairs of an image's chunks, summed in one order by every block that asks.
template <typename A>
__device__ A sum_of_chunks(const A* parts, int image, int chunks) {
    A sum = 0;
    for (int index = static_cast<int>(threadIdx.x); index < chunks; index += static_cast<int>(blockDim.x)) {
        sum += parts[2 * (static_cast<long long>(image) * chunks + index)];
    }
    return block_sum(sum);
}

// Four neighbours, read or written at once (a double by two) where `whole` says that they are aligned and all there.
template <typename T>
struct alignas(sizeof(T) < 4 ? 4 * sizeof(T) : 16) Four {
    T at[4];
};

template <typename T>
__device__ Four<T> read_four(const T* from, unsigned i, unsigned end, int whole) {
    if (whole) return *reinterpret_cast<const Four<T>*>(from + i);
    Four<T> four;
    for (unsigned k = 0; k < 4; ++k) four.at[k] = from[min(i + k, end - 1)];
    return four;
}

template <typename T>
__device__ void write_four(T* to, unsigned i, unsigned end, int whole, const Four<T>& four) {
    if (whole) {
        *reinterpret_cast<Four<T>*>(to + i) = four;
    } else {
        for (unsigned k = 0; k < 4 && i + k < end; ++k) to[i + k] = four.at[k];
    }
}
