// The depth loss (Section 4.1; MiDaS, TPAMI 2020, Section 5): trimmed, blind to scale and shift, with gradient matching.
//
// Per image, over its M valid pixels, prediction d and target d* are aligned by their own lower median t and mean absolute
// deviation s (at least 1e-6), and what remains is R:
//
//     R         = (d - t(d)) / s(d) - (d* - t(d*)) / s(d*)
//     L_ssitrim = 1/(2M) sum of the floor(kept M) smallest |R|               of equal ones the first in row-major order
//     L_reg     = sum over scales k of 1/M_k sum (|dR/dx| + |dR/dy|)         scale k: every 2^k-th pixel, M_k valid ones
//     loss      = mean over the images of L_ssitrim + weight L_reg           0 for an image without a valid pixel
//
// prediction (images, height, width) of type T, target and R of Accumulator<T>, mask of bytes. What prediction and target hold
// where the mask is 0 changes nothing. R is kept for the gradient, with one pattern of bits, which no computation gives, where
// the mask is 0. The gradient in the prediction flows through R, s and t, the last to the first pixel that has the median; |x|
// has gradient 0 at 0, and pixels that were trimmed get none from L_ssitrim.
//
// Every sum of floating-point numbers has one fixed order and what is counted are integers: results are the same every time.
//
// Rung 1 (naive): one block an image; medians and the trimming by bisection over the bits of a key.
// Rung 2: many blocks an image; selection by digits of 11 bits; the sums of the gradient are taken along with the loss.
#include "chunks.cuh"
#include "depth_residual.cuh"
#include "depth_selections.cuh"

// ---- Rung 1 -----------------------------------------------------------------------------------------------------------------
//
// The definition, line by line, by one block an image. The threads take every blockDim.x-th pixel; what they have summed or
// counted is added by the first of them, in order. The number of rank r is found from the highest bit of its key down: a bit is 1
// if the keys below that 1 are no more than r. That reads the image once a bit, 96 times for both medians and the trimming
// of float32, and leaves all but a few of a GPU's multiprocessors without work.

// The key of rank `rank`; valid(i) says whether pixel i counts, key(i) is its key, of so many bits.
template <typename Key, typename Valid, typename KeyOf>
__device__ Key key_of_rank(int rank, int pixels, int bits, Valid valid, KeyOf key) {
    Key found = 0;
    for (int bit = bits - 1; bit >= 0; --bit) {
        const Key candidate = static_cast<Key>(found | Key(1) << bit);
        int below = 0;
        for (int i = static_cast<int>(threadIdx.x); i < pixels; i += static_cast<int>(blockDim.x)) {
            below += valid(i) && key(i) < candidate;
        }
        if (sum_in_order(below) <= rank) found = candidate;
    }
    return found;
}

