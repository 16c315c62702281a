// The gradient of the cross-entropy of cross_entropy.cu in its logits, (B, K, height, width):
//
//     dL/dlogits = resize^T ((softmax(z) - onehot(label)) / count),  softmax(z)_k = exp(z_k - log sum exp)
//
// with log sum exp and count as the forward pass left them, and z_k interpolated anew. Sums have one order, given by the sizes.
#include "cross_entropy.cuh"

// What every pixel's gradient is multiplied by: the loss is a mean; NaN where a label is no class.
template <typename A>
__device__ A gradient_scale(const A* dloss, const double* totals) {
    if (totals[2] != NONE) return static_cast<A>(nan(""));
    return static_cast<A>(static_cast<double>(dloss[0]) / (totals[1] < 1 ? 1.0 : totals[1]));
}

// Rung 1 (naive): one thread per cell and class, which gathers from the pixels that read its cell, in row-major order. A pixel
// between four cells is interpolated, and its exponential taken, once for each of them.
template <typename T>
__global__ void cross_entropy_backward_naive(const T* __restrict__ logits, const void* __restrict__ labels,
                                             const Accumulator<T>* __restrict__ log_sum_exp, T* __restrict__ dlogits,
                                             const Accumulator<T>* __restrict__ dloss, const double* __restrict__ totals,
                                             int label_bytes, int ignore_index, int batch, int classes, int height, int width,
                                             int out_height, int out_width) {
    using A = Accumulator<T>;
    const long long index = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (index >= static_cast<long long>(batch) * classes * height * width) return;
    const int column = static_cast<int>(index % width);
    const int row = static_cast<int>(index / width % height);
    const long long plane = index / width / height;
    const int k = static_cast<int>(plane % classes), image = static_cast<int>(plane / classes);

    const Readers rows = readers(row, height, out_height), columns = readers(column, width, out_width);
    A sum = 0;
    for (int o = rows.first; o <= rows.last; ++o) {
        const Taps<A> vertical = taps<A>(o, height, out_height);
        A along_row = 0;
        for (int p = columns.first; p <= columns.last; ++p) {
            const int pixel = (image * out_height + o) * out_width + p;
            const int label = label_at(labels, label_bytes, pixel);
            if (label == ignore_index) continue;
            const A z = interpolate(logits + plane * height * width, width, vertical, taps<A>(p, width, out_width));
            const A gradient = exponential(z - log_sum_exp[pixel]) - (label == k ? A(1) : A(0));
            along_row += reader_weight<A>(p, column, width, out_width) * gradient;
        }
        sum += reader_weight<A>(o, row, height, out_height) * along_row;
    }
    dlogits[index] = static_cast<T>(gradient_scale(dloss, totals) * sum);
}

// Rung 2 (walking): a warp takes 4 classes of a tile of cells, 8 rows high and so wide that all its readers are in 32 columns of
// pixels, and walks down those columns, a lane each. What that changes:
//
// - Each pixel is interpolated and its probability found once per class (and again only where tiles share a border), four times
//   fewer than in the naive rung; as in the forward pass, a row of cells is read when the walk first comes between it and
//   the next. Label and log sum exp are read once for 4 classes.
// - What a pixel gives goes, by its vertical weights, to two sums of its lane: for the row of cells above it, and for that
//   below. When the walk passes a row of cells, its sum is complete, but still spread over the columns: each lane puts its
//   share for the cell at its left and for that at its right into shared memory, and each cell adds what its readers, who are
//   neighbours, put there. So the transposed resizing is done along one axis in registers, and along the other once a row.
// - Positions advance by addition: the remainder of row o + 1 is that of row o plus that of one step, exact as in bilinear.cuh,
//   and nothing is divided on the way.
// - Warps share nothing but the cache, so they wait for nobody.
//
// Where more than 32 columns read a single cell (at less than a sixteenth of the resolution of the labels), the warp walks down
// the next 32 after the first, and adds to the same cells.
constexpr int WALK_CLASSES = 4;
constexpr int WALK_ROWS = 8;
constexpr int WALK_WARPS = 4;

