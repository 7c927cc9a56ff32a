// Memory of the GPU, or of the host where it is emulated.
#include <cstdlib>
#include <cstring>
#include <new>

#include "launch.h"
#include "product.h"

namespace elsa {
namespace cuda {

#if defined(__CUDACC__)

Device Device::current() {
    int id = 0, multiprocessors = 0, shared = 0;
    must(cudaGetDevice(&id), "no GPU");
    must(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, id), "no GPU");
    must(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, id), "no GPU");
    return {static_cast<std::size_t>(multiprocessors), static_cast<std::size_t>(shared)};
}

void* allocate(std::size_t bytes) {
    void* memory = nullptr;
    must(cudaMalloc(&memory, bytes > 0 ? bytes : 1), "memory of the GPU");
    return memory;
}

void release(void* memory) noexcept { cudaFree(memory); }

void copy_in(void* to, const void* from, std::size_t bytes) {
    if (bytes == 0) return;
    must(cudaMemcpy(to, from, bytes, cudaMemcpyHostToDevice), "a copy to the GPU");
    // It may return before the bytes are there, and onnxruntime's streams do not wait for it.
    must(cudaStreamSynchronize(nullptr), "a copy to the GPU");
}

void copy_out(void* to, const void* from, std::size_t bytes) {
    if (bytes > 0) must(cudaMemcpy(to, from, bytes, cudaMemcpyDeviceToHost), "a copy from the GPU");
}

#else

thread_local emulation::Order emulated_order = emulation::Order::forward;

Device Device::current() { return {4, 96 * 1024}; }

// Exactly as much as was asked for, where the address sanitizer watches its ends.
void* allocate(std::size_t bytes) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 64, bytes) != 0) throw std::bad_alloc();
    return memory;
}

void release(void* memory) noexcept { std::free(memory); }

void copy_in(void* to, const void* from, std::size_t bytes) {
    if (bytes > 0) std::memcpy(to, from, bytes);
}

void copy_out(void* to, const void* from, std::size_t bytes) { copy_in(to, from, bytes); }

#endif

}  // namespace cuda
}  // namespace elsa