template <typename T>
__global__ void depth_loss_naive(const T* __restrict__ prediction, const Accumulator<T>* __restrict__ target,
                                 const unsigned char* __restrict__ mask, Accumulator<T>* residual, Accumulator<T>* numbers,
                                 int* counts, Accumulator<T>* parts, int height, int width, double kept, int scales,
                                 double weight) {
    using A = Accumulator<T>;
    const int pixels = height * width, thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
    const long long offset = static_cast<long long>(blockIdx.x) * pixels;
    prediction += offset, target += offset, mask += offset, residual += offset;
    numbers += blockIdx.x * NUMBERS, counts += blockIdx.x * COUNTS, parts += blockIdx.x * 2;

    // Medians, and the first pixel that has the prediction's
    int valid = 0;
    for (int i = thread; i < pixels; i += threads) valid += mask[i] != 0;
    valid = sum_in_order(valid);
    const auto is_used = [&](int i) { return mask[i] != 0; };
    const int middle = (valid - 1) / 2;
    const A median = static_cast<A>(from_key<T>(
        key_of_rank<Word<T>>(middle, pixels, bits_of<T>, is_used, [&](int i) { return to_key(prediction[i]); })));
    const A target_median =
        from_key<A>(key_of_rank<Word<A>>(middle, pixels, bits_of<A>, is_used, [&](int i) { return to_key(target[i]); }));

    // Deviations
    A sum = 0, target_sum = 0;
    for (int i = thread; i < pixels; i += threads) {
        if (mask[i] == 0) continue;
        const A centred = static_cast<A>(prediction[i]) - median, target_centred = target[i] - target_median;
        sum += absolute(centred);
        target_sum += absolute(target_centred);
    }
    const A mean = sum_in_order(sum) / static_cast<A>(max(valid, 1));
    const A target_mean = sum_in_order(target_sum) / static_cast<A>(max(valid, 1));
    if (thread == 0) {
        set_alignment(numbers, median, mean, target_median, target_mean);
        counts[VALID] = valid;
        int first = 0;
        while (first < pixels && !(mask[first] != 0 && static_cast<A>(prediction[first]) == median)) ++first;
        counts[FIRST] = pixels - first;
    }
    __syncthreads();

    // Trimming
    for (int i = thread; i < pixels; i += threads) {
        residual[i] = residual_at(static_cast<A>(prediction[i]), target[i], mask[i] != 0, numbers);
    }
    const int used = kept_of(valid, kept);
    const Word<A> threshold = key_of_rank<Word<A>>(used - 1, pixels, bits_of<A> - 1, is_used,
                                                   [&](int i) { return magnitude(residual[i]); });
    int below = 0;
    for (int i = thread; i < pixels; i += threads) below += magnitude(residual[i]) < threshold;
    below = sum_in_order(below);
    if (thread == 0) {
        numbers[THRESHOLD] = from_word<A>(threshold);
        counts[LIMIT] = -1;  // the last of the equal ones that are kept
        for (int i = 0; i < pixels && below < used; ++i) {
            if (mask[i] == 0 || magnitude(residual[i]) != threshold) continue;
            ++below;
            counts[LIMIT] = i;
        }
    }
    __syncthreads();
    sum = 0;
    for (int i = thread; i < pixels; i += threads) {
        if (is_kept(residual[i], i, numbers[THRESHOLD], counts[LIMIT])) sum += from_word<A>(magnitude(residual[i]));
    }
    A loss = sum_in_order(sum) / static_cast<A>(max(2 * valid, 1));

    // Gradient matching
    for (int k = 0; k < scales; ++k) {
        int valid_here = 0;
        sum = 0;
        for (int i = thread; i < pixels; i += threads) {
            if (!is_of_scale(i % width, i / width, k)) continue;
            valid_here += mask[i] != 0;
            sum += differences(residual, prediction, i % width, i / width, height, width, k).size;
        }
        valid_here = sum_in_order(valid_here);
        loss += static_cast<A>(weight) * (sum_in_order(sum) / static_cast<A>(max(valid_here, 1)));
        if (thread == 0) counts[SCALES + k] = valid_here;
    }
    if (thread == 0) parts[0] = loss, parts[1] = 0;
}

// ---- Rung 2 -----------------------------------------------------------------------------------------------------------------
//
// An image is cut into chunks, a block each, so that a single image keeps many multiprocessors busy, and what all blocks of an
// image have to know comes from the launch before:
//
//     depth_median      once a digit: of both maps, among the valid values with the digits known, how many have which next digit
//     depth_deviation   sums of |d - t| and |d* - t*|, a pair a chunk; the first pixel that has the median; M_k
//     depth_residual    R, and its first digit
//     depth_threshold   once a digit: the further digits of |R|; then, unless all that equal it are kept, of the pixel's place
//     depth_terms       the kept |R| and all |dR|, and what the gradient needs, a pair a chunk
//     depth_mean        the chunks of an image, the images of the batch
//
// Each block ends the selection of the digit before for itself: it adds up 2048 counts, which is little beside its chunk, and
// spares a launch. Three digits of 11 bits hold a float32, two a 16-bit number, so both maps are read three times for their
// medians and twice for R, and R three times more (five where the trimming cuts through equal values). A chunk's counts are
// collected in shared memory, where to add 1 is an instruction of its own, and only bins that are not empty go on to global
// memory.

