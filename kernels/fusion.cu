// Fusion (Section 3.1, Figure 1 right): a deeper map is upsampled to the size of the next skip, and the skip is added.
//
//     out = resize(x, size of skip) + skip        x (planes, height, width), skip and out (planes, out_height, out_width)
//
// bilinear with align_corners=True, channels first, planes = B * C. Output i of an axis reads that axis at
//
//     i * (in - 1) / (out - 1)                    (at 0 where out is 1)
//
// so the corners coincide. The position is kept as that fraction of integers: its whole part is a quotient and its
// fractional part a remainder over out - 1, both exact at any size, where a float position loses a bit of the weight every
// time the map doubles.
//
// Rung 1 (naive): one thread per element written, four reads per output, every position computed anew by division.
#include "element.cuh"

// The two elements of an axis that one output reads, and their weights. An output that falls on an element reads no other.
template <typename A>
struct Taps {
    int lower, upper;
    A lower_weight, upper_weight;
};

template <typename A>
__device__ Taps<A> taps(int i, int in, int out) {
    const long long steps = out > 1 ? out - 1 : 1;
    const long long position = static_cast<long long>(i) * (in - 1);  // in units of 1 / steps
    const int lower = static_cast<int>(position / steps);
    const long long remainder = position % steps;
    return {lower, lower + (remainder > 0), static_cast<A>(steps - remainder) / static_cast<A>(steps),
            static_cast<A>(remainder) / static_cast<A>(steps)};
}

template <typename T>
__global__ void upsample_add_naive(const T* __restrict__ x, const T* __restrict__ skip, T* __restrict__ out, int planes,
                                   int height, int width, int out_height, int out_width) {
    using A = Accumulator<T>;
    const long long index = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (index >= static_cast<long long>(planes) * out_height * out_width) return;
    const int column = static_cast<int>(index % out_width);
    const int row = static_cast<int>(index / out_width % out_height);
    const long long plane = index / out_width / out_height;

    const Taps<A> vertical = taps<A>(row, height, out_height);
    const Taps<A> horizontal = taps<A>(column, width, out_width);
    const T* above = x + (plane * height + vertical.lower) * width;
    const T* below = x + (plane * height + vertical.upper) * width;
    const A along_above = horizontal.lower_weight * static_cast<A>(above[horizontal.lower]) +
                          horizontal.upper_weight * static_cast<A>(above[horizontal.upper]);
    const A along_below = horizontal.lower_weight * static_cast<A>(below[horizontal.lower]) +
                          horizontal.upper_weight * static_cast<A>(below[horizontal.upper]);
    const A resized = vertical.lower_weight * along_above + vertical.upper_weight * along_below;
    out[index] = static_cast<T>(resized + static_cast<A>(skip[index]));
}

// The outputs of an axis that read element i, first to last: those o with |o (in - 1) - i steps| < steps. Their weights are
// the forward ones, 1 - that distance / steps.
struct Readers {
    int first, last;
};

__device__ inline Readers readers(int i, int in, int out) {
    if (in == 1) return {0, out - 1};
    const long long steps = out > 1 ? out - 1 : 1;
    const long long first = i == 0 ? 0 : (i - 1) * steps / (in - 1) + 1;
    const long long last = ((i + 1) * steps - 1) / (in - 1);
    return {static_cast<int>(first), static_cast<int>(last < out ? last : out - 1)};
}

template <typename A>
__device__ A reader_weight(int o, int i, int in, int out) {
    const long long steps = out > 1 ? out - 1 : 1;
    const long long offset = static_cast<long long>(o) * (in - 1) - i * steps;
    return static_cast<A>(steps - (offset < 0 ? -offset : offset)) / static_cast<A>(steps);
}

// The gradient of resize in its input, (planes, out_height, out_width) to (planes, height, width). Each thread gathers what
// the readers of its element received, in row-major order: nothing is added atomically, so the sum is the same every time.
template <typename T>
__global__ void upsample_backward_naive(const T* __restrict__ dout, T* __restrict__ dx, int planes, int height, int width,
                                        int out_height, int out_width) {
    using A = Accumulator<T>;
    const long long index = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (index >= static_cast<long long>(planes) * height * width) return;
    const int column = static_cast<int>(index % width);
    const int row = static_cast<int>(index / width % height);
    const long long plane = index / width / height;

    const Readers rows = readers(row, height, out_height);
    const Readers columns = readers(column, width, out_width);
    A sum = 0;
    for (int o = rows.first; o <= rows.last; ++o) {
        const T* line = dout + (plane * out_height + o) * out_width;
        A along = 0;
        for (int p = columns.first; p <= columns.last; ++p) {
            along += reader_weight<A>(p, column, width, out_width) * static_cast<A>(line[p]);
        }
        sum += reader_weight<A>(o, row, height, out_height) * along;
    }
    dx[index] = static_cast<T>(sum);
}
