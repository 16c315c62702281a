// Elements that lie side by side, moved together: a GPU moves up to 16 bytes per thread by one instruction, where their address
// is a multiple of that. Vector<T, 16> is such a piece; Vector<T, 1>, for where nothing is known of the address, is one element.
#pragma once

#include "element.cuh"

template <typename T, int BYTES>
constexpr int lanes_of = BYTES > static_cast<int>(sizeof(T)) ? BYTES / static_cast<int>(sizeof(T)) : 1;

template <typename T, int BYTES>
struct alignas(lanes_of<T, BYTES> * sizeof(T)) Vector {
    T lane[lanes_of<T, BYTES>];
};

template <int BYTES, typename T>
__device__ Vector<T, BYTES> load(const T* address) {
    return *reinterpret_cast<const Vector<T, BYTES>*>(address);
}

template <int BYTES, typename T>
__device__ void store(T* address, const Vector<T, BYTES>& value) {
    *reinterpret_cast<Vector<T, BYTES>*>(address) = value;
}
