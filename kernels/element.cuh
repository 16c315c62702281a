// The element types of the kernels: float, __half, __nv_bfloat16 and, on the host alone, double.
//
// A kernel is templated on the type T it reads and writes and computes in Accumulator<T>. Going from one to the other is
// an ordinary conversion, rounded to nearest even. On a GPU these two headers are CUDA's; on the host, those of host/.
#pragma once

#ifdef __CUDACC__
// Dynamic shared memory, its size given at the launch, as an array `name` of `type`.
#define DYNAMIC_SHARED(type, name)                                       \
    extern __shared__ __align__(16) unsigned char dynamic_shared_memory[]; \
    type* const name = reinterpret_cast<type*>(dynamic_shared_memory)
#else
#define DYNAMIC_SHARED(type, name) type* const name = reinterpret_cast<type*>(emulation::shared.data())
#endif

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
