// Read and Concatenate (Section 3.1, equations 5 and 6) behind their product: from tokens to a map, in one pass.
//
//     map[b, d, n] = GELU(tokens[b, n, d] + readout[b, d] + bias[d])
//
// Of GELU(W [t; t0] + bias), W = [W_t W_r], the product W_t t of every token is `tokens` (B, N, D), and W_r t0, which is the same
// for all tokens of an image, is `readout` (B, D). The N = h w tokens in row-major order become the pixels of a map (B, D, h, w):
// a transposition, which is free on the way, where a kernel for each of the three steps would move everything three times.
//
// Least traffic: tokens and map once, forward; tokens, the map's gradient and the tokens' once, backward.
#include "normal.cuh"
#include "vectors.cuh"

// Rung 1 (naive): one thread per element of the map. Neighbouring threads write neighbouring pixels and read tokens D elements
// apart: of every 128 bytes that the memory delivers for a warp's read, one element is used before they may be gone from the
// cache.
template <typename T>
__global__ void read_project_naive(const T* __restrict__ tokens, const T* __restrict__ readout, const T* __restrict__ bias,
                                   T* __restrict__ map, int images, int count, int width) {
    using A = Accumulator<T>;
    const long long index = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (index >= static_cast<long long>(images) * width * count) return;
    const int token = static_cast<int>(index % count);
    const int channel = static_cast<int>(index / count % width);
    const long long image = index / count / width;
    const A constant = static_cast<A>(readout[image * width + channel]) + static_cast<A>(bias[channel]);
    map[index] = static_cast<T>(gelu(static_cast<A>(tokens[(image * count + token) * width + channel]) + constant));
}

// Rung 2 (tiles): a block transposes a square through shared memory, so both sides are accessed along their lines, in lines of
// 128 bytes, moved 16 bytes per thread. A row of the tile has one element too many, which spreads a column over the banks.
constexpr int THREADS = 256;

template <typename T>
constexpr int side_of = 128 / static_cast<int>(sizeof(T));

// Which square a block has. There is one block for each: along the tokens first, then along the channels, then over the images.
template <typename T>
struct Square {
    int part, token, channel;  // which along the tokens, and its first of each
    long long image;

    __device__ Square(int count, int width) {
        const int parts = (count - 1) / side_of<T> + 1, down = (width - 1) / side_of<T> + 1, index = static_cast<int>(blockIdx.x);
        part = index % parts;
        token = part * side_of<T>;
        channel = index / parts % down * side_of<T>;
        image = index / parts / down;
    }
};

// readout + bias of V neighbouring channels.
template <int BYTES, typename T>
__device__ void constants(const T* readout, const T* bias, Accumulator<T> (&sums)[lanes_of<T, BYTES>]) {
    const Vector<T, BYTES> first = load<BYTES>(readout), second = load<BYTES>(bias);
    for (int v = 0; v < lanes_of<T, BYTES>; ++v) {
        sums[v] = static_cast<Accumulator<T>>(first.lane[v]) + static_cast<Accumulator<T>>(second.lane[v]);
    }
}

// BYTES is 16 where rows of D elements (tokens, readout, bias) begin at multiples of it, MAP_BYTES where rows of N (map) do; else
// 1.
template <typename T, int BYTES, int MAP_BYTES>
__global__ void __launch_bounds__(THREADS) read_project_tiles(const T* __restrict__ tokens, const T* __restrict__ readout,
                                                              const T* __restrict__ bias, T* __restrict__ map, int count,
                                                              int width) {
    using A = Accumulator<T>;
    constexpr int SIDE = side_of<T>, V = lanes_of<T, BYTES>, W = lanes_of<T, MAP_BYTES>;
    __shared__ A tile[SIDE][SIDE + 1];
    const Square<T> square(count, width);
    const int thread = static_cast<int>(threadIdx.x);

    const int lane = thread % (SIDE / V) * V, channel = square.channel + lane;
    if (channel < width) {
        A constant[V];
        constants<BYTES>(readout + square.image * width + channel, bias + channel, constant);
        for (int row = thread / (SIDE / V); row < SIDE && square.token + row < count; row += THREADS / (SIDE / V)) {
            const Vector<T, BYTES> token = load<BYTES>(tokens + (square.image * count + square.token + row) * width + channel);
            for (int v = 0; v < V; ++v) tile[lane + v][row] = gelu(static_cast<A>(token.lane[v]) + constant[v]);
        }
    }
    __syncthreads();

    const int pixel = thread % (SIDE / W) * W;
    if (square.token + pixel >= count) return;
    for (int row = thread / (SIDE / W); row < SIDE && square.channel + row < width; row += THREADS / (SIDE / W)) {
        Vector<T, MAP_BYTES> pixels;
        for (int w = 0; w < W; ++w) pixels.lane[w] = static_cast<T>(tile[row][pixel + w]);
        store<MAP_BYTES>(map + (square.image * width + square.channel + row) * count + square.token + pixel, pixels);
    }
}

