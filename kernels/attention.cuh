// What the rungs of attention and of its gradients are made of: tiles in shared memory, and their products.
#pragma once

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

template <typename T>
__device__ Accumulator<T> dot(const T* __restrict__ a, const T* __restrict__ b, int depth) {
    Accumulator<T> sum = 0;
    for (int c = 0; c < depth; ++c) sum += static_cast<Accumulator<T>>(a[c]) * static_cast<Accumulator<T>>(b[c]);
    return sum;
}

// Where the rows of a block of rungs 2 and 3 are: of one head, of `rows` rows, those from `first` on; `row` counts all heads'.
struct Place {
    long long head, row;
    int first;
};

template <int BLOCK>
__device__ Place this_block(int rows) {
    const int blocks = (rows - 1) / BLOCK + 1, first = static_cast<int>(blockIdx.x) % blocks * BLOCK;
    const long long head = static_cast<int>(blockIdx.x) / blocks;
    return {head, head * rows + first, first};
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

// Tiles of rung 2 ----------------------------------------------------------------------------------------------------------
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

// The rows from `row` on of two arrays, of which `count` exist, to two tiles, one behind the other.
template <typename T, int D, int N>
__device__ void load_pair(Accumulator<T>* tiles, const T* a, const T* b, long long row, int count, int depth, bool wide) {
    load_tile<T, D, N>(tiles, a + row * depth, count, depth, wide);
    load_tile<T, D, N>(tiles + N * Rows<D>::STRIDE, b + row * depth, count, depth, wide);
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

// Tiles of rung 3 ----------------------------------------------------------------------------------------------------------
//
// They hold elements of T, as tensor cores read them, and sums are float. A block keeps 64 rows, 16 a warp. A warp's scores come
// out of one product in the layout of C, and two neighbours of C are, rounded to T, one A of the next product: the weights never
// leave the registers.

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

// Ask for the rows from `row` on of two arrays, of which `count` exist, in two tiles, one behind the other.
template <typename T, int D, int N>
__device__ void fetch_pair(AsyncCopies& copies, T* tiles, const T* a, const T* b, long long row, int count, int depth,
                           bool wide) {
    fetch_tile<T, D, N>(copies, tiles, a + row * depth, count, depth, wide);
    fetch_tile<T, D, N>(copies, tiles + N * Matrix<D>::STRIDE, b + row * depth, count, depth, wide);
}

// The pair of tiles asked for last, of the rows from `tile` on, as soon as it is there. There is room for two pairs, which take
// turns: where the one before was, the next is asked for, of `rows` rows in all.
template <typename T, int D, int N>
__device__ const T* next_pair(AsyncCopies& copies, T* pairs, int turn, const T* a, const T* b, int tile, int rows, int depth,
                              bool wide) {
    constexpr int PAIR = 2 * N * Matrix<D>::STRIDE;
    copies.wait();
    __syncthreads();  // this pair is there for all threads, and all are done with the one before
    if (tile + N < rows) {
        T* const to = pairs + (turn ^ 1) * PAIR;
        fetch_pair<T, D, N>(copies, to, a, b, tile + N, rows - tile - N, depth, wide);
    }
    return pairs + turn * PAIR;
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
