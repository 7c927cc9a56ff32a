// AVX-512 F, BW, DQ, VL (Skylake-SP and later).
#include <immintrin.h>

#include "kernels.h"
#include "unroll.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // inside gcc 12's own header
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

namespace elsa {
namespace {

constexpr std::size_t kLanes = 16;
constexpr std::uint32_t kLaneMask = 0xffffu;
constexpr int kMostTokens = 4;     // 16 sums, 4 weights, activations from memory: 32 registers
constexpr int kBlockTokens = 6;    // 24 sums, 4 weights, 1 activation
constexpr bool kWideTile = true;

using F = __m512;
using I = __m512i;

inline F zero_f() { return _mm512_setzero_ps(); }
inline I zero_i() { return _mm512_setzero_si512(); }
inline F load_f(const float* at) { return _mm512_loadu_ps(at); }
inline void store_f(float* at, F value) { _mm512_storeu_ps(at, value); }
inline F set_f(float value) { return _mm512_set1_ps(value); }
inline F add_f(F a, F b) { return _mm512_add_ps(a, b); }
inline F fma_f(F a, F b, F sum) { return _mm512_fmadd_ps(a, b, sum); }
inline float sum_f(F value) { return _mm512_reduce_add_ps(value); }
inline I load_i(const std::int32_t* at) { return _mm512_loadu_si512(at); }
inline I add_i(I a, I b) { return _mm512_add_epi32(a, b); }
inline I dot_i(I a, I b) { return _mm512_madd_epi16(a, b); }
inline std::int32_t sum_i(I value) { return _mm512_reduce_add_epi32(value); }
inline F to_f(I value) { return _mm512_cvtepi32_ps(value); }
inline F gather_f(const float* at, I columns) { return _mm512_i32gather_ps(columns, at, 4); }
inline I gather_i(const std::int32_t* at, I columns) {
    return _mm512_i32gather_epi32(columns, at, 4);
}
inline __m128i load_16(const std::uint8_t* at) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
}
inline __m256i load_32(const std::uint8_t* at) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
}
inline I widen_u8(const std::uint8_t* at) { return _mm512_cvtepu8_epi32(load_16(at)); }
inline I values_i(const std::uint8_t* at) { return _mm512_cvtepi8_epi32(load_16(at)); }

template <Type type>
inline F values_f(const std::uint8_t* at) {
    if constexpr (type == Type::f32) {
        return _mm512_loadu_ps(at);
    } else if constexpr (type == Type::bf16) {
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_32(at)), 16));
    } else if constexpr (type == Type::f16) {
        return _mm512_cvtph_ps(load_32(at));
    } else {
        return _mm512_cvtepi32_ps(values_i(at));
    }
}

// In place, by hand: Zen 4 waits for the old contents of the destination although they are zeroed,
// and compilers use one destination again and again or expand straight from memory, which is the
// same. 7 cycles an expansion then, instead of 2 (measured November 2026).
template <Type type>
inline F expand_f(const std::uint8_t* at, std::uint32_t mask) {
    F values = values_f<type>(at);
    __asm__("vexpandps %0, %0%{%1%}%{z%}" : "+v"(values) : "Yk"(static_cast<__mmask16>(mask)));
    return values;
}

inline I expand_i(const std::uint8_t* at, std::uint32_t mask) {
    I values = values_i(at);
    __asm__("vpexpandd %0, %0%{%1%}%{z%}" : "+v"(values) : "Yk"(static_cast<__mmask16>(mask)));
    return values;
}
inline void columns_of(std::uint32_t mask, std::uint32_t base, std::uint32_t* to) {
    const I lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const I offsets = _mm512_add_epi32(_mm512_slli_epi32(lanes, 6),
                                       _mm512_set1_epi32(static_cast<int>(base)));
    static_assert(kTile == 64, "the shift above");
    _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(static_cast<__mmask16>(mask), offsets));
}

// 16 x 16: pairs of rows, then pairs of pairs, then the four quarters of 128 bits, twice.
inline void transpose_block(const float* from, std::size_t from_stride, float* to,
                            std::size_t to_stride) {
    F a[16], b[16];
    for (std::size_t i = 0; i < 16; ++i) a[i] = load_f(from + i * from_stride);
    for (std::size_t i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
    }
    for (std::size_t i = 0; i < 16; i += 4) {
        const auto pair = [&](std::size_t x, std::size_t y, bool high) {
            const __m512d left = _mm512_castps_pd(b[x]), right = _mm512_castps_pd(b[y]);
            return _mm512_castpd_ps(high ? _mm512_unpackhi_pd(left, right)
                                         : _mm512_unpacklo_pd(left, right));
        };
        a[i] = pair(i, i + 2, false);
        a[i + 1] = pair(i, i + 2, true);
        a[i + 2] = pair(i + 1, i + 3, false);
        a[i + 3] = pair(i + 1, i + 3, true);
    }
    for (std::size_t i = 0; i < 4; ++i) {
        b[i] = _mm512_shuffle_f32x4(a[i], a[i + 4], 0x88);
        b[i + 4] = _mm512_shuffle_f32x4(a[i], a[i + 4], 0xdd);
        b[i + 8] = _mm512_shuffle_f32x4(a[i + 8], a[i + 12], 0x88);
        b[i + 12] = _mm512_shuffle_f32x4(a[i + 8], a[i + 12], 0xdd);
    }
    for (std::size_t i = 0; i < 8; ++i) {
        const std::size_t low = i, high = i + 8;
        const F even = _mm512_shuffle_f32x4(b[low], b[high], 0x88);
        const F odd = _mm512_shuffle_f32x4(b[low], b[high], 0xdd);
        store_f(to + i * to_stride, even);
        store_f(to + (i + 8) * to_stride, odd);
    }
}

#include "kernels_vector.inc"

}  // namespace

void add_avx512(Kernels& table) { add_vector_kernels(table); }

}  // namespace elsa