// Channels last, the map (B, h, w, D) has the layout of the tokens, and nothing is transposed: one thread per vector of channels.
template <typename T, int BYTES>
__global__ void read_project_channels_last(const T* __restrict__ tokens, const T* __restrict__ readout,
                                           const T* __restrict__ bias, T* __restrict__ map, int images, int count, int width) {
    using A = Accumulator<T>;
    constexpr int V = lanes_of<T, BYTES>;
    const unsigned groups = width / V, index = blockIdx.x * blockDim.x + threadIdx.x;
    if (index >= static_cast<unsigned>(images) * count * groups) return;
    const int channel = static_cast<int>(index % groups) * V;
    const long long image = index / groups / count, begin = static_cast<long long>(index) * V;
    A constant[V];
    constants<BYTES>(readout + image * width + channel, bias + channel, constant);
    const Vector<T, BYTES> token = load<BYTES>(tokens + begin);
    Vector<T, BYTES> pixel;
    for (int v = 0; v < V; ++v) pixel.lane[v] = static_cast<T>(gelu(static_cast<A>(token.lane[v]) + constant[v]));
    store<BYTES>(map + begin, pixel);
}

// The gradients, given that of the map, dmap (B, D, h, w). What GELU was applied to is computed anew, as cheaply as it was saved:
//
//     dtokens = dmap^T GELU'(tokens + readout + bias) (B, N, D),  dreadout = sum of dtokens over n (B, D),  dbias = over b (D,)
//
// Sums take what was added up before it is rounded to T, in an order that depends on the sizes alone. `sums` (B, parts, D) has
// the sum of each part of an image's tokens; the last kernels add those up.
//
// Rung 1 (naive): one thread per channel of an image goes through its tokens, one part.
template <typename T>
__global__ void read_project_backward_naive(const T* __restrict__ dmap, const T* __restrict__ tokens,
                                            const T* __restrict__ readout, const T* __restrict__ bias,
                                            T* __restrict__ dtokens, Accumulator<T>* __restrict__ sums, int images, int count,
                                            int width) {
    using A = Accumulator<T>;
    const int index = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
    if (index >= images * width) return;
    const int channel = index % width;
    const long long image = index / width;
    const A constant = static_cast<A>(readout[index]) + static_cast<A>(bias[channel]);
    A sum = 0;
    for (int token = 0; token < count; ++token) {
        const long long at = (image * count + token) * width + channel;
        const A gradient = static_cast<A>(dmap[static_cast<long long>(index) * count + token]) *
                           gelu_slope(static_cast<A>(tokens[at]) + constant);
        dtokens[at] = static_cast<T>(gradient);
        sum += gradient;
    }
    sums[index] = sum;
}

// Rung 2 (tiles): as forward, with the square of dmap transposed on its way in. Each thread sums the tokens it has itself; then,
// per channel, one thread adds up those sums in their order.
template <typename T, int BYTES, typename Gradient>
__device__ void backward_of_square(const Square<T>& square, const Gradient& gradient, const T* tokens, const T* readout,
                                   const T* bias, T* dtokens, Accumulator<T>* sums, int count, int width) {
    using A = Accumulator<T>;
    constexpr int SIDE = side_of<T>, V = lanes_of<T, BYTES>, ROWS = THREADS / (SIDE / V);
    __shared__ A partial[ROWS][SIDE];
    const int thread = static_cast<int>(threadIdx.x), lane = thread % (SIDE / V) * V, channel = square.channel + lane;
    if (channel < width) {
        A constant[V], sum[V] = {};
        constants<BYTES>(readout + square.image * width + channel, bias + channel, constant);
        for (int row = thread / (SIDE / V); row < SIDE && square.token + row < count; row += ROWS) {
            const long long at = (square.image * count + square.token + row) * width + channel;
            const Vector<T, BYTES> token = load<BYTES>(tokens + at);
            A received[V];
            gradient(row, lane, at, received);
            Vector<T, BYTES> result;
            for (int v = 0; v < V; ++v) {
                const A product = received[v] * gelu_slope(static_cast<A>(token.lane[v]) + constant[v]);
                result.lane[v] = static_cast<T>(product);
                sum[v] += product;
            }
            store<BYTES>(dtokens + at, result);
        }
        for (int v = 0; v < V; ++v) partial[thread / (SIDE / V)][lane + v] = sum[v];
    }
    __syncthreads();
    if (thread >= SIDE || square.channel + thread >= width) return;
    A sum = 0;
    for (int row = 0; row < ROWS; ++row) sum += partial[row][thread];
    const int parts = (count - 1) / SIDE + 1;
    sums[(square.image * parts + square.part) * width + square.channel + thread] = sum;
}

