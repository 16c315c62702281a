// The confusion matrix of segmentation (Section 5.2), from which pixel accuracy and mean intersection over union come:
//
//     counts[k][l] = how many pixels of class k are predicted to be of class l        labels and predictions (pixels), K classes
//
// A pixel labelled `ignore_index` does not count. One whose label, or whose prediction, is no class does not either, but is told
// of: wrong[0] becomes the first pixel whose label is none, wrong[1] the first whose prediction is none. Whole numbers are added,
// so the counts do not depend on the order of the threads.
//
// Rung 1 (naive): one thread per pixel adds one to a counter in memory. Segmentation maps are made of large regions: many
// threads at a time want the same counter, and there they wait for each other.
#include "element.cuh"
#include "labels.cuh"

constexpr int LANES = 32;
constexpr unsigned ALL = 0xffffffffu;

// The counter of a pixel, k * K + l, or -1.
__device__ inline int counter_of(const void* labels, const void* predictions, int* wrong, int label_bytes, int prediction_bytes,
                                 int pixel, int classes, int ignore_index) {
    const int label = label_at(labels, label_bytes, pixel);
    if (label == ignore_index) return -1;
    const int prediction = label_at(predictions, prediction_bytes, pixel);
    const bool label_is_none = label < 0 || label >= classes, prediction_is_none = prediction < 0 || prediction >= classes;
    if (label_is_none) atomicMin(&wrong[0], pixel);
    if (prediction_is_none) atomicMin(&wrong[1], pixel);
    return label_is_none || prediction_is_none ? -1 : label * classes + prediction;
}

__global__ void confusion_naive(unsigned long long* __restrict__ counts, const void* __restrict__ labels,
                                const void* __restrict__ predictions, int* __restrict__ wrong, int label_bytes,
                                int prediction_bytes, int pixels, int classes, int ignore_index) {
    const long long index = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (index >= pixels) return;
    const int pixel = static_cast<int>(index);
    const int counter = counter_of(labels, predictions, wrong, label_bytes, prediction_bytes, pixel, classes, ignore_index);
    if (counter >= 0) atomicAdd(&counts[counter], 1ull);
}

// How many lanes of the warp have this counter, in the first of them; 0 in the others, and where it is none. All 32 call it.
__device__ inline int first_of_equals(int counter) {
    const unsigned equals = __match_any_sync(ALL, counter);
    const int lane = static_cast<int>(threadIdx.x) % LANES;
    return counter >= 0 && __ffs(static_cast<int>(equals)) - 1 == lane ? __popc(equals) : 0;
}

// Rung 2 (matching): lanes that want the same counter find each other, and the first of them adds for all. The 32 neighbours of a
// warp lie in one or two regions most of the time: one or two additions instead of 32. It needs no memory of its own, so it
// serves any number of classes.
__global__ void confusion_matching(unsigned long long* __restrict__ counts, const void* __restrict__ labels,
                                   const void* __restrict__ predictions, int* __restrict__ wrong, int label_bytes,
                                   int prediction_bytes, int pixels, int classes, int ignore_index) {
    const long long index = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    int counter = -1;
    if (index < pixels) {
        const int pixel = static_cast<int>(index);
        counter = counter_of(labels, predictions, wrong, label_bytes, prediction_bytes, pixel, classes, ignore_index);
    }
    const int equals = first_of_equals(counter);
    if (equals > 0) atomicAdd(&counts[counter], static_cast<unsigned long long>(equals));
}

// Rung 3 (shared): a block counts its pixels in a table of its own, in shared memory, and adds what is not 0 to that in memory at
// the end. A large region, whose warps all want one counter, is then added to memory once per block instead of once per warp.
//
// K * K counters of 4 bytes would be 90 kB at ADE20K's 150 classes, more than a block of an older GPU can have. But a block
// that is given at most 65535 pixels counts no higher: two counters share a word, the even one in its lower half, and adding to
// one never carries into the other. 150 classes take 45 kB, which is there on every GPU and leaves room for more than one block.
__global__ void confusion_shared(unsigned long long* __restrict__ counts, const void* __restrict__ labels,
                                 const void* __restrict__ predictions, int* __restrict__ wrong, int label_bytes,
                                 int prediction_bytes, int pixels, int classes, int ignore_index, int block_pixels) {
    DYNAMIC_SHARED(unsigned, table);
    const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
    const int counters = classes * classes, words = (counters + 1) / 2;
    for (int word = thread; word < words; word += threads) table[word] = 0;
    __syncthreads();

    const int first = static_cast<int>(blockIdx.x) * block_pixels;
    const int here = min(block_pixels, pixels - first);
    for (int offset = 0; offset < here; offset += threads) {  // as often in every thread, for the warps to be whole
        int counter = -1;
        if (thread < here - offset) {
            const int pixel = first + offset + thread;
            counter = counter_of(labels, predictions, wrong, label_bytes, prediction_bytes, pixel, classes, ignore_index);
        }
        const unsigned equals = static_cast<unsigned>(first_of_equals(counter));
        if (equals > 0) atomicAdd(&table[counter / 2], counter % 2 == 0 ? equals : equals << 16);
    }
    __syncthreads();

    for (int counter = thread; counter < counters; counter += threads) {
        const unsigned counted = table[counter / 2] >> counter % 2 * 16 & 0xffffu;
        if (counted > 0) atomicAdd(&counts[counter], static_cast<unsigned long long>(counted));
    }
}
