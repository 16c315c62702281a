// Fusion (Section 3.1, Figure 1 right): a deeper map is upsampled to the size of the next skip, and the skip is added.
//
//     out = resize(x, size of skip) + skip        x (planes, height, width), skip and out (planes, out_height, out_width)
//
// bilinear with align_corners=True, channels first, planes = B * C; bilinear.cuh says what an output reads. Channels last, the
// maps are (B, height, width, C) in memory, so that a pixel's channels lie side by side.
//
// Least traffic: each of x, skip and out once, forward; each of dout and dx once, backward. When the sizes double, that is 9
// bytes per pair of 16-bit outputs forward and 5 backward; by its data sheet an H100 moves them in the time of some 40
// instructions per output forward and 20 backward, and the naive kernels, with their divisions, have several times as many.
//
// Rung 1 (naive): one thread per element written, four reads per output, every position computed anew by division.
#include "bilinear.cuh"
#include "vectors.cuh"

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

// Rung 2 (rows): a thread keeps its column, or vector of columns, and walks down `rows` output rows. Interpolation is separable:
// along a row of x first, then between two such results. The first depends on the row of x alone, which serves several output
// rows (two, when the size doubles), so both results stay in registers until the walk has passed them; and the positions across
// are found once for all rows. Skip and out are moved 16 bytes at a time, the next row's skip while this one is computed.

// The taps of one output of an axis after another: their position moves by a constant fraction, so one division serves all.
template <typename A>
class Walk {
   public:
    __device__ Walk(int first, int in, int out)
        : steps(out > 1 ? out - 1 : 1), whole((in - 1) / steps), part((in - 1) % steps) {
        const long long position = static_cast<long long>(first) * (in - 1);
        lower = static_cast<unsigned>(position / steps);
        remainder = static_cast<unsigned>(position % steps);
    }

    __device__ Taps<A> taps() const {
        const int element = static_cast<int>(lower);
        return {element, element + (remainder > 0), static_cast<A>(steps - remainder) / static_cast<A>(steps),
                static_cast<A>(remainder) / static_cast<A>(steps)};
    }

    __device__ void next() {
        lower += whole;
        remainder += part;
        if (remainder >= steps) {
            remainder -= steps;
            ++lower;
        }
    }

   private:
    unsigned steps, whole, part, lower, remainder;  // unsigned: two remainders may add up to more than 2^31
};

// What a thread of each layout interpolates across: V neighbouring columns, each at its own position ...
template <typename T, int BYTES>
class Columns {
   public:
    using A = Accumulator<T>;
    static constexpr int V = lanes_of<T, BYTES>;

    __device__ Columns(int first, int width, int out_width) {
        Walk<A> walk(first, width, out_width);
        for (int v = 0; v < V; ++v, walk.next()) columns[v] = walk.taps();
    }

    // Across the line of x that begins at index `line`. (Indices are int: pointers held for every column would cost registers.)
    __device__ void along(const T* x, int line, A (&values)[V]) const {
        for (int v = 0; v < V; ++v) {
            values[v] = columns[v].lower_weight * static_cast<A>(x[line + columns[v].lower]) +
                        columns[v].upper_weight * static_cast<A>(x[line + columns[v].upper]);
        }
    }

   private:
    Taps<A> columns[V];
};

// ... or V neighbouring channels of one column, at its position.
template <typename T, int BYTES>
class Channels {
   public:
    using A = Accumulator<T>;
    static constexpr int V = lanes_of<T, BYTES>;

    __device__ Channels(int output, int width, int out_width, int channels)
        : column(Walk<A>(output, width, out_width).taps()), channels(channels) {}

    __device__ void along(const T* x, int line, A (&values)[V]) const {
        const Vector<T, BYTES> lower = load<BYTES>(x + line + column.lower * channels);
        const Vector<T, BYTES> upper = load<BYTES>(x + line + column.upper * channels);
        for (int v = 0; v < V; ++v) {
            values[v] = column.lower_weight * static_cast<A>(lower.lane[v]) + column.upper_weight * static_cast<A>(upper.lane[v]);
        }
    }

   private:
    Taps<A> column;
    int channels;
};

