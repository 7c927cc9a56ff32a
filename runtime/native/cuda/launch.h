// Starting kernels, on the GPU or in the emulation.
#pragma once

#include <stdexcept>
#include <string>

#include "gpu.h"

namespace elsa {
namespace cuda {

struct Grid {
    unsigned x = 1, y = 1;
};

#if defined(__CUDACC__)

inline void must(cudaError_t status, const char* what) {
    if (status == cudaSuccess) return;
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

template <class Arguments>
void launch(void (*kernel)(const Arguments), Grid grid, unsigned threads, std::size_t shared,
            Stream stream, const Arguments& arguments) {
    kernel<<<dim3(grid.x, grid.y), threads, shared, stream>>>(arguments);
    must(cudaGetLastError(), "a kernel cannot be started");
}

// More than 48 KB of shared memory must be asked for.
template <class Arguments>
void allow(void (*kernel)(const Arguments), std::size_t shared) {
    must(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              static_cast<int>(shared)),
         "shared memory");
}

#else

extern thread_local emulation::Order emulated_order;

template <class Arguments>
void launch(void (*kernel)(const Arguments), Grid grid, unsigned threads, std::size_t shared,
            Stream, const Arguments& arguments) {
    emulation::run({grid.x, grid.y, 1}, threads, shared, emulated_order,
                   [&] { kernel(arguments); });
}

template <class Arguments>
void allow(void (*)(const Arguments), std::size_t) {}

#endif

}  // namespace cuda
}  // namespace elsa
