// C interface of libelsa_native. Python's face of it is runtime/kernels.py.
//
// onnxruntime's plugin interface (CreateEpFactories, ReleaseEpFactory) is in provider.cpp.
#pragma once

#include <cstdint>

#if defined(_WIN32)
#define ELSA_EXPORT __declspec(dllexport)
#else
#define ELSA_EXPORT __attribute__((visibility("default")))
#endif

// Raised whenever a function changes its meaning; kernels.py refuses another number.
#define ELSA_ABI_VERSION 7

#define ELSA_CPU_AVX2 (std::uint64_t{1} << 0)
#define ELSA_CPU_FMA (std::uint64_t{1} << 1)
#define ELSA_CPU_AVX512F (std::uint64_t{1} << 2)
#define ELSA_CPU_AVX512BW (std::uint64_t{1} << 3)  // with DQ and VL
#define ELSA_CPU_AVX512VNNI (std::uint64_t{1} << 4)
#define ELSA_CPU_AVX512VBMI2 (std::uint64_t{1} << 5)  // and VBMI
#define ELSA_CPU_NEON (std::uint64_t{1} << 8)

// A packed weight: an own copy of its bytes (elsa_pack), or a view of the caller's (elsa_open).
typedef struct elsa_weight elsa_weight;

extern "C" {

ELSA_EXPORT std::int32_t elsa_abi_version(void);

// Bits ELSA_CPU_*: what this processor and operating system can execute.
ELSA_EXPORT std::uint64_t elsa_cpu_features(void);

// The instruction set that weights made now will use: "portable", "avx2", "avx512", "avx512vnni".
// The environment's ELSA_ISA, or else the best. Null when ELSA_ISA names none of this processor's.
ELSA_EXPORT const char* elsa_isa(void);

// Position of the first index that is out of [0, size) or not above the one before it; -1 if none.
// indices: count values, any alignment of 8 bytes.
ELSA_EXPORT std::int64_t elsa_check_coo_indices(const std::int64_t* indices, std::int64_t count,
                                                std::int64_t size);

// Packs a dense weight; element (n, k) is dense[n * row_stride + k * column_stride].
// format: 1 bitmap, 2 sliced. type: 0 float32, 1 bfloat16, 2 float16, 3 int8.
// scales: (rows) of int8, or null: a row's largest magnitude / 127.
// A bitmap with few non-zeros also gets lanes (docs/kernels.md), so does one that elsa_open views.
// Null on failure; then `message` says why.
ELSA_EXPORT elsa_weight* elsa_pack(const float* dense, std::int64_t rows, std::int64_t columns,
                                   std::int64_t row_stride, std::int64_t column_stride,
                                   std::int32_t format, std::int32_t type, const float* scales,
                                   char* message, std::uint64_t message_size);

// Checks packed bytes, which may hold anything, and keeps a view of them. They must lie at a
// multiple of 64 and stay until elsa_close. Null on failure; then `message` says why.
ELSA_EXPORT elsa_weight* elsa_open(const void* bytes, std::uint64_t size, char* message,
                                   std::uint64_t message_size);

ELSA_EXPORT void elsa_close(elsa_weight* weight);

// The packed bytes and their number.
ELSA_EXPORT const void* elsa_bytes(const elsa_weight* weight, std::uint64_t* size);

// what: 0 rows, 1 columns, 2 format, 3 type, 4 non-zeros, 5 instruction set (0 portable, ...), 6 bytes of
// the second form for few tokens (lanes; 0: there is none).
ELSA_EXPORT std::int64_t elsa_describe(const elsa_weight* weight, std::int32_t what);

// Writes rows * columns floats.
ELSA_EXPORT void elsa_unpack(const elsa_weight* weight, float* dense);

// y (tokens, rows) = x (tokens, columns) * W^T + bias (rows), which may be null. On one thread.
// rounded: 1 rounds x to integers of up to 16 bits on the path of few tokens (int8 weights only).
// 0, or 1 with `message`.
ELSA_EXPORT std::int32_t elsa_multiply(const elsa_weight* weight, const float* x,
                                       std::int64_t tokens, float* y, const float* bias,
                                       std::int32_t rounded, char* message,
                                       std::uint64_t message_size);

// The cost model: format 1, 2 or 3 for this weight, or 0 where onnxruntime's dense float32 product is
// as fast. whole: 0 for a weight that cannot be kept with all its values (3). gain: expected dense / packed time of one token, or null.
ELSA_EXPORT std::int32_t elsa_choose(std::int64_t rows, std::int64_t columns,
                                     std::int64_t nonzeros, std::int32_t type, std::int32_t whole,
                                     double* gain);

// What the last session that was opened with the execution provider does with each product of an
// activation and a constant weight: a JSON list of objects. Writes at most `size` bytes with the
// final zero; the number of bytes wanted, without it.
ELSA_EXPORT std::uint64_t elsa_claims(char* text, std::uint64_t size);

// The inputs of that session that are caches with room (the provider's option cache: shared): a JSON
// list of names, in the same way.
ELSA_EXPORT std::uint64_t elsa_shared_caches(char* text, std::uint64_t size);

// A step of Adam on `count` parameters, one behind the other, whose moments are one byte each: blocks of
// 256 share a scale (passes/adam.py). codes, scales and noise in [0, 1) are there for whole blocks.
// settings: 1 - beta1, beta2, 1 - beta2, eps, correction of the second moment's root, rate of the step.
// 0, or 1 where ELSA_ISA names no instruction set of this processor.
ELSA_EXPORT std::int32_t elsa_adam_step(float* weights, const float* gradients, std::int8_t* m,
                                        float* m_scales, std::uint8_t* v, float* v_scales,
                                        const float* noise, std::int64_t count,
                                        const float* settings);

}  // extern "C"