// Output rows first to last - 1 of one thread. x, skip and out point at row 0; a row has `stride` elements, or `out_stride`.
template <int BYTES, typename T, typename Across>
__device__ void walk_rows(const Across& across, const T* __restrict__ x, const T* __restrict__ skip, T* __restrict__ out,
                          int height, int out_height, int stride, int out_stride, int first, int last) {
    using A = Accumulator<T>;
    constexpr int V = Across::V;
    A above[V] = {}, below[V] = {};
    int row_above = -1, row_below = -1;  // the rows of x that these were interpolated from
    Walk<A> walk(first, height, out_height);
    Vector<T, BYTES> added = load<BYTES>(skip + first * out_stride);
    for (int row = first; row < last; ++row, walk.next()) {
        const Vector<T, BYTES> adding = added;
        if (row + 1 < last) added = load<BYTES>(skip + (row + 1) * out_stride);
        const Taps<A> taps = walk.taps();
        if (taps.lower == row_below) {
            for (int v = 0; v < V; ++v) above[v] = below[v];
        } else if (taps.lower != row_above) {
            across.along(x, taps.lower * stride, above);
        }
        if (taps.upper == taps.lower) {
            for (int v = 0; v < V; ++v) below[v] = above[v];
        } else if (taps.upper != row_below) {
            across.along(x, taps.upper * stride, below);
        }
        row_above = taps.lower;
        row_below = taps.upper;
        Vector<T, BYTES> sum;
        for (int v = 0; v < V; ++v) {
            const A resized = taps.lower_weight * above[v] + taps.upper_weight * below[v];
            sum.lane[v] = static_cast<T>(resized + static_cast<A>(adding.lane[v]));
        }
        store<BYTES>(out + row * out_stride, sum);
    }
}

// One thread per vector of columns and strip of rows. BYTES is 16 where rows of skip and out begin at multiples of it, else 1.
template <typename T, int BYTES>
__global__ void upsample_add_rows(const T* __restrict__ x, const T* __restrict__ skip, T* __restrict__ out, int planes,
                                  int height, int width, int out_height, int out_width, int rows) {
    const unsigned groups = out_width / lanes_of<T, BYTES>, strips = (out_height - 1) / rows + 1;
    const unsigned index = blockIdx.x * blockDim.x + threadIdx.x;
    if (index >= static_cast<unsigned>(planes) * strips * groups) return;
    const int column = static_cast<int>(index % groups) * lanes_of<T, BYTES>;
    const int first = static_cast<int>(index / groups % strips) * rows;
    const long long plane = index / groups / strips;
    const long long begin = plane * out_height * out_width + column;
    walk_rows<BYTES>(Columns<T, BYTES>(column, width, out_width), x + plane * height * width, skip + begin, out + begin, height,
                     out_height, width, out_width, first, min(first + rows, out_height));
}

// Channels last: one thread per vector of channels of an output column and strip of rows.
template <typename T, int BYTES>
__global__ void upsample_add_channels_last(const T* __restrict__ x, const T* __restrict__ skip, T* __restrict__ out, int images,
                                           int channels, int height, int width, int out_height, int out_width, int rows) {
    const unsigned groups = channels / lanes_of<T, BYTES>, strips = (out_height - 1) / rows + 1;
    const unsigned index = blockIdx.x * blockDim.x + threadIdx.x;
    if (index >= static_cast<unsigned>(images) * strips * out_width * groups) return;
    const int channel = static_cast<int>(index % groups) * lanes_of<T, BYTES>;
    const int column = static_cast<int>(index / groups % out_width);
    const int first = static_cast<int>(index / groups / out_width % strips) * rows;
    const long long image = index / groups / out_width / strips;
    const long long begin = (image * out_height * out_width + column) * channels + channel;
    walk_rows<BYTES>(Channels<T, BYTES>(column, width, out_width, channels), x + image * height * width * channels + channel,
                     skip + begin, out + begin, height, out_height, width * channels, out_width * channels, first,
                     min(first + rows, out_height));
}

// The gradient of resize in its input, dout (planes, out_height, out_width) to dx (planes, height, width).
//
// Rung 1 (naive): each thread gathers what the readers of its element received, in row-major order: nothing is added atomically,
// so the sum is the same every time. Every element of dout is read by four threads, and every weight is computed anew.
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

// Rung 2 (rows): the forward walk, transposed. A thread keeps its column of dx and walks down the rows of dout that `rows` of its
// elements read. What a row of dout gives to the column is summed once and goes, weighted, to the two rows of dx it was read
// from: two running sums, of which the upper is complete, and written, when the walk has passed it. The weights across are
// computed once for all rows. So that those along the walk serve several elements too, a thread has PLANES planes, or, channels
// last, a vector of channels. The order of each sum is the naive rung's.

constexpr int PLANES = 4;

// A thread's lanes: the same element of up to PLANES planes, one beyond the other ...
template <typename T>
class Planes {
   public:
    using A = Accumulator<T>;
    static constexpr int V = PLANES;

    __device__ Planes(int planes, long long dout_plane, long long dx_plane)
        : planes(planes), dout_plane(dout_plane), dx_plane(dx_plane) {}

    __device__ void add(A weight, const T* dout, A (&sums)[V]) const {
        for (int v = 0; v < V; ++v)
            if (v < planes) sums[v] += weight * static_cast<A>(dout[v * dout_plane]);
    }

    __device__ void write(T* dx, const A (&sums)[V]) const {
        for (int v = 0; v < V; ++v)
            if (v < planes) dx[v * dx_plane] = static_cast<T>(sums[v]);
    }

   private:
    int planes;
    long long dout_plane, dx_plane;
};

