// The gradient of the depth loss (losses.cu) in its prediction: that in R, divided by s; then what flows through s and t, which
// are functions of all valid pixels.
//
//     dR_i = 1/(2M) sign(R_i) if i was kept + weight sum over scales of 1/M_k sum of the signs of the differences that R_i is in
//     dd_i = dR_i / s - sign(d_i - t) / (M s^2) sum_j dR_j (d_j - t), the second term 0 where s was clamped
//     and, at the first pixel that has the median, what flows through t: minus the sum of all dd
//
// R, the medians, deviations and counts are those of the forward pass, as depth_residual.cuh names them.
#include "chunks.cuh"
#include "depth_residual.cuh"

// ---- Rung 1 -----------------------------------------------------------------------------------------------------------------
//
// One block an image, which computes the gradient in R twice: for the sums, and for the result.

template <typename T>
__global__ void depth_loss_backward_naive(const T* __restrict__ prediction, const Accumulator<T>* __restrict__ residual,
                                          const Accumulator<T>* __restrict__ numbers, const int* __restrict__ counts,
                                          const Accumulator<T>* __restrict__ dloss, T* __restrict__ dprediction, int images,
                                          int height, int width, int scales, double weight) {
    using A = Accumulator<T>;
    __shared__ A shares[COUNTS];
    const int pixels = height * width, thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
    const long long offset = static_cast<long long>(blockIdx.x) * pixels;
    prediction += offset, residual += offset, dprediction += offset;
    numbers += blockIdx.x * NUMBERS, counts += blockIdx.x * COUNTS;
    set_shares(shares, counts, scales, weight);

    const A each = *dloss / static_cast<A>(images), s = clamped(numbers[DEVIATION]);
    const A count = static_cast<A>(max(counts[VALID], 1));
    const auto direct = [&](int i) {
        const bool kept = is_kept(residual[i], i, numbers[THRESHOLD], counts[LIMIT]);
        const A dr = residual_gradient(residual, i % width, i / width, height, width, kept, 1 / (2 * count), shares, scales);
        return is_valid(residual[i]) ? each * dr / s : 0;
    };
    A dt = 0, ds = 0;
    int balance = 0;
    for (int i = thread; i < pixels; i += threads) {
        if (!is_valid(residual[i])) continue;
        const A centred = static_cast<A>(prediction[i]) - numbers[MEDIAN];
        dt -= direct(i);
        ds -= direct(i) * (centred / s);
        balance += sign(centred);
    }
    dt = sum_in_order(dt);
    ds = sum_in_order(ds);
    balance = sum_in_order(balance);
    const A through_s = numbers[DEVIATION] < A(1e-6) ? 0 : ds / count;
    for (int i = thread; i < pixels; i += threads) {
        A dd = 0;
        if (is_valid(residual[i])) dd = direct(i) + sign(static_cast<A>(prediction[i]) - numbers[MEDIAN]) * through_s;
        if (i == pixels - counts[FIRST]) dd += dt - static_cast<A>(balance) * through_s;
        dprediction[i] = static_cast<T>(dd);
    }
}

// ---- Rung 2 -----------------------------------------------------------------------------------------------------------------
//
// The gradient needs two sums over all dR_i: of dR_i itself and of dR_i (d_i - t). The two ends of a difference have opposite
// gradients, which leaves of the first sum the signs of the kept pixels, and of the second sign(dR) dd for each difference: both
// come with the loss. So the backward pass reads R and the prediction, and writes, once.

template <typename T>
__global__ void __launch_bounds__(512, 2)
    depth_loss_backward(const T* __restrict__ prediction, const Accumulator<T>* __restrict__ residual,
                        const Accumulator<T>* __restrict__ numbers, const int* __restrict__ counts,
                        const Accumulator<T>* __restrict__ dloss, T* __restrict__ dprediction, int images, int height, int width,
                        int chunk, int chunks, int scales, double weight) {
    using A = Accumulator<T>;
    __shared__ A shares[COUNTS];
    const Chunk here = this_chunk(height * width, chunk, chunks);
    const long long offset = static_cast<long long>(here.image) * height * width;
    prediction += offset, residual += offset, dprediction += offset;
    numbers += here.image * NUMBERS, counts += here.image * COUNTS;
    set_shares(shares, counts, scales, weight);

    const A mean = numbers[DEVIATION], median = numbers[MEDIAN], threshold = numbers[THRESHOLD];
    const A valid = static_cast<A>(max(counts[VALID], 1)), trimmed_share = 1 / (2 * valid);
    const A through_r = *dloss / static_cast<A>(images) / clamped(mean);  // dd per unit of dR
    const A through_s = mean < A(1e-6) ? 0 : -through_r * numbers[PULL] / clamped(mean) / valid;
    const A through_t = -through_r * static_cast<A>(counts[SIGNS]) * trimmed_share - static_cast<A>(counts[BALANCE]) * through_s;
    const int limit = counts[LIMIT], first = height * width - counts[FIRST];

    const int down = static_cast<int>(blockDim.x) / width, right = static_cast<int>(blockDim.x) % width;
    unsigned i = here.begin + threadIdx.x;
    for (int y = static_cast<int>(i / width), x = static_cast<int>(i % width); i < here.end; i += blockDim.x) {
        const A r = residual[i];
        A dd = 0;
        if (is_valid(r)) {
            const bool kept = is_kept(r, static_cast<int>(i), threshold, limit);
            dd = through_r * residual_gradient(residual, x, y, height, width, kept, trimmed_share, shares, scales);
            dd += sign(static_cast<A>(prediction[i]) - median) * through_s;
            if (static_cast<int>(i) == first) dd += through_t;
        }
        dprediction[i] = static_cast<T>(dd);
        x += right, y += down;
        if (x >= width) x -= width, ++y;
    }
}
