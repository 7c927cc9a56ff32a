// Which kernels this processor can run, and which are taken.
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "elsa_native.h"
#include "kernels.h"

#if defined(__x86_64__) || defined(_M_X64)
#define ELSA_X86 1
#endif

namespace elsa {
namespace {

constexpr const char* kNames[] = {"portable", "avx2", "avx512", "avx512vnni"};

Kernels table_of(Isa isa) {
    Kernels table = kPortable;
#if defined(ELSA_HAVE_X86_KERNELS)
    if (isa >= Isa::avx2) add_avx2(table);
    if (isa >= Isa::avx512) add_avx512(table);
    if (isa >= Isa::avx512vnni) {
        add_avx512vnni(table);
    }
#endif
    table.isa = isa;
    return table;
}

}  // namespace

std::uint64_t cpu_features() {
    std::uint64_t found = 0;
#if defined(ELSA_X86) && (defined(__GNUC__) || defined(__clang__))
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2")) found |= ELSA_CPU_AVX2;
    if (__builtin_cpu_supports("fma")) found |= ELSA_CPU_FMA;
    if (__builtin_cpu_supports("avx512f")) found |= ELSA_CPU_AVX512F;
    if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq")) {
        found |= ELSA_CPU_AVX512BW;
    }
    if (__builtin_cpu_supports("avx512vnni")) found |= ELSA_CPU_AVX512VNNI;
    if (__builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2")) {
        found |= ELSA_CPU_AVX512VBMI2;
    }
#elif defined(__aarch64__)
    found |= ELSA_CPU_NEON;  // part of the base instruction set
#endif
    return found;
}

bool made_by_amd() {
#if defined(ELSA_HAVE_X86_KERNELS)
    __builtin_cpu_init();
    return __builtin_cpu_is("amd") != 0;
#else
    return false;
#endif
}

Isa best_isa() {
#if defined(ELSA_HAVE_X86_KERNELS)
    const std::uint64_t found = cpu_features();
    const auto has = [found](std::uint64_t wanted) { return (found & wanted) == wanted; };
    // Every processor with AVX2 has F16C too.
    if (!has(ELSA_CPU_AVX2 | ELSA_CPU_FMA)) return Isa::portable;
    if (!has(ELSA_CPU_AVX512F | ELSA_CPU_AVX512BW)) return Isa::avx2;
    if (!has(ELSA_CPU_AVX512VNNI | ELSA_CPU_AVX512VBMI2)) return Isa::avx512;
    return Isa::avx512vnni;
#else
    return Isa::portable;
#endif
}

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

Isa isa_by_name(const char* name) {
    if (name == nullptr || *name == '\0') name = std::getenv("ELSA_ISA");
    if (name == nullptr || *name == '\0') return best_isa();
    for (int i = 0; i < 4; ++i) {
        if (std::string(name) != kNames[i]) continue;
        const Isa isa = static_cast<Isa>(i);
        if (isa > best_isa()) {
            throw std::invalid_argument(std::string("instruction set ") + name +
                                        " is not available here, the best is " +
                                        isa_name(best_isa()));
        }
        return isa;
    }
    throw std::invalid_argument(std::string("instruction set '") + name +
                                "' is unknown, wanted portable, avx2, avx512 or avx512vnni");
}

const Kernels& kernels_for(Isa isa) {
    // Even filling a table runs code that was compiled for its instruction set.
    struct Tables {
        Kernels of[4];
        Tables() {
            for (int i = 0; i <= static_cast<int>(best_isa()); ++i) {
                of[i] = table_of(static_cast<Isa>(i));
            }
        }
    };
    static const Tables tables;
    if (isa > best_isa()) {
        throw std::invalid_argument(std::string("no ") + isa_name(isa) + " on this processor");
    }
    return tables.of[static_cast<int>(isa)];
}

std::size_t last_cache_bytes() {
    static const std::size_t bytes = [] {
        // Not sysconf: on AMD's processors it answers for a whole socket.
        std::size_t kib = 0;
        for (const char* file : {"/sys/devices/system/cpu/cpu0/cache/index3/size",
                                 "/sys/devices/system/cpu/cpu0/cache/index2/size"}) {
            std::FILE* opened = std::fopen(file, "r");
            if (opened == nullptr) continue;
            char unit = 'K';
            const int read = std::fscanf(opened, "%zu%c", &kib, &unit);
            std::fclose(opened);
            if (read == 2 && unit == 'M') kib *= 1024;
            if (read >= 1 && kib > 0) break;
        }
        return kib > 0 ? kib * 1024 : std::size_t{32} << 20;
    }();
    return bytes;
}

}  // namespace elsa
