// The gradients of attention (attention.cu). The weights are computed again, from the one number that is needed of each row,
//
//     A_j = exp(s_j - lse),    s = scale q k^T,    lse = log sum_j exp(s_j)                         lse (heads, queries)
//
// and with delta = sum_c dout_c out_c, which equals sum_j A_j dA_j,
//
//     ds = A (dout v^T - delta),    dq = scale ds k,    dk = scale ds^T q,    dv = A^T dout
//
// Each is summed by one thread or warp in one order, dq along the keys, dk and dv along the queries: nothing is added atomically,
// so the results are the same every time. That costs s and dout v^T once more: seven products of matrices instead of five.
//
// Rung 1 (naive): one thread a row of queries, or of keys.
// Rung 2 (tiled) and rung 3 (tensor cores): the tiles and products of the forward pass's, as attention.cuh has them.
#include "attention.cuh"

// Rung 1 ------------------------------------------------------------------------------------------------------------------

// dq: a row of queries, its sum along the keys.
template <typename T>
__global__ void attend_dq_naive(const T* __restrict__ q, const T* __restrict__ k, const T* __restrict__ v,
                                const T* __restrict__ dout, const Accumulator<T>* __restrict__ lse,
                                const Accumulator<T>* __restrict__ delta, T* __restrict__ dq, int rows, int queries, int keys,
                                int depth, Accumulator<T> scale) {
    using A = Accumulator<T>;
    const long long row = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (row >= rows) return;
    A sums[128];
    for (int c = 0; c < depth; ++c) sums[c] = 0;
    for (int j = 0; j < keys; ++j) {
        const long long other = (row / queries * keys + j) * depth;
        const A weight = exponential(scale * dot(q + row * depth, k + other, depth) - lse[row]);
        const A dscore = weight * (dot(dout + row * depth, v + other, depth) - delta[row]);
        for (int c = 0; c < depth; ++c) sums[c] += dscore * static_cast<A>(k[other + c]);
    }
    for (int c = 0; c < depth; ++c) dq[row * depth + c] = static_cast<T>(scale * sums[c]);
}

// dk and dv: a row of keys, its sums along the queries.
template <typename T>
__global__ void attend_dkv_naive(const T* __restrict__ q, const T* __restrict__ k, const T* __restrict__ v,
                                 const T* __restrict__ dout, const Accumulator<T>* __restrict__ lse,
                                 const Accumulator<T>* __restrict__ delta, T* __restrict__ dk, T* __restrict__ dv, int rows,
                                 int queries, int keys, int depth, Accumulator<T> scale) {
    using A = Accumulator<T>;
    const long long row = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (row >= rows) return;
    A key_sums[128], value_sums[128];
    for (int c = 0; c < depth; ++c) key_sums[c] = value_sums[c] = 0;
    for (int i = 0; i < queries; ++i) {
        const long long query = row / keys * queries + i, other = query * depth;
        const A weight = exponential(scale * dot(q + other, k + row * depth, depth) - lse[query]);
        const A dscore = weight * (dot(dout + other, v + row * depth, depth) - delta[query]);
        for (int c = 0; c < depth; ++c) {
            key_sums[c] += dscore * static_cast<A>(q[other + c]);
            value_sums[c] += weight * static_cast<A>(dout[other + c]);
        }
    }
    for (int c = 0; c < depth; ++c) {
        dk[row * depth + c] = static_cast<T>(scale * key_sums[c]);
        dv[row * depth + c] = static_cast<T>(value_sums[c]);
    }
}

// delta, of all rungs: eight threads a row, which meet by shuffles.
template <typename T>
__global__ void attend_delta(const T* __restrict__ out, const T* __restrict__ dout, Accumulator<T>* __restrict__ delta, int rows,
                             int depth, int wide) {
    using A = Accumulator<T>;
    constexpr int WIDTH = 16 / sizeof(T);
    const long long row = (static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x) / 8;
    const int part = static_cast<int>(threadIdx.x) % 8;
    A sum = 0;
    for (int c = part * WIDTH; row < rows && c < depth; c += 8 * WIDTH) {
        const Chunk<T> a = read(out + row * depth + c, depth - c, wide), b = read(dout + row * depth + c, depth - c, wide);
        UNROLL for (int i = 0; i < WIDTH; ++i) sum += static_cast<A>(a.values[i]) * static_cast<A>(b.values[i]);
    }
    for (int bit = 4; bit > 0; bit /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, bit);
    if (row < rows && part == 0) delta[row] = sum;
}

