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
#include "cross_entropy.cuh"

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

// The tallies of all blocks, added by one block in double: totals = sum of losses, pixels that count, first wrong pixel; and the
// loss, NaN where a label is no class. T is the type of the losses.
template <typename T>
__global__ void cross_entropy_total(T* __restrict__ loss, const T* __restrict__ losses, const int* __restrict__ counts,
                                    double* __restrict__ totals, int blocks) {
    Tally<double> tally{0, 0, NONE};
    for (int k = static_cast<int>(threadIdx.x); k < blocks; k += static_cast<int>(blockDim.x))
        tally.add({static_cast<double>(static_cast<Accumulator<T>>(losses[k])), counts[2 * k], counts[2 * k + 1]});
    tally = add_block<double, 8>(tally);
    if (threadIdx.x == 0) {
        const double mean = tally.loss / max(tally.counted, 1);
        loss[0] = static_cast<T>(tally.wrong == NONE ? mean : nan(""));
        totals[0] = tally.loss;
        totals[1] = tally.counted;
        totals[2] = tally.wrong;
    }
}
