// Attention (Vaswani et al. 2017, equation 1), of every head of every image of a batch:
//
//     out = A v,    A = softmax(s),    s = scale q k^T        q, out (heads, queries, depth), k and v (heads, keys, depth)
//     lse = log sum_j exp(s_j)                                lse (heads, queries), which the gradients need
//
// heads = B * heads, scale = 1 / sqrt(depth), depth at most 128. A has queries * keys elements, which is many more than all the
// others together: no rung writes it to memory.
//
// Rung 1 (naive): one thread a row, the formula three times over.
// Rung 2 (tiled): a block's rows against tiles of the others in shared memory, one pass, with the softmax kept up to date.
// Rung 3 (tensor cores): the same for float16 and bfloat16, the products by tensor cores, the next tile copied meanwhile.
#include "attention.cuh"

// Rung 1 ------------------------------------------------------------------------------------------------------------------
//
// One thread per row, all its columns in local memory. The forward pass goes through the keys three times, for the largest score,
// for the sum of the exponentials, and for the weighted values; each score is computed three times, from global memory.
// Subtracting the largest score keeps every exponential at or below 1.

template <typename T>
__global__ void attend_naive(const T* __restrict__ q, const T* __restrict__ k, const T* __restrict__ v, T* __restrict__ out,
                             Accumulator<T>* __restrict__ lse, int rows, int queries, int keys, int depth, Accumulator<T> scale) {
    using A = Accumulator<T>;
    const long long row = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (row >= rows) return;
    const T* query = q + row * depth;
    const T* head_keys = k + row / queries * keys * depth;
    const T* head_values = v + row / queries * keys * depth;

    A top = -infinity();
    for (int j = 0; j < keys; ++j) top = max(top, scale * dot(query, head_keys + static_cast<long long>(j) * depth, depth));
    A total = 0;
    for (int j = 0; j < keys; ++j) {
        total += exponential(scale * dot(query, head_keys + static_cast<long long>(j) * depth, depth) - top);
    }
    A sums[128];
    for (int c = 0; c < depth; ++c) sums[c] = 0;
    for (int j = 0; j < keys; ++j) {
        const A score = scale * dot(query, head_keys + static_cast<long long>(j) * depth, depth);
        const A weight = exponential(score - top) / total;
        for (int c = 0; c < depth; ++c) sums[c] += weight * static_cast<A>(head_values[static_cast<long long>(j) * depth + c]);
    }
    for (int c = 0; c < depth; ++c) out[row * depth + c] = static_cast<T>(sums[c]);
    lse[row] = top + logarithm(total);
}

// Rung 2 ------------------------------------------------------------------------------------------------------------------
//
// Tiles (Dao et al. 2022, Algorithm 1). A block keeps some rows of one head in shared memory and goes through the rows of the
// other side in tiles, so global memory is read once for all its rows instead of for each. All matrix products are made of two
// functions: `score`, inner products of the rows of two tiles, and `gather`, sums of one tile's rows with weights.
//
// The forward pass needs one pass, for the softmax is kept up to date (Milakov & Gimelshein 2018): when a tile brings a larger
// score than the largest so far, everything summed so far is scaled by exp(old - new).

template <typename T, int D>
__global__ void __launch_bounds__(THREADS, 3)
    attend_tiled(const T* __restrict__ q, const T* __restrict__ k, const T* __restrict__ v, T* __restrict__ out,
                 Accumulator<T>* __restrict__ lse, int queries, int keys, int depth, Accumulator<T> scale, int wide) {
    using A = Accumulator<T>;
    constexpr int R = Rows<D>::EACH, BLOCK = Rows<D>::BLOCK, STRIDE = Rows<D>::STRIDE, TILE = 32, C = TILE / 16;
    DYNAMIC_SHARED(A, query_tile);
    A* const key_tile = query_tile + BLOCK * STRIDE;
    A* const value_tile = key_tile + TILE * STRIDE;
    A* const weights = value_tile + TILE * STRIDE;
    const int x = static_cast<int>(threadIdx.x) % 16, y = static_cast<int>(threadIdx.x) / 16;
    const auto [head, row, first] = this_block<BLOCK>(queries);
    k += head * keys * depth;
    v += head * keys * depth;

    load_tile<T, D, BLOCK>(query_tile, q + row * depth, queries - first, depth, wide);
    A sums[R][D / 16] = {}, top[R], total[R] = {};
    UNROLL for (int i = 0; i < R; ++i) top[i] = -infinity();
    for (int tile = 0; tile < keys; tile += TILE) {
        load_pair<T, D, TILE>(key_tile, k, v, tile, keys - tile, depth, wide);
        __syncthreads();
        A s[R][C];
        score<A, D>(s, query_tile + y * R * STRIDE, key_tile + x * STRIDE);
        UNROLL for (int i = 0; i < R; ++i) {
            A largest = top[i];
            UNROLL for (int j = 0; j < C; ++j) {
                s[i][j] = tile + x + 16 * j < keys ? scale * s[i][j] : static_cast<A>(-infinity());
                largest = max(largest, s[i][j]);
            }
            for (int bit = 8; bit > 0; bit /= 2) largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, bit));
            const A correction = exponential(top[i] - largest);
            top[i] = largest;
            total[i] *= correction;
            UNROLL for (int c = 0; c < D / 16; ++c) sums[i][c] *= correction;
            UNROLL for (int j = 0; j < C; ++j) {
                const A weight = exponential(s[i][j] - largest);
                total[i] += weight;  // of this thread's keys; the sixteen meet after the last tile
                weights[(y * R + i) * (TILE + 4) + x + 16 * j] = weight;
            }
        }
        __syncwarp();
        gather<A, D, TILE>(sums, weights + y * R * (TILE + 4), value_tile);
        __syncthreads();
    }
    A factor[R];
    UNROLL for (int i = 0; i < R; ++i) {
        for (int bit = 8; bit > 0; bit /= 2) total[i] += __shfl_xor_sync(0xffffffffu, total[i], bit);
        factor[i] = 1 / total[i];
        if (x == 0 && first + y * R + i < queries) lse[row + y * R + i] = top[i] + logarithm(total[i]);
    }
    store_rows<T, D>(sums, factor, out + (row + y * R) * depth, queries - first - y * R, depth, wide);
}

