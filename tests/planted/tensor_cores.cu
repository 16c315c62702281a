// The functions of mma.cuh alone: what each lane brings and takes away is laid out by the test.
#include "mma.cuh"

// c[lane] += the product of the fragments a[lane] and b[lane].
template <typename T>
__global__ void multiply(const T* a, const T* b, float* c) {
    const int lane = static_cast<int>(threadIdx.x);
    unsigned fragment[6];
    for (int i = 0; i < 4; ++i) {
        fragment[i] = pack<T>(static_cast<float>(a[8 * lane + 2 * i]), static_cast<float>(a[8 * lane + 2 * i + 1]));
    }
    for (int i = 0; i < 2; ++i) {
        fragment[4 + i] = pack<T>(static_cast<float>(b[4 * lane + 2 * i]), static_cast<float>(b[4 * lane + 2 * i + 1]));
    }
    const unsigned left[4] = {fragment[0], fragment[1], fragment[2], fragment[3]};
    float sums[4] = {c[4 * lane], c[4 * lane + 1], c[4 * lane + 2], c[4 * lane + 3]};
    multiply_add<T>(sums, left, fragment[4], fragment[5]);
    for (int i = 0; i < 4; ++i) c[4 * lane + i] = sums[i];
}

// Four 8 x 8 matrices, one below the other in memory, to what load_matrices gives each lane: 4 pairs of elements.
template <typename T, bool TRANSPOSED>
__global__ void load(const T* matrices, T* out) {
    DYNAMIC_SHARED(T, rows);
    const int lane = static_cast<int>(threadIdx.x);
    for (int i = 0; i < 8; ++i) rows[8 * lane + i] = matrices[8 * lane + i];
    __syncwarp();
    union {
        unsigned registers[4];
        unsigned short elements[8];
    } taken;
    if (TRANSPOSED) {
        load_matrices_transposed(taken.registers, rows + 8 * lane);
    } else {
        load_matrices(taken.registers, rows + 8 * lane);
    }
    unsigned short* const bits = reinterpret_cast<unsigned short*>(out);
    for (int i = 0; i < 8; ++i) bits[8 * lane + i] = taken.elements[i];
}

// out = x, eight elements a thread, through shared memory, reversed. Every third piece does not exist, and is 0.
// MISTAKE 1: read before the copies have arrived. MISTAKE 2: after, but without a barrier. MISTAKE 3: asked for while still read.
template <typename T, int MISTAKE>
__global__ void reverse_copies(const T* x, T* out) {
    DYNAMIC_SHARED(T, pieces);
    const int thread = static_cast<int>(threadIdx.x), last = static_cast<int>(blockDim.x) - 1;
    AsyncCopies copies;
    copies.copy(pieces + 8 * thread, x + 8 * thread, thread % 3 != 2);
    if (MISTAKE != 1) copies.wait();
    if (MISTAKE != 2) __syncthreads();
    for (int i = 0; i < 8; ++i) out[8 * thread + i] = pieces[8 * (last - thread) + i];
    if (MISTAKE == 1) copies.wait();
    if (MISTAKE != 3) __syncthreads();
    copies.copy(pieces + 8 * thread, x, true);
    __syncthreads();
    copies.wait();
}