// The rows of an axis, one after the other: taps<A>(i, in, out) for i, i + 1, ...
template <typename A>
struct Walk {
    unsigned steps, remainder, step_remainder;
    int lower, step_lower;
    A reciprocal;

    __device__ Walk(int i, int in, int out) {
        steps = out > 1 ? out - 1 : 1;
        const long long position = static_cast<long long>(i) * (in - 1);
        lower = static_cast<int>(position / steps);
        remainder = static_cast<unsigned>(position % steps);
        step_lower = static_cast<int>((in - 1) / steps);
        step_remainder = (in - 1) % steps;
        reciprocal = A(1) / static_cast<A>(steps);
    }
    __device__ A lower_weight() const { return static_cast<A>(steps - remainder) * reciprocal; }
    __device__ A upper_weight() const { return static_cast<A>(remainder) * reciprocal; }
    __device__ void advance() {
        lower += step_lower;
        remainder += step_remainder;
        if (remainder >= steps) {
            remainder -= steps;
            ++lower;
        }
    }
};

// The first output of an axis that lies at element i or after it; `out` where none does.
__device__ inline int first_from(int i, int in, int out) {
    if (i <= 0) return 0;
    if (i >= in) return out;
    const long long steps = out > 1 ? out - 1 : 1;
    return static_cast<int>((i * steps + in - 2) / (in - 1));
}

// What a warp has in shared memory: the shares of its columns for the cells at their left and at their right, and the cells.
template <typename A>
struct WalkMemory {
    A left[WALK_CLASSES][LANES], right[WALK_CLASSES][LANES];
    A cells[WALK_ROWS][WALK_CLASSES][LANES];
};

// The columns, counted from the first of the 32, that give to the cell of this lane: [begin, middle) have it at their right,
// [middle, end) at their left.
struct Givers {
    int begin, middle, end;
};

// Add to the cells of one row what the columns have summed for it.
template <typename A>
__device__ void add_row(WalkMemory<A>& memory, int row, const A (&sums)[WALK_CLASSES], const Taps<A>& horizontal,
                        const Givers& givers) {
    const int lane = static_cast<int>(threadIdx.x) % LANES;
    for (int c = 0; c < WALK_CLASSES; ++c) {
        memory.left[c][lane] = horizontal.lower_weight * sums[c];
        memory.right[c][lane] = horizontal.upper_weight * sums[c];
    }
    __syncwarp();
    for (int c = 0; c < WALK_CLASSES; ++c) {
        A sum = 0;
        for (int p = givers.begin; p < givers.middle; ++p) sum += memory.right[c][p];
        for (int p = givers.middle; p < givers.end; ++p) sum += memory.left[c][p];
        memory.cells[row][c][lane] += sum;
    }
    __syncwarp();
}