template <typename T>
__global__ void __launch_bounds__(512, 2)
    depth_median(const T* __restrict__ prediction, const Accumulator<T>* __restrict__ target,
                 const unsigned char* __restrict__ mask, unsigned* histograms, Choice* choices, int* counts, int pixels,
                 int chunk, int chunks, int whole, int digit) {
    using A = Accumulator<T>;
    __shared__ unsigned bins[2 * BINS];
    const Chunk here = this_chunk(pixels, chunk, chunks);
    const long long offset = static_cast<long long>(here.image) * pixels;
    prediction += offset, target += offset, mask += offset, counts += here.image * COUNTS;

    const Medians<T> medians(histograms, choices, here.image);
    const Choice start = lower_median(digit == 0 ? 0 : counts[VALID]);
    const Choice known = choice_after(medians.prediction, digit, start, here.index == 0);
    const Choice target_known = choice_after(medians.target, digit, start, here.index == 0);
    const bool narrows = digit < digits_of(bits_of<T>);  // whether the prediction has this digit
    const Counter<Word<T>> counter(bits_of<T>, narrows ? digit : 0, known.prefix);
    const Counter<Word<A>> target_counter(bits_of<A>, digit, target_known.prefix);

    clear_bins(bins, 2 * BINS);
    int valid = 0;
    for (unsigned i = here.begin + 4 * threadIdx.x; i < here.end; i += 4 * blockDim.x) {
        const Four<unsigned char> used = read_four(mask, i, here.end, whole);
        const Four<A> truth = read_four(target, i, here.end, whole);
        Four<T> d = {};
        if (narrows) d = read_four(prediction, i, here.end, whole);
        for (unsigned k = 0; k < 4; ++k) {
            if (used.at[k] == 0 || i + k >= here.end) continue;
            ++valid;
            if (narrows) counter.count(to_key(d.at[k]), bins);
            target_counter.count(to_key(truth.at[k]), bins + BINS);
        }
    }
    if (narrows) add_bins(bins, medians.prediction.histograms + digit * BINS);
    add_bins(bins + BINS, medians.target.histograms + digit * BINS);
    if (digit != 0) return;
    valid = block_sum(valid);
    if (threadIdx.x == 0) atomicAdd(&counts[VALID], valid);
}

template <typename T>
__global__ void __launch_bounds__(512, 2)
    depth_deviation(const T* __restrict__ prediction, const Accumulator<T>* __restrict__ target,
                    const unsigned char* __restrict__ mask, unsigned* histograms, Choice* choices, Accumulator<T>* parts,
                    Accumulator<T>* numbers, int* counts, int pixels, int width, int chunk, int chunks, int whole, int scales) {
    using A = Accumulator<T>;
    __shared__ int of_level[COUNTS];  // how many valid pixels are of scale k and of none coarser, from scale 1 on
    const Chunk here = this_chunk(pixels, chunk, chunks);
    const long long offset = static_cast<long long>(here.image) * pixels;
    prediction += offset, target += offset, mask += offset, numbers += here.image * NUMBERS, counts += here.image * COUNTS;

    const Medians<T> medians(histograms, choices, here.image);
    const Choice start = lower_median(counts[VALID]);
    const int digits = digits_of(bits_of<A>);
    const bool keeps = here.index == 0;
    const Choice known = choice_after(medians.prediction, digits, start, keeps);
    const Choice target_known = choice_after(medians.target, digits, start, keeps);
    const A median = static_cast<A>(from_key<T>(static_cast<Word<T>>(known.prefix)));
    const A target_median = from_key<A>(static_cast<Word<A>>(target_known.prefix));

    if (threadIdx.x < COUNTS) of_level[threadIdx.x] = 0;
    __syncthreads();
    A sum = 0, target_sum = 0;
    int balance = 0, from_end = 0;
    for (unsigned i = here.begin + 4 * threadIdx.x; i < here.end; i += 4 * blockDim.x) {
        const Four<unsigned char> used = read_four(mask, i, here.end, whole);
        const Four<T> d = read_four(prediction, i, here.end, whole);
        const Four<A> truth = read_four(target, i, here.end, whole);
        int y = static_cast<int>(i / width), x = static_cast<int>(i % width);
        for (unsigned k = 0; k < 4; ++k) {
            if (used.at[k] != 0 && i + k < here.end) {
                const A centred = static_cast<A>(d.at[k]) - median, target_centred = truth.at[k] - target_median;
                sum += absolute(centred);
                target_sum += absolute(target_centred);
                balance += sign(centred);
                if (centred == 0) from_end = max(from_end, pixels - static_cast<int>(i + k));
                int level = 0;
                while (level < scales - 1 && is_of_scale(x, y, level + 1)) ++level;
                if (level > 0) atomicAdd(&of_level[level], 1);
            }
            if (++x == width) x = 0, ++y;
        }
    }
    sum = block_sum(sum);
    target_sum = block_sum(target_sum);
    balance = block_sum(balance);
    for (int distance = LANES / 2; distance > 0; distance /= 2) {
        from_end = max(from_end, __shfl_down_sync(EVERY_LANE, from_end, distance));
    }
    if (threadIdx.x % LANES == 0 && from_end > 0) atomicMax(&counts[FIRST], from_end);
    if (threadIdx.x > 0 && static_cast<int>(threadIdx.x) < scales) {
        int of_scale = 0;
        for (int level = static_cast<int>(threadIdx.x); level < scales; ++level) of_scale += of_level[level];
        if (of_scale > 0) atomicAdd(&counts[SCALES + threadIdx.x], of_scale);
    }
    if (threadIdx.x != 0) return;
    parts[2 * blockIdx.x] = sum;
    parts[2 * blockIdx.x + 1] = target_sum;
    atomicAdd(&counts[BALANCE], balance);
    if (!keeps) return;
    numbers[MEDIAN] = median;
    numbers[TARGET_MEDIAN] = target_median;
    counts[SCALES] = counts[VALID];
}

