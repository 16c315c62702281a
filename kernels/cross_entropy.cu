// Cross-entropy of segmentation (Section 5.2), fused with the upsampling of the logits to the labels:
//
//     z = resize(logits, size of labels)                        logits (B, K, height, width), z (B, K, out_height, out_width)
//     L = mean over the pixels that count of  log sum_k exp z_k - z_label
//     dL/dlogits = resize^T ((softmax(z) - onehot(label)) / count)
//
// bilinear with align_corners=True; bilinear.cuh says which pixels read which element of the logits, here called a cell. At the
// paper's size z has 150 x 480 x 480 numbers per image, four times as many as the logits, and softmax and its gradient as many
// again. None of them is ever in memory: the forward pass keeps one number a pixel, log sum exp, and the backward pass finds any
// probability again as exp(z_k - log sum exp), interpolating z_k anew.
//
// Both rungs of both passes add in an order that the sizes alone decide: no sum is atomic, every run gives the same bits.
#include "bilinear.cuh"
#include "labels.cuh"

constexpr int LANES = 32;
constexpr unsigned ALL = 0xffffffffu;
constexpr int NONE = 0x7fffffff;  // no pixel

// The hardware's own exponential, accurate to 2 + 1.173 |x| units in the last place: of exp(x), x <= 0, the second is lost in
// the sum. double exists on the host alone.
__device__ inline float exponential(float x) { return __expf(x); }
__device__ inline double exponential(double x) { return exp(x); }
__device__ inline float logarithm(float x) { return logf(x); }
__device__ inline double logarithm(double x) { return log(x); }
__device__ inline float lowest(float) { return -3.4028234663852886e38f; }
__device__ inline double lowest(double) { return -1.7976931348623157e308; }

// log sum exp of the numbers seen so far, as their largest and the sum of exp(z - largest), which never overflows. One
// exponential a number: where it is a new largest, of what the sum is scaled by, else of itself.
template <typename A>
struct LogSumExp {
    A largest, sum;

    __device__ void clear() {
        largest = lowest(A());
        sum = 0;
    }
    __device__ void add(A z) {
        const A above = z - largest;
        const A factor = exponential(above > 0 ? -above : above);
        sum = above > 0 ? sum * factor + 1 : sum + factor;
        largest = above > 0 ? z : largest;
    }
    __device__ void merge(const LogSumExp& other) {
        const A above = other.largest - largest;
        const A factor = exponential(above > 0 ? -above : above);
        sum = above > 0 ? sum * factor + other.sum : sum + other.sum * factor;
        largest = above > 0 ? other.largest : largest;
    }
};

// What is summed over pixels: their losses, how many count, and the first whose label is no class.
template <typename A>
struct Tally {
    A loss;
    int counted, wrong;

    __device__ void add(const Tally& other) {
        loss += other.loss;
        counted += other.counted;
        wrong = min(wrong, other.wrong);
    }
};

// One pixel's tally, its log sum exp written: 0 where it does not count, and then its logits are nowhere in the result.
template <typename A, typename Interpolated>
__device__ Tally<A> finish_pixel(const LogSumExp<A>& found, int label, int pixel, int classes, int ignore_index,
                                 A* log_sum_exp, Interpolated of_class) {
    Tally<A> tally{0, 0, NONE};
    A kept = 0;
    if (label != ignore_index) {
        if (label < 0 || label >= classes) {
            tally.wrong = pixel;
        } else {
            const A logarithm_of_sum = logarithm(found.sum);
            kept = found.largest + logarithm_of_sum;
            tally.loss = logarithm_of_sum + (found.largest - of_class(label));
            tally.counted = 1;
        }
    }
    log_sum_exp[pixel] = kept;
    return tally;
}

// The tally of a block, in thread 0. Lanes exchange theirs at distances 16, 8, .., 1; then thread 0 adds the warps' in order.
template <typename A, int WARPS>
__device__ Tally<A> add_block(Tally<A> tally) {
    __shared__ Tally<A> of_warp[WARPS];
    for (int distance = LANES / 2; distance > 0; distance /= 2) {
        const A loss = __shfl_xor_sync(ALL, tally.loss, distance);
        const int counted = __shfl_xor_sync(ALL, tally.counted, distance);
        const int wrong = __shfl_xor_sync(ALL, tally.wrong, distance);
        tally.add({loss, counted, wrong});
    }
    if (threadIdx.x % LANES == 0) of_warp[threadIdx.x / LANES] = tally;
    __syncthreads();
    if (threadIdx.x == 0)
        for (int warp = 1; warp < WARPS; ++warp) tally.add(of_warp[warp]);
    return tally;
}