template <typename T>
__global__ void __launch_bounds__(WALK_WARPS* LANES, 5)
    cross_entropy_backward_walking(const T* __restrict__ logits, const void* __restrict__ labels,
                                   const Accumulator<T>* __restrict__ log_sum_exp, T* __restrict__ dlogits,
                                   const Accumulator<T>* __restrict__ dloss, const double* __restrict__ totals, int label_bytes,
                                   int ignore_index, int tile_width, int classes, int height, int width,
                                   int out_height, int out_width) {
    using A = Accumulator<T>;
    __shared__ WalkMemory<A> memories[WALK_WARPS];
    const int lane = static_cast<int>(threadIdx.x) % LANES, warp = static_cast<int>(threadIdx.x) / LANES;
    WalkMemory<A>& memory = memories[warp];
    const int tiles_across = (width - 1) / tile_width + 1, tiles_down = (height - 1) / WALK_ROWS + 1;
    const int groups = (classes - 1) / (WALK_CLASSES * WALK_WARPS) + 1;
    const int tile = static_cast<int>(blockIdx.x);
    const int x = tile % tiles_across * tile_width, y = tile / tiles_across % tiles_down * WALK_ROWS;
    const int image = tile / tiles_across / tiles_down / groups;
    const int first_class = (tile / tiles_across / tiles_down % groups * WALK_WARPS + warp) * WALK_CLASSES;
    if (first_class >= classes) return;
    const int cells_across = min(tile_width, width - x), cells_down = min(WALK_ROWS, height - y);

    int planes[WALK_CLASSES];  // where they begin
    for (int c = 0; c < WALK_CLASSES; ++c) {
        const int k = min(first_class + c, classes - 1);  // beyond the last, it once more: computed, not written
        planes[c] = (image * classes + k) * height * width;
        for (int row = 0; row < cells_down; ++row) memory.cells[row][c][lane] = 0;
    }
    const int first_row = readers(y, height, out_height).first, first_column = readers(x, width, out_width).first;
    const int last_row = readers(y + cells_down - 1, height, out_height).last;
    const int last_column = readers(x + cells_across - 1, width, out_width).last;
    const int cell = x + lane;
    const int begin = first_from(cell - 1, width, out_width), middle = first_from(cell, width, out_width);
    const int end = first_from(cell + 1, width, out_width);

    for (int left = first_column; left <= last_column; left += LANES) {
        const int right = min(left + LANES, last_column + 1);  // past the last column of this walk
        const Givers givers{max(begin, left) - left, min(max(middle, left), right) - left, min(end, right) - left};
        const int column = min(left + lane, right - 1);  // past the last, it once more: no cell adds what that lane has
        const Taps<A> horizontal = taps<A>(column, width, out_width);
        Walk<A> walk(first_row, height, out_height);
        int held = -2;  // the row of cells above the walk: none yet, nor is the next below it
        A above[WALK_CLASSES] = {}, below[WALK_CLASSES] = {}, for_above[WALK_CLASSES] = {}, for_below[WALK_CLASSES] = {};
        for (int row = first_row; row <= last_row; ++row, walk.advance()) {
            if (walk.lower != held) {
                const bool next = walk.lower == held + 1;
                if (held >= y) add_row(memory, held - y, for_above, horizontal, givers);
                if (!next && held + 1 >= y && held + 1 < y + cells_down)
                    add_row(memory, held + 1 - y, for_below, horizontal, givers);
                held = walk.lower;
                const int lower_row = held * width, upper_row = min(held + 1, height - 1) * width;
                for (int c = 0; c < WALK_CLASSES; ++c) {
                    for_above[c] = next ? for_below[c] : A(0);
                    for_below[c] = 0;
                    above[c] = next ? below[c] : along(logits + planes[c] + lower_row, horizontal);
                    below[c] = along(logits + planes[c] + upper_row, horizontal);
                }
            }
            const int pixel = (image * out_height + row) * out_width + column;
            const int label = label_at(labels, label_bytes, pixel);
            const bool counted = label != ignore_index;
            const A normalizer = log_sum_exp[pixel], lower_weight = walk.lower_weight(), upper_weight = walk.upper_weight();
            for (int c = 0; c < WALK_CLASSES; ++c) {
                const A z = lower_weight * above[c] + upper_weight * below[c];
                const A gradient = exponential(z - normalizer) - (label == first_class + c ? A(1) : A(0));
                for_above[c] += counted ? lower_weight * gradient : A(0);
                for_below[c] += counted ? upper_weight * gradient : A(0);
            }
        }
        if (held >= y) add_row(memory, held - y, for_above, horizontal, givers);
        if (held + 1 >= y && held + 1 < y + cells_down) add_row(memory, held + 1 - y, for_below, horizontal, givers);
    }

    if (lane >= cells_across) return;
    const A scale = gradient_scale(dloss, totals);
    for (int c = 0; c < WALK_CLASSES && first_class + c < classes; ++c)
        for (int row = 0; row < cells_down; ++row) {
            const long long plane = static_cast<long long>(image) * classes + first_class + c;
            dlogits[(plane * height + y + row) * width + x + lane] = static_cast<T>(scale * memory.cells[row][c][lane]);
        }
}