// Rung 3 ------------------------------------------------------------------------------------------------------------------
//
// Tensor cores (mma.cuh; Dao 2023, FlashAttention-2). While a tile is computed, the next is copied.
//
// exp is that of base 2, which is what the hardware has; log2(e) goes into the factor that scales the scores anyway.

template <typename T, int D>
__global__ void __launch_bounds__(THREADS)
    attend_tensor(const T* __restrict__ q, const T* __restrict__ k, const T* __restrict__ v, T* __restrict__ out,
                  float* __restrict__ lse, int queries, int keys, int depth, float scale, int wide) {
    constexpr int BLOCK = Matrix<D>::BLOCK, STRIDE = Matrix<D>::STRIDE, TILE = 4096 / D;
    DYNAMIC_SHARED(T, query_tile);
    T* const pairs = query_tile + BLOCK * STRIDE;  // two, each a tile of keys and one of values
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    const auto [head, row, first] = this_block<BLOCK>(queries);
    k += head * keys * depth;
    v += head * keys * depth;
    const float factor = scale * LOG2E;

    AsyncCopies copies;
    fetch_tile<T, D, BLOCK>(copies, query_tile, q + row * depth, queries - first, depth, wide);
    fetch_pair<T, D, TILE>(copies, pairs, k, v, 0, keys, depth, wide);
    T* const own_rows = query_tile + 16 * warp * STRIDE;
    float sums[D / 8][4] = {}, top[2] = {-infinity(), -infinity()}, total[2] = {};
    for (int tile = 0, turn = 0; tile < keys; tile += TILE, turn ^= 1) {
        const T* const key_tile = next_pair<T, D, TILE>(copies, pairs, turn, k, v, tile, keys, depth, wide);
        float s[TILE / 8][4];
        score_matrix<T, D, TILE>(s, own_rows, key_tile);
        float largest[2] = {top[0], top[1]};
        UNROLL for (int n = 0; n < TILE / 8; ++n) {
            UNROLL for (int i = 0; i < 4; ++i) {
                if (tile + 8 * n + lane % 4 * 2 + i % 2 >= keys) s[n][i] = -infinity();
                largest[i / 2] = max(largest[i / 2], s[n][i]);
            }
        }
        UNROLL for (int r = 0; r < 2; ++r) {
            largest[r] = max(largest[r], __shfl_xor_sync(0xffffffffu, largest[r], 1));
            largest[r] = max(largest[r], __shfl_xor_sync(0xffffffffu, largest[r], 2));
            const float correction = exp2f((top[r] - largest[r]) * factor);
            top[r] = largest[r];
            total[r] *= correction;
            UNROLL for (int c = 0; c < D / 8; ++c) {
                sums[c][2 * r] *= correction;
                sums[c][2 * r + 1] *= correction;
            }
        }
        UNROLL for (int n = 0; n < TILE / 8; ++n) {
            UNROLL for (int i = 0; i < 4; ++i) {
                s[n][i] = exp2f((s[n][i] - top[i / 2]) * factor);
                total[i / 2] += s[n][i];  // of this lane's keys; the four meet after the last tile
            }
        }
        gather_matrix<T, D, TILE>(sums, s, key_tile + TILE * STRIDE);
    }
    float inverse[2];
    UNROLL for (int r = 0; r < 2; ++r) {
        total[r] += __shfl_xor_sync(0xffffffffu, total[r], 1);
        total[r] += __shfl_xor_sync(0xffffffffu, total[r], 2);
        inverse[r] = 1 / total[r];
        const int own = 16 * warp + lane / 4 + 8 * r;
        if (lane % 4 == 0 && first + own < queries) lse[row + own] = scale * top[r] + logf(total[r]);
    }
    store_matrix<T, D>(sums, inverse, own_rows, out + (row + 16 * warp) * depth, queries - first - 16 * warp, depth, wide);
}
