// What a kernel may use, twice: as nvcc has it, and emulated by a host compiler (emulation.h), so
// that the very same kernels are tested where there is no GPU.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__CUDACC__)

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define ELSA_KERNEL __global__ void
#define ELSA_PLAIN_KERNEL static __global__ void  // that is no template
#define ELSA_DEVICE __device__ __forceinline__
// At most `count` threads a block, and `blocks` of them at a time: what registers are shared among.
#define ELSA_THREADS(count, blocks) __launch_bounds__(count, blocks)
#define ELSA_UNROLL _Pragma("unroll")
#define ELSA_SHARED(name) extern __shared__ __align__(16) unsigned char name[]

namespace elsa {
namespace cuda {

using Stream = cudaStream_t;

ELSA_DEVICE void wait_for_block() { __syncthreads(); }

// Byte `index` of a word, in one instruction.
template <int index>
ELSA_DEVICE std::uint32_t byte_of(std::uint32_t word) {
    return __byte_perm(word, 0, 0x4440 | index);
}

ELSA_DEVICE float low_f16(std::uint32_t pair) {
    return __half2float(__ushort_as_half(static_cast<unsigned short>(pair & 0xffffu)));
}
ELSA_DEVICE float high_f16(std::uint32_t pair) {
    return __half2float(__ushort_as_half(static_cast<unsigned short>(pair >> 16)));
}
ELSA_DEVICE float float_bits(std::uint32_t bits) { return __uint_as_float(bits); }
ELSA_DEVICE float f16_bits(std::uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
ELSA_DEVICE std::uint16_t bits_f16(float value) {
    return __half_as_ushort(__float2half_rn(value));
}
ELSA_DEVICE std::uint16_t bits_bf16(float value) {
    return __bfloat16_as_ushort(__float2bfloat16_rn(value));
}
ELSA_DEVICE float fused(float a, float b, float c) { return fmaf(a, b, c); }

// Weights are read once: they must not push the activations out of the first cache.
ELSA_DEVICE uint4 read_once(const uint4* from) {
    uint4 read;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(read.x), "=r"(read.y), "=r"(read.z), "=r"(read.w)
                 : "l"(from));
    return read;
}
ELSA_DEVICE uint2 read_once(const uint2* from) {
    uint2 read;
    asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];"
                 : "=r"(read.x), "=r"(read.y)
                 : "l"(from));
    return read;
}
template <class T>
ELSA_DEVICE T read(const T* from) {
    return __ldg(from);
}
// Lanes at different packets share sectors, which the first cache then keeps for them.
template <bool once, class T>
ELSA_DEVICE T fetch(const T* from) {
    if constexpr (once) return read_once(from);
    return __ldg(from);
}

}  // namespace cuda
}  // namespace elsa

#else

#include <cmath>

#include "../half.h"
#include "emulation.h"

#define ELSA_KERNEL void
#define ELSA_PLAIN_KERNEL inline void
#define ELSA_DEVICE inline
#define ELSA_THREADS(count, blocks)
#define ELSA_UNROLL
#define ELSA_SHARED(name) unsigned char* name = ::elsa::cuda::emulation::shared_memory()

namespace elsa {
namespace cuda {

struct alignas(8) uint2 {
    std::uint32_t x, y;
};
struct alignas(16) uint4 {
    std::uint32_t x, y, z, w;
};
using Stream = void*;
using emulation::blockDim;
using emulation::blockIdx;
using emulation::gridDim;
using emulation::threadIdx;

inline void wait_for_block() { emulation::wait(); }

template <int index>
inline std::uint32_t byte_of(std::uint32_t word) {
    return word >> (8 * index) & 0xffu;
}
inline float low_f16(std::uint32_t pair) { return from_f16(static_cast<std::uint16_t>(pair)); }
inline float high_f16(std::uint32_t pair) {
    return from_f16(static_cast<std::uint16_t>(pair >> 16));
}
inline float float_bits(std::uint32_t bits) { return float_of(bits); }
inline float f16_bits(std::uint16_t bits) { return from_f16(bits); }
inline std::uint16_t bits_f16(float value) { return to_f16(value); }
inline std::uint16_t bits_bf16(float value) { return to_bf16(value); }
inline float fused(float a, float b, float c) { return std::fmaf(a, b, c); }

template <class T>
inline T read_once(const T* from) {
    return *from;
}
template <class T>
inline T read(const T* from) {
    return *from;
}
template <bool once, class T>
inline T fetch(const T* from) {
    return *from;
}

}  // namespace cuda
}  // namespace elsa

#endif