// ... or V neighbouring channels.
template <typename T, int BYTES>
class Neighbours {
   public:
    using A = Accumulator<T>;
    static constexpr int V = lanes_of<T, BYTES>;

    __device__ void add(A weight, const T* dout, A (&sums)[V]) const {
        const Vector<T, BYTES> values = load<BYTES>(dout);
        for (int v = 0; v < V; ++v) sums[v] += weight * static_cast<A>(values.lane[v]);
    }

    __device__ void write(T* dx, const A (&sums)[V]) const {
        Vector<T, BYTES> values;
        for (int v = 0; v < V; ++v) values.lane[v] = static_cast<T>(sums[v]);
        store<BYTES>(dx, values);
    }
};

// Rows first to last - 1 of `column` of dx. dout and dx point at pixel (0, 0); from a pixel to the next there are `pixel`
// elements.
template <typename T, typename Lanes>
__device__ void gather_rows(const Lanes& lanes, const T* __restrict__ dout, T* __restrict__ dx, int column, int pixel, int height,
                            int width, int out_height, int out_width, int first, int last) {
    using A = Accumulator<T>;
    constexpr int V = Lanes::V, HELD = 6;  // weights kept in registers: all there are while no side more than doubles
    const Readers columns = readers(column, width, out_width);
    A weights[HELD];
    for (int k = 0; k < HELD; ++k) weights[k] = reader_weight<A>(columns.first + k, column, width, out_width);

    A upper[V] = {}, lower[V] = {};  // the sums of `row` and of the row below
    int row = first - 1;             // which readers of the first row may read too; its sum is not this thread's
    const auto leave_row = [&]() {
        if (row >= first) lanes.write(dx + (row * width + column) * pixel, upper);
        for (int v = 0; v < V; ++v) {
            upper[v] = lower[v];
            lower[v] = 0;
        }
        ++row;
    };
    const int begin = readers(first, height, out_height).first, end = readers(last - 1, height, out_height).last;
    Walk<A> walk(begin, height, out_height);
    for (int o = begin; o <= end; ++o, walk.next()) {
        const Taps<A> taps = walk.taps();
        while (row < taps.lower) leave_row();
        const T* line = dout + (o * out_width + columns.first) * pixel;
        A along[V] = {};
        for (int k = 0; k < HELD; ++k)
            if (columns.first + k <= columns.last) lanes.add(weights[k], line + k * pixel, along);
        for (int p = columns.first + HELD; p <= columns.last; ++p) {
            lanes.add(reader_weight<A>(p, column, width, out_width), line + (p - columns.first) * pixel, along);
        }
        for (int v = 0; v < V; ++v) {
            upper[v] += taps.lower_weight * along[v];
            if (taps.upper > taps.lower) lower[v] += taps.upper_weight * along[v];
        }
    }
    while (row < last) leave_row();
}

// One thread per column of PLANES planes and strip of rows of dx.
template <typename T>
__global__ void upsample_backward_rows(const T* __restrict__ dout, T* __restrict__ dx, int planes, int height, int width,
                                       int out_height, int out_width, int rows) {
    const unsigned strips = (height - 1) / rows + 1, groups = (planes - 1) / PLANES + 1;
    const unsigned index = blockIdx.x * blockDim.x + threadIdx.x;
    if (index >= groups * strips * width) return;
    const int column = static_cast<int>(index % width);
    const int first = static_cast<int>(index / width % strips) * rows;
    const int plane = static_cast<int>(index / width / strips) * PLANES;
    const long long dout_plane = static_cast<long long>(out_height) * out_width;
    const long long dx_plane = static_cast<long long>(height) * width;
    gather_rows(Planes<T>(min(PLANES, planes - plane), dout_plane, dx_plane), dout + plane * dout_plane, dx + plane * dx_plane,
                column, 1, height, width, out_height, out_width, first, min(first + rows, height));
}

// Channels last: one thread per vector of channels of a column and strip of rows of dx.
template <typename T, int BYTES>
__global__ void upsample_backward_channels_last(const T* __restrict__ dout, T* __restrict__ dx, int images, int channels,
                                                int height, int width, int out_height, int out_width, int rows) {
    const unsigned groups = channels / lanes_of<T, BYTES>, strips = (height - 1) / rows + 1;
    const unsigned index = blockIdx.x * blockDim.x + threadIdx.x;
    if (index >= static_cast<unsigned>(images) * strips * width * groups) return;
    const int channel = static_cast<int>(index % groups) * lanes_of<T, BYTES>;
    const int column = static_cast<int>(index / groups % width);
    const int first = static_cast<int>(index / groups / width % strips) * rows;
    const long long image = index / groups / width / strips;
    gather_rows(Neighbours<T, BYTES>(), dout + image * out_height * out_width * channels + channel,
                dx + image * height * width * channels + channel, column, channels, height, width, out_height, out_width, first,
                min(first + rows, height));
}