// A logit at one pixel, from its four cells.
template <typename T, typename A>
__device__ A interpolate(const T* plane, int width, const Taps<A>& vertical, const Taps<A>& horizontal) {
    const T* above = plane + static_cast<long long>(vertical.lower) * width;
    const T* below = plane + static_cast<long long>(vertical.upper) * width;
    return vertical.lower_weight * (horizontal.lower_weight * static_cast<A>(above[horizontal.lower]) +
                                    horizontal.upper_weight * static_cast<A>(above[horizontal.upper])) +
           vertical.upper_weight * (horizontal.lower_weight * static_cast<A>(below[horizontal.lower]) +
                                    horizontal.upper_weight * static_cast<A>(below[horizontal.upper]));
}

// Forward
//
// Rung 1 (naive): one thread per pixel, which goes through the classes: four reads, six products and one exponential for each.
// Neighbouring pixels read the same cells: at twice the resolution of the logits, every cell is read sixteen times.
template <typename T>
__global__ void cross_entropy_naive(const T* __restrict__ logits, const void* __restrict__ labels,
                                    Accumulator<T>* __restrict__ log_sum_exp, Accumulator<T>* __restrict__ losses,
                                    int* __restrict__ counts, int label_bytes, int ignore_index, int batch, int classes,
                                    int height, int width, int out_height, int out_width) {
    using A = Accumulator<T>;
    const long long index = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    Tally<A> tally{0, 0, NONE};
    if (index < static_cast<long long>(batch) * out_height * out_width) {
        const int pixel = static_cast<int>(index);
        const int image = pixel / out_width / out_height;
        const Taps<A> vertical = taps<A>(pixel / out_width % out_height, height, out_height);
        const Taps<A> horizontal = taps<A>(pixel % out_width, width, out_width);
        const auto of_class = [=](int k) {
            const T* plane = logits + (static_cast<long long>(image) * classes + k) * height * width;
            return interpolate(plane, width, vertical, horizontal);
        };
        LogSumExp<A> found;
        found.clear();
        for (int k = 0; k < classes; ++k) found.add(of_class(k));
        tally = finish_pixel(found, label_at(labels, label_bytes, pixel), pixel, classes, ignore_index, log_sum_exp, of_class);
    }
    tally = add_block<A, 8>(tally);
    if (threadIdx.x == 0) {
        losses[blockIdx.x] = tally.loss;
        counts[2 * blockIdx.x] = tally.counted;
        counts[2 * blockIdx.x + 1] = tally.wrong;
    }
}

// Rung 2 (tiled): a block takes a tile of 4 rows of 32 pixels, each of its 8 warps every eighth class. What that changes:
//
// - A lane goes down the 4 pixels of one column. It keeps the two rows of cells around it, already interpolated along their
//   row, and reads a new one only where it passes it: at twice the resolution of the logits 3 or 4 rows for 4 pixels, where the
//   naive rung reads 8. The reads of one class do not wait for each other.
// - There are eight times as many threads, each with an eighth of the classes: a single image fills the GPU. The eight
//   results of a pixel meet in shared memory, in the order of the warps.
// - The positions, two divisions of 64-bit integers each, are found once per block and row or column, not once per pixel.
constexpr int TILE_ROWS = 4;
constexpr int TILE_WARPS = 8;

template <typename T, typename A>
__device__ A along(const T* row, const Taps<A>& horizontal) {
    return horizontal.lower_weight * static_cast<A>(row[horizontal.lower]) +
           horizontal.upper_weight * static_cast<A>(row[horizontal.upper]);
}

