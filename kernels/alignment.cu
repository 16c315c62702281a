// Alignment by least squares (Section 4; MiDaS, TPAMI 2020, Section 5): per image, the scale s and shift t that minimise
//
//     sum (s d + t - d*)^2        over the valid pixels; d the prediction, d* the target, both inverse depths
//
// The normal equations ask for the sums of d^2, d, 1, d d* and d*. Solved as they stand they cancel: of a map whose values are
// far from 0 compared with their spread, the determinant loses the digits twice over. So the same five numbers are kept centred,
//
//     count,  mean d,  mean d*,  variance = sum (d - mean d)^2,  covariance = sum (d - mean d) (d* - mean d*)
//
// with the means as distances from one of the pixels, so that a common offset costs them no digits either. Then s = covariance /
// variance, t = mean d* - s mean d, always in double, whatever T: a pixel brings a few operations to 9 bytes, or 5. Where the
// valid predictions are constant, to within 8 eps of the largest, no scale can be read off them: s = 0, t = mean d*. That verdict
// comes from the extreme values, which are exact, and in the precision of the accumulator, as the reference takes it. What stands
// at invalid pixels is never used. Nothing is added atomically: the order of each sum depends on the sizes alone.
//
// Least traffic: prediction, target and mask (a byte per pixel) once.
#include "vectors.cuh"

struct Moments {
    double count, origin, target_origin;  // values of one of the pixels, which the means are measured from
    double mean, target_mean, variance, covariance;
    double lowest, highest;  // of the prediction; the lowest is NaN where one of its values is
};

__device__ inline double lower_of(double a, double b) { return b < a || b != b ? b : a; }
__device__ inline double higher_of(double a, double b) { return b > a ? b : a; }

// The moments of two sets of pixels as one: the difference of their means brings what neither knows of the other's.
__device__ inline Moments merged(const Moments& a, const Moments& b) {
    if (b.count == 0) return a;
    if (a.count == 0) return b;
    const double count = a.count + b.count, part = b.count / count;
    const double apart = b.origin - a.origin + (b.mean - a.mean);
    const double target_apart = b.target_origin - a.target_origin + (b.target_mean - a.target_mean);
    return {count,
            a.origin,
            a.target_origin,
            a.mean + part * apart,
            a.target_mean + part * target_apart,
            a.variance + b.variance + apart * apart * part * a.count,
            a.covariance + b.covariance + apart * target_apart * part * a.count,
            lower_of(a.lowest, b.lowest),
            higher_of(a.highest, b.highest)};
}

// By how much the extreme values of constant maps may differ: relative to the largest, and where the square of a difference would
// underflow. 8 times the distance from 1 to the next number, and the root of the smallest normal number, of float and of double.
__device__ inline float constant_below(float largest) { return 9.5367431640625e-07f * largest + 1.0842021724855044e-19f; }
__device__ inline double constant_below(double largest) { return 1.7763568394002505e-15 * largest + 1.4916681462400413e-154; }

template <typename T>
__device__ void solve(const Moments& m, Accumulator<T>* scale, Accumulator<T>* shift, unsigned char* singular) {
    using A = Accumulator<T>;
    const A lowest = static_cast<A>(m.lowest), highest = static_cast<A>(m.highest);
    const bool constant = m.count == 0 || highest - lowest <= constant_below(-lowest > highest ? -lowest : highest);
    const double slope = constant ? 0 : m.covariance / m.variance;
    const double mean = m.origin + m.mean, target_mean = m.target_origin + m.target_mean;
    *scale = static_cast<A>(slope);
    *shift = static_cast<A>(constant ? target_mean : target_mean - slope * mean);
    *singular = constant;
}

// Rung 1 (naive): one thread per image goes through its pixels, each a set of one. A division per pixel, and a GPU that has
// thousands of threads works with as many as there are images.
template <typename T>
__global__ void least_squares_naive(const T* __restrict__ prediction, const T* __restrict__ target,
                                    const unsigned char* __restrict__ mask, Accumulator<T>* __restrict__ scale,
                                    Accumulator<T>* __restrict__ shift, unsigned char* __restrict__ singular, int images,
                                    int pixels) {
    const int image = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
    if (image >= images) return;
    Moments moments = {};
    for (int pixel = 0; pixel < pixels; ++pixel) {
        const long long at = static_cast<long long>(image) * pixels + pixel;
        if (!mask[at]) continue;
        const double d = static_cast<double>(static_cast<Accumulator<T>>(prediction[at]));
        const double aim = static_cast<double>(static_cast<Accumulator<T>>(target[at]));
        moments = merged(moments, {1, d, aim, 0, 0, 0, 0, d, d});
    }
    solve<T>(moments, scale + image, shift + image, singular + image);
}

