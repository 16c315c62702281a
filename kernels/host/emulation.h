// CUDA on the host: what a .cu file needs to be compiled by a C++ compiler, and `emulation::launch` to run its kernels.
//
// The indices are variables of the calling host thread, set before each thread of each block runs its kernel from
// beginning to end, so a kernel that waits for other threads of its block cannot run here. A launch takes what the CUDA
// driver takes: the extent of the grid and of a block, and one pointer per argument.
#pragma once

#include <cstddef>
#include <utility>

#define __global__
#define __device__

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};

inline thread_local dim3 gridDim, blockDim, blockIdx, threadIdx;

namespace emulation {

// Calls `step` for every index below `extent`, x fastest.
template <typename Step>
void each(dim3 extent, dim3& index, Step step) {
    for (index.z = 0; index.z < extent.z; ++index.z)
        for (index.y = 0; index.y < extent.y; ++index.y)
            for (index.x = 0; index.x < extent.x; ++index.x) step();
}

template <typename... Parameters, std::size_t... Position>
void run(void (*kernel)(Parameters...), dim3 grid, dim3 block, void** arguments, std::index_sequence<Position...>) {
    gridDim = grid;
    blockDim = block;
    each(grid, blockIdx, [&] {
        each(block, threadIdx, [&] { kernel(*static_cast<Parameters*>(arguments[Position])...); });
    });
}

template <typename... Parameters>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, void** arguments) {
    run(kernel, grid, block, arguments, std::index_sequence_for<Parameters...>{});
}

}  // namespace emulation
