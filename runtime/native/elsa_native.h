// C interface of libelsa_native. Python's face of it is runtime/kernels.py.
#pragma once

#include <cstdint>

#if defined(_WIN32)
#define ELSA_EXPORT __declspec(dllexport)
#else
#define ELSA_EXPORT __attribute__((visibility("default")))
#endif

// Raised whenever a function changes its meaning; kernels.py refuses another number.
#define ELSA_ABI_VERSION 1

#define ELSA_CPU_AVX2 (std::uint64_t{1} << 0)
#define ELSA_CPU_FMA (std::uint64_t{1} << 1)
#define ELSA_CPU_AVX512F (std::uint64_t{1} << 2)
#define ELSA_CPU_AVX512BW (std::uint64_t{1} << 3)
#define ELSA_CPU_AVX512VNNI (std::uint64_t{1} << 4)
#define ELSA_CPU_NEON (std::uint64_t{1} << 8)

extern "C" {

ELSA_EXPORT std::int32_t elsa_abi_version(void);

// Bits ELSA_CPU_*: what this processor and operating system can execute.
ELSA_EXPORT std::uint64_t elsa_cpu_features(void);

// Position of the first index that is out of [0, size) or not above the one before it; -1 if none.
// indices: count values, any alignment of 8 bytes.
ELSA_EXPORT std::int64_t elsa_check_coo_indices(const std::int64_t* indices, std::int64_t count,
                                                std::int64_t size);

}  // extern "C"
