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
inline void stream_f(float* at, F value) { _mm256_stream_ps(at, value); }
inline F max_f(F a, F b) { return _mm256_max_ps(a, b); }
inline void hold(F&) {}  // 16 registers are too few

// e^x for x <= 0 to 2e-7, relative; 0 below -87. NaN stays NaN.
inline F exp_f(F x) {
    const F cut = _mm256_max_ps(_mm256_set1_ps(-87.0f), x);
    const F whole = _mm256_round_ps(_mm256_mul_ps(cut, _mm256_set1_ps(1.44269504f)),
                                    _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    F r = _mm256_fnmadd_ps(whole, _mm256_set1_ps(0.693359375f), cut);
    r = _mm256_fmadd_ps(whole, _mm256_set1_ps(2.12194440e-4f), r);
    F sum = _mm256_set1_ps(1.0f / 720.0f);
    sum = _mm256_fmadd_ps(sum, r, _mm256_set1_ps(1.0f / 120.0f));
    sum = _mm256_fmadd_ps(sum, r, _mm256_set1_ps(1.0f / 24.0f));
    sum = _mm256_fmadd_ps(sum, r, _mm256_set1_ps(1.0f / 6.0f));
    sum = _mm256_fmadd_ps(sum, r, _mm256_set1_ps(0.5f));
    sum = _mm256_fmadd_ps(sum, r, _mm256_set1_ps(1.0f));
    sum = _mm256_fmadd_ps(sum, r, _mm256_set1_ps(1.0f));
    const I power = _mm256_slli_epi32(
        _mm256_add_epi32(_mm256_cvtps_epi32(whole), _mm256_set1_epi32(127)), 23);
    const F all = _mm256_mul_ps(sum, _mm256_castsi256_ps(power));
    return _mm256_andnot_ps(_mm256_cmp_ps(x, _mm256_set1_ps(-87.0f), _CMP_LT_OQ), all);
}
inline F set_f(float value) { return _mm256_set1_ps(value); }
inline F add_f(F a, F b) { return _mm256_add_ps(a, b); }
inline F fma_f(F a, F b, F sum) { return _mm256_fmadd_ps(a, b, sum); }
inline float sum_f(F value) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(value), _mm256_extractf128_ps(value, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline __m128 sum_four(F a, F b, F c, F d) {
    const F ab = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
    const F cd = _mm256_add_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
    const F all = _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee));
    return _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
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
inline I shift_i(I value, std::size_t width) {
    return _mm256_slli_epi32(value, width == 8 ? 3 : 4);
}
inline void store_i(std::uint32_t* at, I value) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), value);
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

template <bool few>
inline void offsets_of(std::uint64_t mask, std::size_t, int shift, std::uint32_t base,
                       std::uint16_t* to) {
    for (std::uint32_t s = 0; s < kChunk; s += 8) {
        const auto bits = static_cast<std::uint32_t>(mask >> s) & kLaneMask;
        const __m128i places = _mm_add_epi16(_mm_cvtepu8_epi16(load_8(kTables.set[bits])),
                                             _mm_set1_epi16(static_cast<short>(s)));
        const __m128i offsets = _mm_add_epi16(_mm_sll_epi16(places, _mm_cvtsi32_si128(shift)),
                                              _mm_set1_epi16(static_cast<short>(base)));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to), offsets);
        to += _mm_popcnt_u32(bits);
    }
}

#include "transpose_eight.inc"

inline void transpose_block(const float* from, std::size_t from_stride, float* to,
                            std::size_t to_stride) {
    transpose_eight(from, from_stride, to, to_stride);
}

struct Full;
using Eight = Full;  // never more than that left

#include "ahead.inc"
#include "kernels_vector.inc"

// 8 sums and 2 weights at once: of 16 registers.
void tile(const WorkList& list, const Piece* pieces, bool begin, const float* xt, float* yt,
          std::size_t eights) {
    for (; eights >= 4; eights -= 4, xt += 32, yt += 32) {
        tile_rows<Full, 4, 2>(list, pieces, begin, xt, yt);
    }
    switch (eights) {
        case 0: return;
        case 1: return tile_rows<Full, 1, 4>(list, pieces, begin, xt, yt);
        case 2: return tile_rows<Full, 2, 2>(list, pieces, begin, xt, yt);
        default: return tile_rows<Full, 3, 2>(list, pieces, begin, xt, yt);
    }
}

}  // namespace

void add_avx2(Kernels& table) {
    add_vector_kernels(table);
    table.tile = tile;
}

}  // namespace elsa