// Rung 2 ------------------------------------------------------------------------------------------------------------------

// dq: a block's rows are queries, its tiles keys and values.
template <typename T, int D>
__global__ void __launch_bounds__(THREADS, 2)
    attend_dq_tiled(const T* __restrict__ q, const T* __restrict__ k, const T* __restrict__ v, const T* __restrict__ dout,
                    const Accumulator<T>* __restrict__ lse, const Accumulator<T>* __restrict__ delta, T* __restrict__ dq,
                    int queries, int keys, int depth, Accumulator<T> scale, int wide) {
    using A = Accumulator<T>;
    constexpr int R = Rows<D>::EACH, BLOCK = Rows<D>::BLOCK, STRIDE = Rows<D>::STRIDE, TILE = 2048 / D, C = TILE / 16;
    DYNAMIC_SHARED(A, query_tile);
    A* const dout_tile = query_tile + BLOCK * STRIDE;
    A* const key_tile = dout_tile + BLOCK * STRIDE;
    A* const value_tile = key_tile + TILE * STRIDE;
    A* const weights = value_tile + TILE * STRIDE;
    const int x = static_cast<int>(threadIdx.x) % 16, y = static_cast<int>(threadIdx.x) / 16;
    const auto [head, row, first] = this_block<BLOCK>(queries);
    k += head * keys * depth;
    v += head * keys * depth;

    load_pair<T, D, BLOCK>(query_tile, q, dout, row, queries - first, depth, wide);
    A sums[R][D / 16] = {}, row_lse[R], row_delta[R], factor[R];
    UNROLL for (int i = 0; i < R; ++i) {
        const bool exists = first + y * R + i < queries;
        row_lse[i] = exists ? lse[row + y * R + i] : 0;
        row_delta[i] = exists ? delta[row + y * R + i] : 0;
        factor[i] = scale;
    }
    for (int tile = 0; tile < keys; tile += TILE) {
        load_pair<T, D, TILE>(key_tile, k, v, tile, keys - tile, depth, wide);
        __syncthreads();
        A s[R][C], dweight[R][C];
        score<A, D>(s, query_tile + y * R * STRIDE, key_tile + x * STRIDE);
        score<A, D>(dweight, dout_tile + y * R * STRIDE, value_tile + x * STRIDE);
        UNROLL for (int i = 0; i < R; ++i) {
            UNROLL for (int j = 0; j < C; ++j) {
                const A weight = tile + x + 16 * j < keys ? exponential(scale * s[i][j] - row_lse[i]) : 0;
                weights[(y * R + i) * (TILE + 4) + x + 16 * j] = weight * (dweight[i][j] - row_delta[i]);
            }
        }
        __syncwarp();
        gather<A, D, TILE>(sums, weights + y * R * (TILE + 4), key_tile);
        __syncthreads();
    }
    store_rows<T, D>(sums, factor, dq + (row + y * R) * depth, queries - first - y * R, depth, wide);
}

