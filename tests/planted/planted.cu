// Kernels with one mistake each, and the same without it: what the detectors of kernels/host have to find, and to let pass.
#include "element.cuh"

// out[block] = sum of one block's part of x. MISTAKE 1: no barrier between the halvings.
template <typename T, int MISTAKE>
__global__ void block_sum(const T* x, T* out, int n) {
    __shared__ float sums[128];
    const int thread = static_cast<int>(threadIdx.x), index = static_cast<int>(blockIdx.x) * 128 + thread;
    sums[thread] = index < n ? static_cast<float>(x[index]) : 0.0f;
    __syncthreads();
    for (int half = 64; half > 0; half /= 2) {
        if (thread < half) sums[thread] += sums[thread + half];
        if (MISTAKE != 1) __syncthreads();
    }
    if (thread == 0) out[blockIdx.x] = static_cast<T>(sums[0]);
}

// out = x reversed within each warp, through shared memory. MISTAKE 1: no __syncwarp. MISTAKE 2: one of half the warp.
template <typename T, int MISTAKE>
__global__ void reverse_warp(const T* x, T* out, int n) {
    __shared__ float values[64];
    const int thread = static_cast<int>(threadIdx.x);
    if (n != 64) return;
    values[thread] = static_cast<float>(x[thread]);
    if (MISTAKE == 0) __syncwarp();
    if (MISTAKE == 2) __syncwarp(thread % 32 < 16 ? 0xffffu : 0xffff0000u);
    out[thread] = static_cast<T>(values[thread ^ 31]);
}

// out[0] = the sum of x. MISTAKE 1: a lost update, right wherever whole threads follow each other. MISTAKE 2: half atomic.
template <typename T, int MISTAKE>
__global__ void accumulate(const T* x, float* out, int n) {
    const int index = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
    if (index >= n) return;
    if (MISTAKE == 0 || (MISTAKE == 2 && index > 0)) {
        atomicAdd(out, static_cast<float>(x[index]));
    } else {
        *out += static_cast<float>(x[index]);
    }
}

// out[i] = the sum of x's warp, by shuffles. MISTAKE 1: a mask that lacks the sender. MISTAKE 2: one with a lane that has ended.
template <typename T, int MISTAKE>
__global__ void warp_sum(const T* x, T* out, int n) {
    const int thread = static_cast<int>(threadIdx.x);
    const bool ends = MISTAKE == 2 && thread == 31;
    if (ends || n < 32) return;
    const unsigned mask = MISTAKE == 1 ? (thread < 16 ? 0xffffu : 0xffff0000u) : 0xffffffffu;
    float sum = static_cast<float>(x[thread]);
    for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(mask, sum, distance);
    out[thread] = static_cast<T>(sum);
}

// A barrier that half of the block passes by. MISTAKE 1: the others wait for a shuffle.
template <typename T, int MISTAKE>
__global__ void divergent(const T* x, T* out, int n) {
    const int thread = static_cast<int>(threadIdx.x);
    float value = static_cast<float>(x[thread % n]);
    if (MISTAKE == 1 && thread % 2 == 0) value = __shfl_sync(0xffffffffu, value, 0);
    __syncthreads();
    out[thread] = static_cast<T>(value);
}

// How many lanes of the warp hold the same number. MISTAKE 1: a lane whose mask leaves it out. MISTAKE 2: half of them do not come.
template <typename T, int MISTAKE>
__global__ void same_in_warp(const T* x, T* out, int n) {
    const int thread = static_cast<int>(threadIdx.x);
    const unsigned mask = MISTAKE == 1 && thread == 5 ? 0xffffffdfu : 0xffffffffu;
    unsigned same = 0;
    if (MISTAKE != 2 || thread % 2 == 0) same = __match_any_sync(mask, static_cast<int>(static_cast<float>(x[thread % n])));
    __syncthreads();
    int lanes = 0;
    for (int lane = 0; lane < 32; ++lane) lanes += static_cast<int>(same >> lane & 1u);
    out[thread] = static_cast<T>(static_cast<float>(lanes));
}

// out = x shifted by one. MISTAKE 1: reads one before the first. MISTAKE 2: writes one past the last.
template <typename T, int MISTAKE>
__global__ void shift(const T* x, T* out, int n) {
    const int index = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
    if (index >= n) return;
    if (MISTAKE == 1) {
        out[index] = x[index - 1];
    } else if (MISTAKE == 2) {
        out[index + 1] = x[index];
    } else {
        out[index] = x[index > 0 ? index - 1 : n - 1];
    }
}

// What reads shared memory that nobody wrote finds NaN there.
template <typename T>
__global__ void unwritten(T* out, int n) {
    DYNAMIC_SHARED(float, memory);
    if (static_cast<int>(threadIdx.x) < n) out[threadIdx.x] = static_cast<T>(memory[threadIdx.x]);
}

// Each function of the warp once, for lane i: see the test.
template <typename T>
__global__ void warp_functions(const T* x, T* out, int n) {
    const unsigned all = 0xffffffffu;
    const int lane = static_cast<int>(threadIdx.x);
    const float value = static_cast<float>(x[lane]);
    const float results[] = {
        __shfl_sync(all, value, 5),
        __shfl_sync(all, value, lane + 3, 8),
        __shfl_up_sync(all, value, 3),
        __shfl_up_sync(all, value, 3, 8),
        __shfl_down_sync(all, value, 3),
        __shfl_down_sync(all, value, 3, 8),
        __shfl_xor_sync(all, value, 5),
        __shfl_xor_sync(all, value, 16, 8),
        static_cast<float>(__popc(__ballot_sync(all, lane % 3 == 0))),
        static_cast<float>(__any_sync(all, lane == 7)),
        static_cast<float>(__all_sync(all, lane < 31)),
    };
    for (int k = 0; k < n; ++k) out[k * 32 + lane] = static_cast<T>(results[k]);
}
