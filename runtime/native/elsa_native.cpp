// The native library of elsa_compile.runtime. Plain C interface, see elsa_native.h.
#include "elsa_native.h"

#if defined(__x86_64__) || defined(_M_X64)
#define ELSA_X86 1
#endif

extern "C" {

std::int32_t elsa_abi_version(void) { return ELSA_ABI_VERSION; }

std::uint64_t elsa_cpu_features(void) {
    std::uint64_t found = 0;
#if defined(ELSA_X86) && (defined(__GNUC__) || defined(__clang__))
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2")) found |= ELSA_CPU_AVX2;
    if (__builtin_cpu_supports("fma")) found |= ELSA_CPU_FMA;
    if (__builtin_cpu_supports("avx512f")) found |= ELSA_CPU_AVX512F;
    if (__builtin_cpu_supports("avx512bw")) found |= ELSA_CPU_AVX512BW;
    if (__builtin_cpu_supports("avx512vnni")) found |= ELSA_CPU_AVX512VNNI;
#elif defined(__aarch64__)
    found |= ELSA_CPU_NEON;  // part of the base instruction set
#endif
    return found;
}

std::int64_t elsa_check_coo_indices(const std::int64_t* indices, std::int64_t count,
                                    std::int64_t size) {
    std::int64_t previous = -1;
    for (std::int64_t i = 0; i < count; ++i) {
        const std::int64_t index = indices[i];
        // Strictly increasing from -1 also excludes negative ones and duplicates.
        if (index <= previous || index >= size) return i;
        previous = index;
    }
    return -1;
}

}  // extern "C"