template <typename T>
__global__ void __launch_bounds__(512, 2)
    depth_residual(const T* __restrict__ prediction, const Accumulator<T>* __restrict__ target,
                   const unsigned char* __restrict__ mask, const Accumulator<T>* __restrict__ parts, Accumulator<T>* numbers,
                   const int* __restrict__ counts, Accumulator<T>* __restrict__ residual, unsigned* histograms, int pixels,
                   int chunk, int chunks, int digits, int whole) {
    using A = Accumulator<T>;
    __shared__ unsigned bins[BINS];
    __shared__ A known[NUMBERS];
    const Chunk here = this_chunk(pixels, chunk, chunks);
    const long long offset = static_cast<long long>(here.image) * pixels;
    prediction += offset, target += offset, mask += offset, residual += offset, numbers += here.image * NUMBERS;

    const A valid = static_cast<A>(max(counts[here.image * COUNTS + VALID], 1));
    const A mean = sum_of_chunks(parts, here.image, chunks) / valid;
    const A target_mean = sum_of_chunks(parts + 1, here.image, chunks) / valid;
    if (threadIdx.x == 0) {
        set_alignment(known, numbers[MEDIAN], mean, numbers[TARGET_MEDIAN], target_mean);
        if (here.index == 0) numbers[DEVIATION] = known[DEVIATION], numbers[TARGET_DEVIATION] = known[TARGET_DEVIATION];
    }
    clear_bins(bins, BINS);

    const Counter<Word<A>> counter(bits_of<A> - 1, 0, 0);
    for (unsigned i = here.begin + 4 * threadIdx.x; i < here.end; i += 4 * blockDim.x) {
        const Four<unsigned char> used = read_four(mask, i, here.end, whole);
        const Four<T> d = read_four(prediction, i, here.end, whole);
        const Four<A> truth = read_four(target, i, here.end, whole);
        Four<A> r;
        for (unsigned k = 0; k < 4; ++k) {
            r.at[k] = residual_at(static_cast<A>(d.at[k]), truth.at[k], used.at[k] != 0, known);
            if (is_valid(r.at[k]) && i + k < here.end) counter.count(magnitude(r.at[k]), bins);
        }
        write_four(residual, i, here.end, whole, r);
    }
    add_bins(bins, histograms + static_cast<long long>(here.image) * digits * BINS);
}

template <typename T>
__global__ void __launch_bounds__(512, 3)
    depth_threshold(const Accumulator<T>* __restrict__ residual, unsigned* histograms, Choice* choices,
                    const int* __restrict__ counts, int pixels, int chunk, int chunks, int digits, int whole, int digit,
                    double kept) {
    using A = Accumulator<T>;
    __shared__ unsigned bins[BINS];
    const Chunk here = this_chunk(pixels, chunk, chunks);
    residual += static_cast<long long>(here.image) * pixels;
    const Trimming<A> trimming(histograms, choices, here.image, digits, counts[here.image * COUNTS + VALID], kept);

    const int of_size = digits_of(trimming.size.bits), of_place = digit - of_size;
    const Choice size = choice_after(trimming.size, digit, trimming.start(), here.index == 0);
    if (of_place >= 0 && trimming.is_decided(size)) return;
    const Choice place = choice_after(trimming.place, max(of_place, 0), trimming.among(size), here.index == 0);
    const Counter<Word<A>> counter(trimming.size.bits, min(digit, of_size - 1), size.prefix);
    const Counter<unsigned> place_counter(trimming.place.bits, max(of_place, 0), place.prefix);
    const Word<A> threshold = static_cast<Word<A>>(size.prefix);

    clear_bins(bins, BINS);
    for (unsigned i = here.begin + 4 * threadIdx.x; i < here.end; i += 4 * blockDim.x) {
        const Four<A> r = read_four(residual, i, here.end, whole);
        for (unsigned k = 0; k < 4; ++k) {
            if (i + k >= here.end) continue;
            if (of_place < 0) {
                counter.count(magnitude(r.at[k]), bins);
            } else if (magnitude(r.at[k]) == threshold) {
                place_counter.count(i + k, bins);
            }
        }
    }
    add_bins(bins, histograms + (static_cast<long long>(here.image) * digits + digit) * BINS);
}