template <typename T, int BYTES, int MAP_BYTES>
__global__ void __launch_bounds__(THREADS, 3) read_project_backward_tiles(
    const T* __restrict__ dmap, const T* __restrict__ tokens, const T* __restrict__ readout, const T* __restrict__ bias,
    T* __restrict__ dtokens, Accumulator<T>* __restrict__ sums, int count, int width) {
    using A = Accumulator<T>;
    constexpr int SIDE = side_of<T>, W = lanes_of<T, MAP_BYTES>;
    __shared__ A tile[SIDE][SIDE + 1];
    const Square<T> square(count, width);
    const int thread = static_cast<int>(threadIdx.x), pixel = thread % (SIDE / W) * W;
    if (square.token + pixel < count) {
        for (int row = thread / (SIDE / W); row < SIDE && square.channel + row < width; row += THREADS / (SIDE / W)) {
            const Vector<T, MAP_BYTES> pixels =
                load<MAP_BYTES>(dmap + (square.image * width + square.channel + row) * count + square.token + pixel);
            for (int w = 0; w < W; ++w) tile[row][pixel + w] = static_cast<A>(pixels.lane[w]);
        }
    }
    __syncthreads();
    const auto gradient = [&](int row, int lane, long long, A(&received)[lanes_of<T, BYTES>]) {
        for (int v = 0; v < lanes_of<T, BYTES>; ++v) received[v] = tile[lane + v][row];
    };
    backward_of_square<T, BYTES>(square, gradient, tokens, readout, bias, dtokens, sums, count, width);
}

template <typename T, int BYTES>
__global__ void __launch_bounds__(THREADS, 3) read_project_backward_channels_last(
    const T* __restrict__ dmap, const T* __restrict__ tokens, const T* __restrict__ readout, const T* __restrict__ bias,
    T* __restrict__ dtokens, Accumulator<T>* __restrict__ sums, int count, int width) {
    using A = Accumulator<T>;
    const auto gradient = [&](int, int, long long at, A(&received)[lanes_of<T, BYTES>]) {
        const Vector<T, BYTES> pixel = load<BYTES>(dmap + at);
        for (int v = 0; v < lanes_of<T, BYTES>; ++v) received[v] = static_cast<A>(pixel.lane[v]);
    };
    backward_of_square<T, BYTES>(Square<T>(count, width), gradient, tokens, readout, bias, dtokens, sums, count, width);
}

// dreadout from the sums of the parts: one thread per channel of an image, which leaves its total in place of the first part.
template <typename T>
__global__ void read_project_sum_parts(T* __restrict__ dreadout, Accumulator<T>* __restrict__ sums, int images, int parts,
                                       int width) {
    const int index = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
    if (index >= images * width) return;
    Accumulator<T>* first = sums + static_cast<long long>(index / width) * parts * width + index % width;
    Accumulator<T> sum = 0;
    for (int part = 0; part < parts; ++part) sum += first[static_cast<long long>(part) * width];
    *first = sum;
    dreadout[index] = static_cast<T>(sum);
}

// dbias from those totals: one thread per channel.
template <typename T>
__global__ void read_project_sum_images(T* __restrict__ dbias, const Accumulator<T>* __restrict__ sums, int images, int parts,
                                        int width) {
    const int channel = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
    if (channel >= width) return;
    Accumulator<T> sum = 0;
    for (int image = 0; image < images; ++image) sum += sums[static_cast<long long>(image) * parts * width + channel];
    dbias[channel] = static_cast<T>(sum);
}