template <typename T>
__global__ void __launch_bounds__(TILE_WARPS* LANES)
    cross_entropy_tiled(const T* __restrict__ logits, const void* __restrict__ labels, Accumulator<T>* __restrict__ log_sum_exp,
                        Accumulator<T>* __restrict__ losses, int* __restrict__ counts, int label_bytes, int ignore_index,
                        int classes, int height, int width, int out_height, int out_width) {
    using A = Accumulator<T>;
    __shared__ Taps<A> columns[LANES], rows[TILE_ROWS];
    __shared__ LogSumExp<A> partial[TILE_WARPS][TILE_ROWS][LANES];
    const int lane = static_cast<int>(threadIdx.x) % LANES, warp = static_cast<int>(threadIdx.x) / LANES;
    const int tiles_across = (out_width - 1) / LANES + 1, tiles_down = (out_height - 1) / TILE_ROWS + 1;
    const int tile = static_cast<int>(blockIdx.x);
    const int first_column = tile % tiles_across * LANES, first_row = tile / tiles_across % tiles_down * TILE_ROWS;
    const int image = tile / tiles_across / tiles_down;

    // A tile that hangs over the border repeats its last row or column there, and drops the result.
    if (warp == 0) columns[lane] = taps<A>(min(first_column + lane, out_width - 1), width, out_width);
    if (warp == 1 && lane < TILE_ROWS) rows[lane] = taps<A>(min(first_row + lane, out_height - 1), height, out_height);
    __syncthreads();
    const Taps<A> horizontal = columns[lane];
    Taps<A> vertical[TILE_ROWS];
    LogSumExp<A> found[TILE_ROWS];
    for (int r = 0; r < TILE_ROWS; ++r) {
        vertical[r] = rows[r];
        found[r].clear();
    }

    const T* image_logits = logits + static_cast<long long>(image) * classes * height * width;
    for (int k = warp; k < classes; k += TILE_WARPS) {
        const T* plane = image_logits + static_cast<long long>(k) * height * width;
        // The row of cells below each row of pixels, where it is another than that of the row before.
        A next[TILE_ROWS];
        for (int r = 0; r < TILE_ROWS; ++r) {
            const bool moved = r == 0 || vertical[r].lower != vertical[r - 1].lower;
            const T* row = plane + static_cast<long long>(min(vertical[r].lower + 1, height - 1)) * width;
            next[r] = moved ? along(row, horizontal) : A(0);
        }
        A above = along(plane + static_cast<long long>(vertical[0].lower) * width, horizontal), below = next[0];
        for (int r = 0; r < TILE_ROWS; ++r) {
            if (r > 0 && vertical[r].lower != vertical[r - 1].lower) {
                above = vertical[r].lower == vertical[r - 1].lower + 1
                            ? below
                            : along(plane + static_cast<long long>(vertical[r].lower) * width, horizontal);
                below = next[r];
            }
            found[r].add(vertical[r].lower_weight * above + vertical[r].upper_weight * below);
        }
    }
    for (int r = 0; r < TILE_ROWS; ++r) partial[warp][r][lane] = found[r];
    __syncthreads();

    Tally<A> tally{0, 0, NONE};
    const int row = first_row + warp, column = first_column + lane;
    if (warp < TILE_ROWS && row < out_height && column < out_width) {
        LogSumExp<A> all = partial[0][warp][lane];
        for (int other = 1; other < TILE_WARPS; ++other) all.merge(partial[other][warp][lane]);
        const int pixel = (image * out_height + row) * out_width + column;
        const Taps<A> own = rows[warp];
        tally = finish_pixel(all, label_at(labels, label_bytes, pixel), pixel, classes, ignore_index, log_sum_exp, [=](int k) {
            return interpolate(image_logits + static_cast<long long>(k) * height * width, width, own, horizontal);
        });
    }
    tally = add_block<A, TILE_WARPS>(tally);
    if (threadIdx.x == 0) {
        losses[blockIdx.x] = tally.loss;
        counts[2 * blockIdx.x] = tally.counted;
        counts[2 * blockIdx.x + 1] = tally.wrong;
    }
}

// The tallies of all blocks, added by one block in double: totals = sum of losses, pixels that count, first wrong pixel. T is
// the type of the losses.
template <typename T>
__global__ void cross_entropy_total(const T* __restrict__ losses, const int* __restrict__ counts, double* __restrict__ totals,
                                    int blocks) {
    Tally<double> tally{0, 0, NONE};
    for (int k = static_cast<int>(threadIdx.x); k < blocks; k += static_cast<int>(blockDim.x))
        tally.add({static_cast<double>(static_cast<Accumulator<T>>(losses[k])), counts[2 * k], counts[2 * k + 1]});
    tally = add_block<double, 8>(tally);
    if (threadIdx.x == 0) {
        totals[0] = tally.loss;
        totals[1] = tally.counted;
        totals[2] = tally.wrong;
    }
}

// Backward
//
// Rung 1 (naive): one thread per cell and class, which gathers from the pixels that read its cell, in row-major order. A pixel
// between four cells is interpolated, and its exponential taken, once for each of them.
template <typename T>
__global__ void cross_entropy_backward_naive(const T* __restrict__ logits, const void* __restrict__ labels,
                                             const Accumulator<T>* __restrict__ log_sum_exp, T* __restrict__ dlogits,
                                             Accumulator<T> scale, int label_bytes, int ignore_index, int batch, int classes,
                                             int height, int width, int out_height, int out_width) {
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
    dlogits[index] = static_cast<T>(scale * sum);
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
                                   const Accumulator<T>* __restrict__ log_sum_exp, T* __restrict__ dlogits, Accumulator<T> scale,
                                   int label_bytes, int ignore_index, int tile_width, int classes, int height, int width,
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
    for (int c = 0; c < WALK_CLASSES && first_class + c < classes; ++c)
        for (int row = 0; row < cells_down; ++row) {
            const long long plane = static_cast<long long>(image) * classes + first_class + c;
            dlogits[(plane * height + y + row) * width + x + lane] = static_cast<T>(scale * memory.cells[row][c][lane]);
        }
}
