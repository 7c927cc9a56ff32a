// AVX2, FMA and F16C (Haswell, Zen and later). There is no expansion instruction: a table of 256
// permutations stands in for it.
#include <immintrin.h>

#include "kernels.h"
#include "unroll.h"

namespace elsa {
namespace {

constexpr std::size_t kLanes = 8;
constexpr std::uint32_t kLaneMask = 0xffu;
constexpr int kMostTokens = 2;      // 8 sums, and 16 registers in all
constexpr int kBlockTokens = 3;     // 12 sums, 3 activations, weights from memory
constexpr bool kWideTile = false;   // 8 sums at once too

using F = __m256;
using I = __m256i;

// place[mask][lane]: which value goes to the lane, or 0x80 for none.
// set[mask][i]: the lane of the i-th set bit.
struct Tables {
    alignas(64) std::uint8_t place[256][8];
    alignas(64) std::uint8_t set[256][8];
};

constexpr Tables make_tables() {
    Tables tables{};
    for (int mask = 0; mask < 256; ++mask) {
        std::uint8_t next = 0;
        for (std::uint8_t lane = 0; lane < 8; ++lane) {
            const bool there = (mask >> lane & 1) != 0;
            tables.place[mask][lane] = there ? next : std::uint8_t{0x80};
            if (there) tables.set[mask][next++] = lane;
        }
    }
    return tables;
}
constexpr Tables kTables = make_tables();

inline F zero_f() { return _mm256_setzero_ps(); }
inline I zero_i() { return _mm256_setzero_si256(); }
inline F load_f(const float* at) { return _mm256_loadu_ps(at); }
inline void store_f(float* at, F value) { _mm256_storeu_ps(at, value); }
inline F set_f(float value) { return _mm256_set1_ps(value); }
inline F add_f(F a, F b) { return _mm256_add_ps(a, b); }
inline F fma_f(F a, F b, F sum) { return _mm256_fmadd_ps(a, b, sum); }
inline float sum_f(F value) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(value), _mm256_extractf128_ps(value, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline I load_i(const std::int32_t* at) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
}
inline I add_i(I a, I b) { return _mm256_add_epi32(a, b); }
inline I dot_i(I a, I b) { return _mm256_madd_epi16(a, b); }
inline std::int32_t sum_i(I value) {
    const __m128i four =
        _mm_add_epi32(_mm256_castsi256_si128(value), _mm256_extracti128_si256(value, 1));
    const __m128i two = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 0xb1)));
}
inline F to_f(I value) { return _mm256_cvtepi32_ps(value); }
inline F gather_f(const float* at, I columns) { return _mm256_i32gather_ps(at, columns, 4); }
inline I gather_i(const std::int32_t* at, I columns) {
    return _mm256_i32gather_epi32(at, columns, 4);
}
inline __m128i load_8(const std::uint8_t* at) {
    return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(at));
}
inline __m128i load_16(const std::uint8_t* at) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
}
inline I widen_u8(const std::uint8_t* at) { return _mm256_cvtepu8_epi32(load_8(at)); }
inline I values_i(const std::uint8_t* at) { return _mm256_cvtepi8_epi32(load_8(at)); }

template <Type type>
inline F values_f(const std::uint8_t* at) {
    if constexpr (type == Type::f32) {
        return _mm256_loadu_ps(reinterpret_cast<const float*>(at));
    } else if constexpr (type == Type::bf16) {
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_16(at)), 16));
    } else if constexpr (type == Type::f16) {
        return _mm256_cvtph_ps(load_16(at));
    } else {
        return _mm256_cvtepi32_ps(values_i(at));
    }
}

template <Type type>
inline F expand_f(const std::uint8_t* at, std::uint32_t mask) {
    const I place = _mm256_cvtepi8_epi32(load_8(kTables.place[mask]));
    const F moved = _mm256_permutevar8x32_ps(values_f<type>(at), place);
    // Lanes without a value have a negative place.
    return _mm256_blendv_ps(moved, zero_f(), _mm256_castsi256_ps(place));
}

inline I expand_i(const std::uint8_t* at, std::uint32_t mask) {
    const I place = _mm256_cvtepi8_epi32(load_8(kTables.place[mask]));
    const I moved = _mm256_permutevar8x32_epi32(values_i(at), place);
    return _mm256_castps_si256(
        _mm256_blendv_ps(_mm256_castsi256_ps(moved), zero_f(), _mm256_castsi256_ps(place)));
}

inline void columns_of(std::uint32_t mask, std::uint32_t base, std::uint32_t* to) {
    const I lanes = _mm256_cvtepu8_epi32(load_8(kTables.set[mask]));
    static_assert(kTile == 64, "the shift below");
    const I offsets =
        _mm256_add_epi32(_mm256_slli_epi32(lanes, 6), _mm256_set1_epi32(static_cast<int>(base)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), offsets);
}

// 8 x 8: pairs of rows, pairs of pairs, halves.
inline void transpose_block(const float* from, std::size_t from_stride, float* to,
                            std::size_t to_stride) {
    F a[8], b[8];
    for (std::size_t i = 0; i < 8; ++i) a[i] = load_f(from + i * from_stride);
    for (std::size_t i = 0; i < 8; i += 2) {
        b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
    }
    for (std::size_t i = 0; i < 8; i += 4) {
        a[i] = _mm256_shuffle_ps(b[i], b[i + 2], 0x44);
        a[i + 1] = _mm256_shuffle_ps(b[i], b[i + 2], 0xee);
        a[i + 2] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0x44);
        a[i + 3] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0xee);
    }
    for (std::size_t i = 0; i < 4; ++i) {
        store_f(to + i * to_stride, _mm256_permute2f128_ps(a[i], a[i + 4], 0x20));
        store_f(to + (i + 4) * to_stride, _mm256_permute2f128_ps(a[i], a[i + 4], 0x31));
    }
}

#include "kernels_vector.inc"

}  // namespace

void add_avx2(Kernels& table) { add_vector_kernels(table); }

}  // namespace elsa