// Rung 2 (tree): `parts` blocks per image, then one warp per image. A thread sums plainly what it reads, measured from the first
// valid pixel it meets: that takes the offset away, costs no division, and makes a subtraction of its few pixels' mean harmless.
// Threads are merged by shuffles within the warp, warps through shared memory, blocks by the second launch.
class Sums {
   public:
    __device__ void add(double d, double target) {
        if (count == 0) {
            origin = lowest = highest = d;
            target_origin = target;
        }
        const double x = d - origin, y = target - target_origin;
        ++count;
        sum += x;
        target_sum += y;
        square += x * x;
        product += x * y;
        lowest = lower_of(lowest, d);
        highest = higher_of(highest, d);
    }

    __device__ Moments moments() const {
        if (count == 0) return {};
        const double number = count, mean = sum / number, target_mean = target_sum / number;
        return {number, origin,  target_origin, mean, target_mean, square - sum * mean, product - sum * target_mean,
                lowest, highest};
    }

   private:
    int count = 0;
    double origin = 0, target_origin = 0, sum = 0, target_sum = 0, square = 0, product = 0, lowest = 0, highest = 0;
};

// The moments of the 32 lanes of a warp, in lane 0.
__device__ inline Moments merge_warp(Moments moments) {
    for (int distance = 16; distance > 0; distance /= 2) {
        const auto from = [distance](double value) { return __shfl_down_sync(0xffffffffu, value, distance); };
        const Moments other = {from(moments.count),       from(moments.origin),   from(moments.target_origin),
                               from(moments.mean),        from(moments.target_mean), from(moments.variance),
                               from(moments.covariance),  from(moments.lowest),   from(moments.highest)};
        moments = merged(moments, other);
    }
    return moments;
}

constexpr int THREADS = 256;

// BYTES is 16 where images begin at multiples of it in all three arrays, else 1. V pixels are read together, the mask's V bytes
// too.
template <typename T, int BYTES>
__global__ void __launch_bounds__(THREADS) least_squares_parts(const T* __restrict__ prediction, const T* __restrict__ target,
                                                               const unsigned char* __restrict__ mask, Moments* __restrict__ sums,
                                                               int parts, int pixels) {
    using A = Accumulator<T>;
    constexpr int V = lanes_of<T, BYTES>;
    const int thread = static_cast<int>(threadIdx.x), part = static_cast<int>(blockIdx.x) % parts;
    const long long image = static_cast<int>(blockIdx.x) / parts, begin = image * pixels;
    Sums own;
    for (int group = part * THREADS + thread; group < pixels / V; group += parts * THREADS) {
        const long long at = begin + static_cast<long long>(group) * V;
        const Vector<unsigned char, V> valid = load<V>(mask + at);
        const Vector<T, BYTES> d = load<BYTES>(prediction + at), aim = load<BYTES>(target + at);
        for (int v = 0; v < V; ++v)
            if (valid.lane[v]) {
                own.add(static_cast<double>(static_cast<A>(d.lane[v])), static_cast<double>(static_cast<A>(aim.lane[v])));
            }
    }
    __shared__ Moments warps[THREADS / 32];
    Moments moments = merge_warp(own.moments());
    if (thread % 32 == 0) warps[thread / 32] = moments;
    __syncthreads();
    if (thread >= 32) return;
    moments = merge_warp(thread < THREADS / 32 ? warps[thread] : Moments{});
    if (thread == 0) sums[blockIdx.x] = moments;
}

// One warp per image, of which each lane merges every 32nd part.
template <typename T>
__global__ void least_squares_solve(Accumulator<T>* __restrict__ scale, Accumulator<T>* __restrict__ shift,
                                    unsigned char* __restrict__ singular, const Moments* __restrict__ sums, int parts) {
    const int image = static_cast<int>(blockIdx.x);
    Moments moments = {};
    for (int part = static_cast<int>(threadIdx.x); part < parts; part += 32) {
        moments = merged(moments, sums[static_cast<long long>(image) * parts + part]);
    }
    moments = merge_warp(moments);
    if (threadIdx.x == 0) solve<T>(moments, scale + image, shift + image, singular + image);
}
