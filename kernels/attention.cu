// Attention (Vaswani et al. 2017, equation 1), of every head of every image of a batch:
//
//     out = A v,    A = softmax(s),    s = scale q k^T        q, out (heads, queries, depth), k and v (heads, keys, depth)
//
// heads = B * heads, scale = 1 / sqrt(depth), depth at most 128. A has queries * keys elements, which is many more than all the
// others together: no rung writes it to memory. The backward pass computes it again, from the one number it needs of each row,
//
//     lse = log sum_j exp(s_j),    so that    A_j = exp(s_j - lse)        lse (heads, queries)
//
// With delta = sum_c dout_c out_c, which equals sum_j A_j dA_j, the gradients are
//
//     ds = A (dout v^T - delta),    dq = scale ds k,    dk = scale ds^T q,    dv = A^T dout
//
// Each is summed by one thread or warp in one order, dq along the keys, dk and dv along the queries: nothing is added atomically,
// so the results are the same every time. That costs s and dout v^T once more: seven products of matrices instead of five.
//
// Rung 1 (naive): one thread a row, the formula three times over.
// Rung 2 (tiled): a block's rows against tiles of the others in shared memory, one pass, with the softmax kept up to date.
// Rung 3 (tensor cores): the same for float16 and bfloat16, the products by tensor cores, the next tile copied meanwhile.
#include "mma.cuh"

#ifdef __CUDACC__
#define UNROLL _Pragma("unroll")
#define UNROLL_TWICE _Pragma("unroll 2")
#else
#define UNROLL
#define UNROLL_TWICE
#endif

constexpr float LOG2E = 1.44269504f;
constexpr int THREADS = 128, WARPS = 4;

__device__ inline float exponential(float x) { return expf(x); }
__device__ inline float logarithm(float x) { return logf(x); }
__device__ inline float infinity() { return __int_as_float(0x7f800000); }
#ifndef __CUDACC__
inline double exponential(double x) { return exp(x); }
inline double logarithm(double x) { return log(x); }
#endif

// Rung 1 ------------------------------------------------------------------------------------------------------------------
//
// One thread per row, all its columns in local memory. The forward pass goes through the keys three times, for the largest score,
// for the sum of the exponentials, and for the weighted values; each score is computed three times, from global memory.
// Subtracting the largest score keeps every exponential at or below 1.

template <typename T>
__device__ Accumulator<T> dot(const T* __restrict__ a, const T* __restrict__ b, int depth) {
    Accumulator<T> sum = 0;
    for (int c = 0; c < depth; ++c) sum += static_cast<Accumulator<T>>(a[c]) * static_cast<Accumulator<T>>(b[c]);
    return sum;
}

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