// dk and dv: a block's rows are keys and values, its tiles queries.
template <typename T, int D>
__global__ void __launch_bounds__(THREADS, 2)
    attend_dkv_tiled(const T* __restrict__ q, const T* __restrict__ k, const T* __restrict__ v, const T* __restrict__ dout,
                     const Accumulator<T>* __restrict__ lse, const Accumulator<T>* __restrict__ delta, T* __restrict__ dk,
                     T* __restrict__ dv, int queries, int keys, int depth, Accumulator<T> scale, int wide) {
    using A = Accumulator<T>;
    constexpr int R = Rows<D>::EACH, BLOCK = Rows<D>::BLOCK, STRIDE = Rows<D>::STRIDE, TILE = 2048 / D, C = TILE / 16;
    DYNAMIC_SHARED(A, key_tile);
    A* const value_tile = key_tile + BLOCK * STRIDE;
    A* const query_tile = value_tile + BLOCK * STRIDE;
    A* const dout_tile = query_tile + TILE * STRIDE;
    A* const weights = dout_tile + TILE * STRIDE;
    const int x = static_cast<int>(threadIdx.x) % 16, y = static_cast<int>(threadIdx.x) / 16;
    const auto [head, row, first] = this_block<BLOCK>(keys);

    load_pair<T, D, BLOCK>(key_tile, k, v, row, keys - first, depth, wide);
    A key_sums[R][D / 16] = {}, value_sums[R][D / 16] = {};
    A* const own_weights = weights + y * R * (TILE + 4);
    for (int tile = 0; tile < queries; tile += TILE) {
        const long long query = head * queries + tile;
        load_pair<T, D, TILE>(query_tile, q, dout, query, queries - tile, depth, wide);
        A column_lse[C], column_delta[C];
        UNROLL for (int j = 0; j < C; ++j) {
            const bool exists = tile + x + 16 * j < queries;
            column_lse[j] = exists ? lse[query + x + 16 * j] : 0;  // its weights are then 1, of rows that are 0
            column_delta[j] = exists ? delta[query + x + 16 * j] : 0;
        }
        __syncthreads();
        A s[R][C], dweight[R][C];
        score<A, D>(s, key_tile + y * R * STRIDE, query_tile + x * STRIDE);
        score<A, D>(dweight, value_tile + y * R * STRIDE, dout_tile + x * STRIDE);
        UNROLL for (int i = 0; i < R; ++i) {
            UNROLL for (int j = 0; j < C; ++j) {
                s[i][j] = exponential(scale * s[i][j] - column_lse[j]);
                own_weights[i * (TILE + 4) + x + 16 * j] = s[i][j];
            }
        }
        __syncwarp();
        gather<A, D, TILE>(value_sums, own_weights, dout_tile);
        __syncwarp();
        UNROLL for (int i = 0; i < R; ++i) {
            UNROLL for (int j = 0; j < C; ++j) {
                own_weights[i * (TILE + 4) + x + 16 * j] = s[i][j] * (dweight[i][j] - column_delta[j]);
            }
        }
        __syncwarp();
        gather<A, D, TILE>(key_sums, own_weights, query_tile);
        __syncthreads();
    }
    A by_scale[R], by_one[R];
    UNROLL for (int i = 0; i < R; ++i) by_scale[i] = scale, by_one[i] = 1;
    const long long own = (row + y * R) * depth;
    store_rows<T, D>(key_sums, by_scale, dk + own, keys - first - y * R, depth, wide);
    store_rows<T, D>(value_sums, by_one, dv + own, keys - first - y * R, depth, wide);
}

// Rung 3 ------------------------------------------------------------------------------------------------------------------

// dq: a block's rows are queries, its tiles keys and values.
template <typename T, int D>
__global__ void __launch_bounds__(THREADS, 2)
    attend_dq_tensor(const T* __restrict__ q, const T* __restrict__ k, const T* __restrict__ v, const T* __restrict__ dout,
                     const float* __restrict__ lse, const float* __restrict__ delta, T* __restrict__ dq, int queries, int keys,
                     int depth, float scale, int wide) {
    constexpr int BLOCK = Matrix<D>::BLOCK, STRIDE = Matrix<D>::STRIDE, TILE = 2048 / D;
    DYNAMIC_SHARED(T, query_tile);
    T* const dout_tile = query_tile + BLOCK * STRIDE;
    T* const pairs = dout_tile + BLOCK * STRIDE;
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    const auto [head, row, first] = this_block<BLOCK>(queries);
    k += head * keys * depth;
    v += head * keys * depth;

    AsyncCopies copies;
    fetch_pair<T, D, BLOCK>(copies, query_tile, q, dout, row, queries - first, depth, wide);
    fetch_pair<T, D, TILE>(copies, pairs, k, v, 0, keys, depth, wide);
    float sums[D / 8][4] = {}, row_lse[2], row_delta[2];
    UNROLL for (int r = 0; r < 2; ++r) {
        const int own = 16 * warp + lane / 4 + 8 * r;
        row_lse[r] = first + own < queries ? lse[row + own] : 0;
        row_delta[r] = first + own < queries ? delta[row + own] : 0;
    }
    for (int tile = 0, turn = 0; tile < keys; tile += TILE, turn ^= 1) {
        const T* const key_tile = next_pair<T, D, TILE>(copies, pairs, turn, k, v, tile, keys, depth, wide);
        float s[TILE / 8][4], dweight[TILE / 8][4];
        score_matrix<T, D, TILE>(s, query_tile + 16 * warp * STRIDE, key_tile);
        score_matrix<T, D, TILE>(dweight, dout_tile + 16 * warp * STRIDE, key_tile + TILE * STRIDE);
        UNROLL for (int n = 0; n < TILE / 8; ++n) {
            UNROLL for (int i = 0; i < 4; ++i) {
                const bool exists = tile + 8 * n + lane % 4 * 2 + i % 2 < keys;
                const float weight = exists ? exp2f((scale * s[n][i] - row_lse[i / 2]) * LOG2E) : 0;
                s[n][i] = weight * (dweight[n][i] - row_delta[i / 2]);
            }
        }
        gather_matrix<T, D, TILE>(sums, s, key_tile);
    }
    const float factor[2] = {scale, scale};
    store_matrix<T, D>(sums, factor, query_tile + 16 * warp * STRIDE, dq + (row + 16 * warp) * depth,
                       queries - first - 16 * warp, depth, wide);
}

