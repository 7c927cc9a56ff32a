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

constexpr int kMostTokens = 4;     // 16 sums, 4 weights, activations from memory: 32 registers
constexpr int kBlockTokens = 6;    // 24 sums, 4 weights, 1 activation

#include "avx512.inc"

inline F zero_f() { return _mm512_setzero_ps(); }
inline I zero_i() { return _mm512_setzero_si512(); }
inline F load_f(const float* at) { return _mm512_loadu_ps(at); }
inline F set_f(float value) { return _mm512_set1_ps(value); }
inline F add_f(F a, F b) { return _mm512_add_ps(a, b); }
inline F fma_f(F a, F b, F sum) { return _mm512_fmadd_ps(a, b, sum); }
inline float sum_f(F value) { return _mm512_reduce_add_ps(value); }
inline __m128 sum_four(F a, F b, F c, F d) {
    const F ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    const F cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    const F all = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
    const __m256 half =
        _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}
inline I load_i(const std::int32_t* at) { return _mm512_loadu_si512(at); }
inline I add_i(I a, I b) { return _mm512_add_epi32(a, b); }
inline I dot_i(I a, I b) { return _mm512_madd_epi16(a, b); }
inline std::int32_t sum_i(I value) { return _mm512_reduce_add_epi32(value); }
inline I shift_i(I value, std::size_t width) {
    return _mm512_slli_epi32(value, width == 8 ? 3 : 4);
}
inline void store_i(std::uint32_t* at, I value) { _mm512_storeu_si512(at, value); }
inline F to_f(I value) { return _mm512_cvtepi32_ps(value); }
inline F gather_f(const float* at, I columns) { return _mm512_i32gather_ps(columns, at, 4); }
inline I gather_i(const std::int32_t* at, I columns) {
    return _mm512_i32gather_epi32(columns, at, 4);
}
inline I widen_u8(const std::uint8_t* at) { return _mm512_cvtepu8_epi32(load_16(at)); }

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
template <bool few>
inline void offsets_of(std::uint64_t mask, std::size_t, int shift, std::uint32_t base,
                       std::uint16_t* to) {
    const I lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    for (std::uint32_t s = 0; s < kChunk; s += 16) {
        const auto bits = static_cast<std::uint32_t>(mask >> s) & kLaneMask;
        const I places = _mm512_add_epi32(lanes, _mm512_set1_epi32(static_cast<int>(s)));
        const I offsets =
            _mm512_add_epi32(_mm512_sll_epi32(places, _mm_cvtsi32_si128(shift)),
                             _mm512_set1_epi32(static_cast<int>(base)));
        const I kept = _mm512_maskz_compress_epi32(static_cast<__mmask16>(bits), offsets);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(kept));
        to += _mm_popcnt_u32(bits);
    }
}

#include "transpose_eight.inc"

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

struct Eight {
    using V = __m256;
    static constexpr std::size_t lanes = 8;
    static V zero() { return _mm256_setzero_ps(); }
    static V set(float value) { return _mm256_set1_ps(value); }
    static V load(const float* at) { return _mm256_loadu_ps(at); }
    static void store(float* at, V value) { _mm256_storeu_ps(at, value); }
    static V add(V a, V b) { return _mm256_add_ps(a, b); }
    static V fma(V a, const float* b, V sum) { return _mm256_fmadd_ps(a, load(b), sum); }
};

#include "ahead.inc"
#include "kernels_vector.inc"

// 64 tokens. Loads are what Zen 4 waits for (one of 64 bytes a cycle), so four non-zeros share one
// load of their values and one of their offsets: 5.05 instead of 5.5 cycles each.
void tile_64(const WorkList& list, const Piece* pieces, bool begin, const float* xt, float* yt) {
    for (std::size_t p = 0; p < list.rows; ++p) {
        const Piece piece = pieces[p];
        float* y = yt + p * kTile;
        const std::uint16_t* offset = piece.offset;
        F even[4], odd[4];
        each_of<4>([&](auto v) ELSA_EACH {
            even[v] = begin ? zero_f() : load_f(y + v * kLanes);
            odd[v] = zero_f();
        });
        const auto add = [&](F weight, const float* x, F(&sum)[4]) ELSA_EACH {
            each_of<4>([&](auto v) ELSA_EACH {
                sum[v] = fma_f(weight, load_f(x + v * kLanes), sum[v]);
            });
        };
        std::size_t i = 0;
        for (; i + 4 <= piece.count; i += 4) {
            std::uint64_t four;
            __builtin_memcpy(&four, offset + i, sizeof(four));
            const F weights = _mm512_broadcast_f32x4(_mm_loadu_ps(piece.value + i));
            add(_mm512_permute_ps(weights, 0x00), xt + (four & 0xffff), even);
            add(_mm512_permute_ps(weights, 0x55), xt + (four >> 16 & 0xffff), odd);
            add(_mm512_permute_ps(weights, 0xaa), xt + (four >> 32 & 0xffff), even);
            add(_mm512_permute_ps(weights, 0xff), xt + (four >> 48), odd);
        }
        for (; i < piece.count; ++i) add(set_f(piece.value[i]), xt + offset[i], even);
        each_of<4>([&](auto v) ELSA_EACH { store_f(y + v * kLanes, add_f(even[v], odd[v])); });
    }
}

void tile(const WorkList& list, const Piece* pieces, bool begin, const float* xt, float* yt,
          std::size_t eights) {
    if (eights == 1) return tile_rows<Eight, 1, 4>(list, pieces, begin, xt, yt);
    switch ((eights + 1) / 2) {
        case 1: return tile_rows<Full, 1, 4>(list, pieces, begin, xt, yt);
        case 2: return tile_rows<Full, 2, 2>(list, pieces, begin, xt, yt);
        case 3: return tile_rows<Full, 3, 2>(list, pieces, begin, xt, yt);
        default: return tile_64(list, pieces, begin, xt, yt);
    }
}

}  // namespace

void add_avx512(Kernels& table) {
    add_vector_kernels(table);
    table.tile = tile;
}

}  // namespace elsa