template <typename T>
__global__ void __launch_bounds__(512, 2)
    depth_terms(const T* __restrict__ prediction, const Accumulator<T>* __restrict__ residual, unsigned* histograms,
                Choice* choices, Accumulator<T>* parts, Accumulator<T>* numbers, int* counts, int height, int width, int chunk,
                int chunks, int digits, double kept, int scales, double weight) {
    using A = Accumulator<T>;
    __shared__ A shares[COUNTS];
    const Chunk here = this_chunk(height * width, chunk, chunks);
    const long long offset = static_cast<long long>(here.image) * height * width;
    prediction += offset, residual += offset, numbers += here.image * NUMBERS, counts += here.image * COUNTS;
    const Trimming<A> trimming(histograms, choices, here.image, digits, counts[VALID], kept);

    const int of_size = digits_of(trimming.size.bits);
    const Choice size = choice_after(trimming.size, digits, trimming.start(), false);  // kept by the first launch for a place
    int limit = trimming.used == 0 ? -1 : height * width - 1;
    if (!trimming.is_decided(size)) {
        limit = static_cast<int>(choice_after(trimming.place, digits - of_size, trimming.among(size), false).prefix);
    }
    const A threshold = from_word<A>(static_cast<Word<A>>(size.prefix)), median = numbers[MEDIAN];
    set_shares(shares, counts, scales, weight);

    const A trimmed_share = 1 / static_cast<A>(max(2 * counts[VALID], 1));
    A loss = 0, pull = 0;
    int signs = 0;
    // A step of blockDim.x pixels is one of `down` rows and `right` columns.
    const int down = static_cast<int>(blockDim.x) / width, right = static_cast<int>(blockDim.x) % width;
    unsigned i = here.begin + threadIdx.x;
    for (int y = static_cast<int>(i / width), x = static_cast<int>(i % width); i < here.end; i += blockDim.x) {
        const A r = residual[i];
        if (is_kept(r, static_cast<int>(i), threshold, limit)) {
            loss += trimmed_share * from_word<A>(magnitude(r));
            pull += trimmed_share * sign(r) * (static_cast<A>(prediction[i]) - median);
            signs += sign(r);
        }
        for (int k = 0; k < scales && is_of_scale(x, y, k); ++k) {
            const Differences<A> sums = differences(residual, prediction, x, y, height, width, k);
            loss += shares[k] * sums.size;
            pull += shares[k] * sums.pull;
        }
        x += right, y += down;
        if (x >= width) x -= width, ++y;
    }
    loss = block_sum(loss);
    pull = block_sum(pull);
    signs = block_sum(signs);
    if (threadIdx.x != 0) return;
    parts[2 * blockIdx.x] = loss;
    parts[2 * blockIdx.x + 1] = pull;
    atomicAdd(&counts[SIGNS], signs);
    if (here.index == 0) numbers[THRESHOLD] = threshold, counts[LIMIT] = limit;
}

// The chunks of each image, a warp an image, then the images. One block. Rung 1 ends with it too: its images are one chunk.
template <typename T>
__global__ void depth_mean(const Accumulator<T>* __restrict__ parts, Accumulator<T>* numbers, Accumulator<T>* __restrict__ loss,
                           int images, int chunks) {
    using A = Accumulator<T>;
    const int lane = static_cast<int>(threadIdx.x) % LANES, warps = static_cast<int>(blockDim.x) / LANES;
    A sum = 0;
    for (int image = static_cast<int>(threadIdx.x) / LANES; image < images; image += warps) {
        const A* const of_image = parts + 2 * static_cast<long long>(image) * chunks;
        A term = 0, pull = 0;
        for (int index = lane; index < chunks; index += LANES) term += of_image[2 * index], pull += of_image[2 * index + 1];
        term = warp_sum(term);
        pull = warp_sum(pull);
        if (lane != 0) continue;
        A* const kept = numbers + static_cast<long long>(image) * NUMBERS;
        sum += finite(kept[DEVIATION]) ? term : kept[DEVIATION];
        kept[PULL] = pull;
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) *loss = sum / static_cast<A>(images);
}