// 16 bytes of a row, of which `count` elements exist; zeros for the others. `wide`: rows begin at multiples of 16 bytes and are
// multiples of 16 bytes long, so that all of them exist or none.
template <typename T>
__device__ Chunk<T> read(const T* row, int count, bool wide) {
    constexpr int WIDTH = 16 / sizeof(T);
    if (wide && count > 0) return *reinterpret_cast<const Chunk<T>*>(row);
    Chunk<T> chunk;
    UNROLL for (int i = 0; i < WIDTH; ++i) chunk.values[i] = i < count ? row[i] : static_cast<T>(0.0f);
    return chunk;
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
//
// Tiles (Dao et al. 2022, Algorithm 1). A block keeps some rows of one head in shared memory and goes through the rows of the
// other side in tiles, so global memory is read once for all its rows instead of for each. All matrix products are made of two
// functions: `score`, inner products of the rows of two tiles, and `gather`, sums of one tile's rows with weights.
//
// The forward pass needs one pass, for the softmax is kept up to date (Milakov & Gimelshein 2018): when a tile brings a larger
// score than the largest so far, everything summed so far is scaled by exp(old - new).
//
// The 128 threads form 8 x 16. Thread (y, x) computes the scores of rows y * R + i with the tile's rows x + 16 j, and of the sums
// of its rows the columns 64 g + 4 x ... + 3: per 16-byte access to shared memory, many multiplications in registers. Tiles of
// depth D are padded to rows of D + 4, which begin in different banks. The rows of a warp are its own, so the weights, which pass
// through shared memory from who computed them to who sums with them, take no barrier of the block.

// Neighbours, read or written at once.
template <typename T>
struct __align__(4 * sizeof(T) < 16 ? 4 * sizeof(T) : 16) Four {
    T values[4];
};

template <int D>
struct Rows {
    static constexpr int EACH = 512 / D, BLOCK = 8 * EACH, STRIDE = D + 4;  // per thread, per block, and from one to the next
};

// Rows of global memory, of which `count` exist, to a tile of N rows of D columns; zeros elsewhere.
template <typename T, int D, int N>
__device__ void load_tile(Accumulator<T>* tile, const T* rows, int count, int depth, bool wide) {
    constexpr int WIDTH = 16 / sizeof(T);
    for (int chunk = static_cast<int>(threadIdx.x); chunk < N * D / WIDTH; chunk += THREADS) {
        const int row = chunk / (D / WIDTH), column = chunk % (D / WIDTH) * WIDTH;
        const Chunk<T> chosen = read(rows + static_cast<long long>(row) * depth + column, row < count ? depth - column : 0, wide);
        UNROLL for (int i = 0; i < WIDTH; ++i) {
            tile[row * Rows<D>::STRIDE + column + i] = static_cast<Accumulator<T>>(chosen.values[i]);
        }
    }
}

// s[i][j] = row i of `rows` times row 16 j of `others`.
template <typename A, int D, int R, int C>
__device__ void score(A (&s)[R][C], const A* rows, const A* others) {
    UNROLL for (int i = 0; i < R; ++i) UNROLL for (int j = 0; j < C; ++j) s[i][j] = 0;
    UNROLL_TWICE for (int c = 0; c < D; c += 4) {
        Four<A> b[C];
        UNROLL for (int j = 0; j < C; ++j) b[j] = *reinterpret_cast<const Four<A>*>(others + 16 * j * Rows<D>::STRIDE + c);
        UNROLL for (int i = 0; i < R; ++i) {
            const Four<A> a = *reinterpret_cast<const Four<A>*>(rows + i * Rows<D>::STRIDE + c);
            UNROLL for (int j = 0; j < C; ++j) {
                UNROLL for (int e = 0; e < 4; ++e) s[i][j] += a.values[e] * b[j].values[e];
            }
        }
    }
}

// sums[i] += the N rows of a tile, weighted by row i of `weights`, in this thread's columns.
template <typename A, int D, int N, int R>
__device__ void gather(A (&sums)[R][D / 16], const A* weights, const A* tile) {
    UNROLL_TWICE for (int j = 0; j < N; j += 4) {
        Four<A> w[R];
        UNROLL for (int i = 0; i < R; ++i) w[i] = *reinterpret_cast<const Four<A>*>(weights + i * (N + 4) + j);
        UNROLL for (int e = 0; e < 4; ++e) {
            UNROLL for (int g = 0; g < D / 64; ++g) {
                const int place = (j + e) * Rows<D>::STRIDE + 64 * g + 4 * (static_cast<int>(threadIdx.x) % 16);
                const Four<A> values = *reinterpret_cast<const Four<A>*>(tile + place);
                UNROLL for (int i = 0; i < R; ++i) {
                    UNROLL for (int f = 0; f < 4; ++f) sums[i][4 * g + f] += w[i].values[e] * values.values[f];
                }
            }
        }
    }
}

// A thread's columns of its rows to global memory, times each row's factor; `count` of the thread's rows exist.
template <typename T, int D, int R>
__device__ void store_rows(const Accumulator<T> (&sums)[R][D / 16], const Accumulator<T> (&factor)[R], T* rows, int count,
                           int depth, bool wide) {
    UNROLL for (int i = 0; i < R; ++i) {
        if (i >= count) continue;
        UNROLL for (int g = 0; g < D / 64; ++g) {
            const int column = 64 * g + 4 * (static_cast<int>(threadIdx.x) % 16);
            Four<T> four;
            UNROLL for (int f = 0; f < 4; ++f) four.values[f] = static_cast<T>(sums[i][4 * g + f] * factor[i]);
            T* const place = rows + i * depth + column;
            if (wide && column + 4 <= depth) {
                *reinterpret_cast<Four<T>*>(place) = four;
            } else {
                UNROLL for (int f = 0; f < 4; ++f) if (column + f < depth) place[f] = four.values[f];
            }
        }
    }
}

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
    const int blocks = (queries - 1) / BLOCK + 1, first = static_cast<int>(blockIdx.x) % blocks * BLOCK;
    const long long head = static_cast<int>(blockIdx.x) / blocks, row = head * queries + first;
    k += head * keys * depth;
    v += head * keys * depth;

    load_tile<T, D, BLOCK>(query_tile, q + row * depth, queries - first, depth, wide);
    A sums[R][D / 16] = {}, top[R], total[R] = {};
    UNROLL for (int i = 0; i < R; ++i) top[i] = -infinity();
    for (int tile = 0; tile < keys; tile += TILE) {
        const long long from = static_cast<long long>(tile) * depth;
        load_tile<T, D, TILE>(key_tile, k + from, keys - tile, depth, wide);
        load_tile<T, D, TILE>(value_tile, v + from, keys - tile, depth, wide);
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
    const int blocks = (queries - 1) / BLOCK + 1, first = static_cast<int>(blockIdx.x) % blocks * BLOCK;
    const long long head = static_cast<int>(blockIdx.x) / blocks, row = head * queries + first;
    k += head * keys * depth;
    v += head * keys * depth;

    load_tile<T, D, BLOCK>(query_tile, q + row * depth, queries - first, depth, wide);
    load_tile<T, D, BLOCK>(dout_tile, dout + row * depth, queries - first, depth, wide);
    A sums[R][D / 16] = {}, row_lse[R], row_delta[R], factor[R];
    UNROLL for (int i = 0; i < R; ++i) {
        const bool exists = first + y * R + i < queries;
        row_lse[i] = exists ? lse[row + y * R + i] : 0;
        row_delta[i] = exists ? delta[row + y * R + i] : 0;
        factor[i] = scale;
    }
    for (int tile = 0; tile < keys; tile += TILE) {
        const long long from = static_cast<long long>(tile) * depth;
        load_tile<T, D, TILE>(key_tile, k + from, keys - tile, depth, wide);
        load_tile<T, D, TILE>(value_tile, v + from, keys - tile, depth, wide);
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
    const int blocks = (keys - 1) / BLOCK + 1, first = static_cast<int>(blockIdx.x) % blocks * BLOCK;
    const long long head = static_cast<int>(blockIdx.x) / blocks, row = head * keys + first;

    load_tile<T, D, BLOCK>(key_tile, k + row * depth, keys - first, depth, wide);
    load_tile<T, D, BLOCK>(value_tile, v + row * depth, keys - first, depth, wide);
    A key_sums[R][D / 16] = {}, value_sums[R][D / 16] = {};
    A* const own_weights = weights + y * R * (TILE + 4);
    for (int tile = 0; tile < queries; tile += TILE) {
        const long long query = head * queries + tile;
        load_tile<T, D, TILE>(query_tile, q + query * depth, queries - tile, depth, wide);
        load_tile<T, D, TILE>(dout_tile, dout + query * depth, queries - tile, depth, wide);
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
//
// Tensor cores (mma.cuh; Dao 2023, FlashAttention-2). Tiles hold elements of T, as tensor cores read them, and sums are float. A
// block keeps 64 rows, 16 a warp. A warp's scores come out of one product in the layout of C, and two neighbours of C are,
// rounded to T, one A of the next product: the weights never leave the registers. While a tile is computed, the next is copied.
//
// exp is that of base 2, which is what the hardware has; log2(e) goes into the factor that scales the scores anyway.

template <int D>
struct Matrix {
    static constexpr int BLOCK = 16 * WARPS, STRIDE = D + 8;  // rows of a block; from one row of a tile to the next
};

template <typename T>
struct __align__(2 * sizeof(T)) Two {
    T values[2];
};

// Ask for N rows of D columns, of which `count` rows of `depth` columns exist; zeros elsewhere.
template <typename T, int D, int N>
__device__ void fetch_tile(AsyncCopies& copies, T* tile, const T* rows, int count, int depth, bool wide) {
    for (int chunk = static_cast<int>(threadIdx.x); chunk < N * D / 8; chunk += THREADS) {
        const int row = chunk / (D / 8), column = chunk % (D / 8) * 8;
        T* const to = tile + row * Matrix<D>::STRIDE + column;
        const T* const from = rows + static_cast<long long>(row) * depth + column;
        const int exist = row < count ? depth - column : 0;
        if (wide) {
            copies.copy(to, exist > 0 ? from : rows, exist > 0);
        } else {
            *reinterpret_cast<Chunk<T>*>(to) = read(from, exist, false);
        }
    }
}

// s = 16 rows of a tile times N rows of another, in the layout of C.
template <typename T, int D, int N>
__device__ void score_matrix(float (&s)[N / 8][4], const T* rows, const T* others) {
    constexpr int STRIDE = Matrix<D>::STRIDE;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const T* const a_row = rows + lane % 16 * STRIDE + lane / 16 * 8;
    const T* const b_row = others + (lane % 8 + lane / 16 * 8) * STRIDE + lane / 8 % 2 * 8;
    UNROLL for (int n = 0; n < N / 8; ++n) s[n][0] = s[n][1] = s[n][2] = s[n][3] = 0;
    UNROLL for (int c = 0; c < D; c += 16) {
        unsigned a[4], b[4];
        load_matrices(a, a_row + c);
        UNROLL for (int n = 0; n < N / 16; ++n) {
            load_matrices(b, b_row + 16 * n * STRIDE + c);
            multiply_add<T>(s[2 * n], a, b[0], b[1]);
            multiply_add<T>(s[2 * n + 1], a, b[2], b[3]);
        }
    }
}

// sums += weights (16 x N, in the layout of C, rounded to T) times the N rows of a tile.
template <typename T, int D, int N>
__device__ void gather_matrix(float (&sums)[D / 8][4], const float (&weights)[N / 8][4], const T* tile) {
    constexpr int STRIDE = Matrix<D>::STRIDE;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const T* const row = tile + lane % 16 * STRIDE + lane / 16 * 8;
    UNROLL for (int n = 0; n < N / 16; ++n) {
        const float(&left)[4] = weights[2 * n];
        const float(&right)[4] = weights[2 * n + 1];
        const unsigned a[4] = {pack<T>(left[0], left[1]), pack<T>(left[2], left[3]), pack<T>(right[0], right[1]),
                               pack<T>(right[2], right[3])};
        UNROLL for (int c = 0; c < D / 16; ++c) {
            unsigned b[4];
            load_matrices_transposed(b, row + 16 * n * STRIDE + 16 * c);
            multiply_add<T>(sums[2 * c], a, b[0], b[1]);
            multiply_add<T>(sums[2 * c + 1], a, b[2], b[3]);
        }
    }
}

// A warp's 16 rows, times two factors, those of the lane's rows g and g + 8, to global memory, of which `count` exist. They pass
// through 16 rows of shared memory that are the warp's own, to be written 16 bytes at a time.
template <typename T, int D>
__device__ void store_matrix(const float (&sums)[D / 8][4], const float (&factor)[2], T* tile, T* rows, int count, int depth,
                             bool wide) {
    constexpr int STRIDE = Matrix<D>::STRIDE;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    __syncwarp();
    UNROLL for (int c = 0; c < D / 8; ++c) {
        UNROLL for (int r = 0; r < 2; ++r) {
            const Two<T> two{{static_cast<T>(sums[c][2 * r] * factor[r]), static_cast<T>(sums[c][2 * r + 1] * factor[r])}};
            *reinterpret_cast<Two<T>*>(tile + (lane / 4 + 8 * r) * STRIDE + 8 * c + lane % 4 * 2) = two;
        }
    }
    __syncwarp();
    for (int chunk = lane; chunk < 16 * D / 8; chunk += 32) {
        const int row = chunk / (D / 8), column = chunk % (D / 8) * 8;
        if (row >= count) continue;
        const Chunk<T> values = *reinterpret_cast<const Chunk<T>*>(tile + row * STRIDE + column);
        T* const place = rows + row * depth + column;
        if (wide && column < depth) {
            *reinterpret_cast<Chunk<T>*>(place) = values;
        } else {
            UNROLL for (int i = 0; i < 8; ++i) if (column + i < depth) place[i] = values.values[i];
        }
    }
}

template <typename T, int D>
__global__ void __launch_bounds__(THREADS)
    attend_tensor(const T* __restrict__ q, const T* __restrict__ k, const T* __restrict__ v, T* __restrict__ out,
                  float* __restrict__ lse, int queries, int keys, int depth, float scale, int wide) {
    constexpr int BLOCK = Matrix<D>::BLOCK, STRIDE = Matrix<D>::STRIDE, TILE = 4096 / D, STAGE = 2 * TILE * STRIDE;
    DYNAMIC_SHARED(T, query_tile);
    T* const stages = query_tile + BLOCK * STRIDE;  // two, each a tile of keys and one of values
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    const int blocks = (queries - 1) / BLOCK + 1, first = static_cast<int>(blockIdx.x) % blocks * BLOCK;
    const long long head = static_cast<int>(blockIdx.x) / blocks, row = head * queries + first;
    k += head * keys * depth;
    v += head * keys * depth;
    const float factor = scale * LOG2E;

    AsyncCopies copies;
    fetch_tile<T, D, BLOCK>(copies, query_tile, q + row * depth, queries - first, depth, wide);
    fetch_tile<T, D, TILE>(copies, stages, k, keys, depth, wide);
    fetch_tile<T, D, TILE>(copies, stages + TILE * STRIDE, v, keys, depth, wide);
    T* const own_rows = query_tile + 16 * warp * STRIDE;
    float sums[D / 8][4] = {}, top[2] = {-infinity(), -infinity()}, total[2] = {};
    for (int tile = 0, stage = 0; tile < keys; tile += TILE, stage ^= 1) {
        copies.wait();
        __syncthreads();  // this tile is there for all, and all are done with the one before
        if (tile + TILE < keys) {
            const long long next = static_cast<long long>(tile + TILE) * depth;
            T* const to = stages + (stage ^ 1) * STAGE;
            fetch_tile<T, D, TILE>(copies, to, k + next, keys - tile - TILE, depth, wide);
            fetch_tile<T, D, TILE>(copies, to + TILE * STRIDE, v + next, keys - tile - TILE, depth, wide);
        }
        const T* const key_tile = stages + stage * STAGE;
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

// dq: a block's rows are queries, its tiles keys and values.
template <typename T, int D>
__global__ void __launch_bounds__(THREADS, 2)
    attend_dq_tensor(const T* __restrict__ q, const T* __restrict__ k, const T* __restrict__ v, const T* __restrict__ dout,
                     const float* __restrict__ lse, const float* __restrict__ delta, T* __restrict__ dq, int queries, int keys,
                     int depth, float scale, int wide) {
    constexpr int BLOCK = Matrix<D>::BLOCK, STRIDE = Matrix<D>::STRIDE, TILE = 2048 / D, STAGE = 2 * TILE * STRIDE;
    DYNAMIC_SHARED(T, query_tile);
    T* const dout_tile = query_tile + BLOCK * STRIDE;
    T* const stages = dout_tile + BLOCK * STRIDE;
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    const int blocks = (queries - 1) / BLOCK + 1, first = static_cast<int>(blockIdx.x) % blocks * BLOCK;
    const long long head = static_cast<int>(blockIdx.x) / blocks, row = head * queries + first;
    k += head * keys * depth;
    v += head * keys * depth;

    AsyncCopies copies;
    fetch_tile<T, D, BLOCK>(copies, query_tile, q + row * depth, queries - first, depth, wide);
    fetch_tile<T, D, BLOCK>(copies, dout_tile, dout + row * depth, queries - first, depth, wide);
    fetch_tile<T, D, TILE>(copies, stages, k, keys, depth, wide);
    fetch_tile<T, D, TILE>(copies, stages + TILE * STRIDE, v, keys, depth, wide);
    float sums[D / 8][4] = {}, row_lse[2], row_delta[2];
    UNROLL for (int r = 0; r < 2; ++r) {
        const int own = 16 * warp + lane / 4 + 8 * r;
        row_lse[r] = first + own < queries ? lse[row + own] : 0;
        row_delta[r] = first + own < queries ? delta[row + own] : 0;
    }
    for (int tile = 0, stage = 0; tile < keys; tile += TILE, stage ^= 1) {
        copies.wait();
        __syncthreads();
        if (tile + TILE < keys) {
            const long long next = static_cast<long long>(tile + TILE) * depth;
            T* const to = stages + (stage ^ 1) * STAGE;
            fetch_tile<T, D, TILE>(copies, to, k + next, keys - tile - TILE, depth, wide);
            fetch_tile<T, D, TILE>(copies, to + TILE * STRIDE, v + next, keys - tile - TILE, depth, wide);
        }
        const T* const key_tile = stages + stage * STAGE;
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
    constexpr int BLOCK = Matrix<D>::BLOCK, STRIDE = Matrix<D>::STRIDE, TILE = 2048 / D, STAGE = 2 * TILE * STRIDE;
    DYNAMIC_SHARED(T, key_tile);
    T* const value_tile = key_tile + BLOCK * STRIDE;
    T* const stages = value_tile + BLOCK * STRIDE;
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    const int blocks = (keys - 1) / BLOCK + 1, first = static_cast<int>(blockIdx.x) % blocks * BLOCK;
    const long long head = static_cast<int>(blockIdx.x) / blocks, row = head * keys + first;
    q += head * queries * depth;
    dout += head * queries * depth;
    lse += head * queries;
    delta += head * queries;

    AsyncCopies copies;
    fetch_tile<T, D, BLOCK>(copies, key_tile, k + row * depth, keys - first, depth, wide);
    fetch_tile<T, D, BLOCK>(copies, value_tile, v + row * depth, keys - first, depth, wide);
    fetch_tile<T, D, TILE>(copies, stages, q, queries, depth, wide);
    fetch_tile<T, D, TILE>(copies, stages + TILE * STRIDE, dout, queries, depth, wide);
    T* const own_keys = key_tile + 16 * warp * STRIDE;
    T* const own_values = value_tile + 16 * warp * STRIDE;
    float key_sums[D / 8][4] = {}, value_sums[D / 8][4] = {};
    for (int tile = 0, stage = 0; tile < queries; tile += TILE, stage ^= 1) {
        float column_lse[TILE / 8][2], column_delta[TILE / 8][2];
        UNROLL for (int n = 0; n < TILE / 8; ++n) {
            UNROLL for (int i = 0; i < 2; ++i) {
                const int query = tile + 8 * n + lane % 4 * 2 + i;
                column_lse[n][i] = query < queries ? lse[query] : 0;  // its weights are then 1, of rows that are 0
                column_delta[n][i] = query < queries ? delta[query] : 0;
            }
        }
        copies.wait();
        __syncthreads();
        if (tile + TILE < queries) {
            const long long next = static_cast<long long>(tile + TILE) * depth;
            T* const to = stages + (stage ^ 1) * STAGE;
            fetch_tile<T, D, TILE>(copies, to, q + next, queries - tile - TILE, depth, wide);
            fetch_tile<T, D, TILE>(copies, to + TILE * STRIDE, dout + next, queries - tile - TILE, depth, wide);
        }
        const T* const query_tile = stages + stage * STAGE;
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