// dk and dv: a block's rows are keys and values, its tiles queries; scores and weights are those of dq transposed.
template <typename T, int D>
__global__ void __launch_bounds__(THREADS, 2)
    attend_dkv_tensor(const T* __restrict__ q, const T* __restrict__ k, const T* __restrict__ v, const T* __restrict__ dout,
                      const float* __restrict__ lse, const float* __restrict__ delta, T* __restrict__ dk, T* __restrict__ dv,
                      int queries, int keys, int depth, float scale, int wide) {
    constexpr int BLOCK = Matrix<D>::BLOCK, STRIDE = Matrix<D>::STRIDE, TILE = 2048 / D;
    DYNAMIC_SHARED(T, key_tile);
    T* const value_tile = key_tile + BLOCK * STRIDE;
    T* const pairs = value_tile + BLOCK * STRIDE;
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    const auto [head, row, first] = this_block<BLOCK>(keys);
    q += head * queries * depth;
    dout += head * queries * depth;
    lse += head * queries;
    delta += head * queries;

    AsyncCopies copies;
    fetch_pair<T, D, BLOCK>(copies, key_tile, k, v, row, keys - first, depth, wide);
    fetch_pair<T, D, TILE>(copies, pairs, q, dout, 0, queries, depth, wide);
    T* const own_keys = key_tile + 16 * warp * STRIDE;
    T* const own_values = value_tile + 16 * warp * STRIDE;
    float key_sums[D / 8][4] = {}, value_sums[D / 8][4] = {};
    for (int tile = 0, turn = 0; tile < queries; tile += TILE, turn ^= 1) {
        float column_lse[TILE / 8][2], column_delta[TILE / 8][2];
        UNROLL for (int n = 0; n < TILE / 8; ++n) {
            UNROLL for (int i = 0; i < 2; ++i) {
                const int query = tile + 8 * n + lane % 4 * 2 + i;
                column_lse[n][i] = query < queries ? lse[query] : 0;  // its weights are then 1, of rows that are 0
                column_delta[n][i] = query < queries ? delta[query] : 0;
            }
        }
        const T* const query_tile = next_pair<T, D, TILE>(copies, pairs, turn, q, dout, tile, queries, depth, wide);
        const T* const dout_tile = query_tile + TILE * STRIDE;
        float s[TILE / 8][4], dweight[TILE / 8][4];
        score_matrix<T, D, TILE>(s, own_keys, query_tile);
        UNROLL for (int n = 0; n < TILE / 8; ++n) {
            UNROLL for (int i = 0; i < 4; ++i) s[n][i] = exp2f((scale * s[n][i] - column_lse[n][i % 2]) * LOG2E);
        }
        gather_matrix<T, D, TILE>(value_sums, s, dout_tile);
        score_matrix<T, D, TILE>(dweight, own_values, dout_tile);
        UNROLL for (int n = 0; n < TILE / 8; ++n) {
            UNROLL for (int i = 0; i < 4; ++i) s[n][i] *= dweight[n][i] - column_delta[n][i % 2];
        }
        gather_matrix<T, D, TILE>(key_sums, s, query_tile);
    }
    const float by_scale[2] = {scale, scale}, by_one[2] = {1, 1};
    const long long own = (row + 16 * warp) * depth;
    const int count = keys - first - 16 * warp;
    store_matrix<T, D>(key_sums, by_scale, own_keys, dk + own, count, depth, wide);
    store_matrix<T, D>(value_sums, by_one, own_values, dv + own, count, depth, wide);
}
