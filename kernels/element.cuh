// The element types of the kernels: float, __half, __nv_bfloat16 and, on the host alone, double.
//
// A kernel is templated on the type T it reads and writes and computes in Accumulator<T>. Going from one to the other is
// an ordinary conversion, rounded to nearest even. On a GPU these two headers are CUDA's; on the host, those of host/.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

template <typename T>
struct AccumulatorOf {
    using type = float;
};

template <>
struct AccumulatorOf<double> {
    using type = double;
};

template <typename T>
using Accumulator = typename AccumulatorOf<T>::type;
