// AVX-512 with VBMI, VBMI2 and VNNI (Ice Lake, Zen 4 and later): 64 int8 or 32 bfloat16 weights are
// expanded at once.
#include <immintrin.h>

#include "kernels.h"
#include "lanes.h"
#include "unroll.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // inside gcc 12's own header
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

namespace elsa {
namespace {

#include "avx512.inc"

#include "ahead.inc"

alignas(64) constexpr std::uint8_t kPlaces[64] = {
    0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21,
    22, 23, 24, 25, 26, 27, 28, 29, 30, 31, 32, 33, 34, 35, 36, 37, 38, 39, 40, 41, 42, 43,
    44, 45, 46, 47, 48, 49, 50, 51, 52, 53, 54, 55, 56, 57, 58, 59, 60, 61, 62, 63};

constexpr std::size_t kMostInTurn = 8;  // tokens; more take rows side by side

inline std::uint64_t mask_at(const std::uint8_t* masks, std::size_t index) {
    std::uint64_t mask;
    __builtin_memcpy(&mask, masks + index * 8, 8);
    return mask;
}

inline std::size_t count_bits(std::uint64_t mask) {
    return static_cast<std::size_t>(_mm_popcnt_u64(mask));
}

// gcc 12 copies the sum of the intrinsic around, before and after: 1.3 times the time of the loop.
inline void dot_u8(__m512i& sum, __m512i x, __m512i weights) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(x), "v"(weights));
}

// In place, by hand: Zen 4 waits for the old contents of the destination although they are zeroed,
// and compilers use one destination again and again or expand straight from memory, which is the
// same. 7 cycles an expansion then, instead of 2 (measured November 2026).
inline __m512i expand_8(const std::uint8_t* at, __mmask64 mask) {
    __m512i values = _mm512_loadu_si512(at);
    __asm__("vpexpandb %0, %0%{%1%}%{z%}" : "+v"(values) : "Yk"(mask));
    return values;
}

inline __m512i expand_16(const std::uint8_t* at, __mmask32 mask) {
    __m512i values = _mm512_loadu_si512(at);
    __asm__("vpexpandw %0, %0%{%1%}%{z%}" : "+v"(values) : "Yk"(mask));
    return values;
}

inline void finish(const Packed& w, const Output& out, std::size_t row, std::size_t token,
                   float value) {
    if (w.scales != nullptr) value *= w.scales[row];
    if (out.bias != nullptr) value += out.bias[row];
    out.y[token * out.stride + row] = value;
}

template <int kTokens>
inline void finish_group(const Packed& w, const Output& out, std::size_t g, std::size_t token,
                         const __m512 (&sums)[kGroupRows][kTokens]) {
    for (std::size_t r = 0; r < kGroupRows && g * kGroupRows + r < w.rows; ++r) {
        for (std::size_t m = 0; m < kTokens; ++m) {
            finish(w, out, g * kGroupRows + r, token + m, _mm512_reduce_add_ps(sums[r][m]));
        }
    }
}

// work(count, group, token) for groups [first, last) and all tokens: four at a time, then two, then one.
template <class Work>
inline void by_blocks(const Activations& a, std::size_t first, std::size_t last,
                      const Work& work) {
    for (std::size_t g = first; g < last; ++g) {
        std::size_t token = 0;
        for (; token + 4 <= a.tokens; token += 4) work(std::integral_constant<int, 4>{}, g, token);
        for (; token + 2 <= a.tokens; token += 2) work(std::integral_constant<int, 2>{}, g, token);
        if (token < a.tokens) work(std::integral_constant<int, 1>{}, g, token);
    }
}

template <int kTokens>
using Sums = __m512i[kGroupRows][kTokens];

template <int kTokens>
inline void add_chunks(const std::uint8_t* value, const std::uint8_t* x, std::size_t chunks,
                       std::size_t stride, Sums<kTokens>& high, Sums<kTokens>& low) {
    for (std::size_t c = 0; c < chunks; ++c, x += kChunk) {
        std::uint64_t masks[kGroupRows];
        each_of<kGroupRows>([&](auto r) ELSA_EACH { masks[r] = mask_at(value, r); });
        value += kMaskBytes;
        each_of<kGroupRows>([&](auto r) ELSA_EACH {
            if (kTokens > 1) ask(value + kAhead);
            const __m512i weights = expand_8(value, masks[r]);
            each_of<kTokens>([&](auto m) ELSA_EACH {
                const std::uint8_t* at = x + m * stride * 2;
                dot_u8(high[r][m], _mm512_loadu_si512(at), weights);
                dot_u8(low[r][m], _mm512_loadu_si512(at + stride), weights);
            });
            value += count_bits(masks[r]);
        });
    }
}

// Wraps around, as sums may.
inline __m128i sum_four(__m512i a, __m512i b, __m512i c, __m512i d) {
    const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
    const __m512i all =
        _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
    const __m256i half =
        _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
    return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

// vpdpbusd multiplies unsigned by signed bytes, so activations come as the high and the low byte of
// value + 32768, and 32768 times the row's sum of weights is taken off again. Sums may wrap around,
// the result does not: `levels` keeps it inside 32 bits.
inline void finish_four(const Packed& w, const Activations& a, const Output& out, std::size_t g,
                        std::size_t token, const __m512i (&both)[kGroupRows]) {
    const std::size_t row = g * kGroupRows;
    const auto there = static_cast<__mmask8>(row + 4 <= w.rows ? 15u : (1u << (w.rows - row)) - 1u);
    const __m128i shift = _mm_slli_epi32(_mm_maskz_loadu_epi32(there, w.sums + row), 15);
    const __m128i sums = _mm_sub_epi32(sum_four(both[0], both[1], both[2], both[3]), shift);
    __m128 result = _mm_mul_ps(_mm_cvtepi32_ps(sums), _mm_set1_ps(a.scales[token]));
    result = _mm_mul_ps(result, _mm_maskz_loadu_ps(there, w.scales + row));
    if (out.bias != nullptr) result = _mm_add_ps(result, _mm_maskz_loadu_ps(there, out.bias + row));
    _mm_mask_storeu_ps(out.y + token * out.stride + row, there, result);
}

inline __m512i both_planes(__m512i high, __m512i low) {
    return _mm512_add_epi32(_mm512_slli_epi32(high, 8), low);
}

template <int kTokens>
inline void s8_group(const Packed& w, const Activations& a, const Output& out, std::size_t g,
                     std::size_t token) {
    const std::uint8_t* x = a.shifted + token * a.stride * 2;
    Sums<kTokens> high, low;
    each_of<kGroupRows>([&](auto r) ELSA_EACH {
        each_of<kTokens>([&](auto m) ELSA_EACH { high[r][m] = low[r][m] = _mm512_setzero_si512(); });
    });
    add_chunks<kTokens>(w.stream + w.offsets[g], x, w.chunks, a.stride, high, low);
    each_of<kTokens>([&](auto m) ELSA_EACH {
        __m512i both[kGroupRows];
        each_of<kGroupRows>([&](auto r) ELSA_EACH { both[r] = both_planes(high[r][m], low[r][m]); });
        finish_four(w, a, out, g, token + m, both);
    });
}

void decode_s8(const Packed& w, const Activations& a, const Output& out, std::size_t first,
               std::size_t last) {
    for (std::size_t g = first; g < last; ++g) {
        std::size_t token = 0;
        for (; token + 3 <= a.tokens; token += 3) s8_group<3>(w, a, out, g, token);
        for (; token < a.tokens; ++token) s8_group<1>(w, a, out, g, token);
    }
}

// Four rows of Format::rows one after another (ahead.inc says why), or side by side: from the
// first cache they share the activations.
template <bool kInTurn, int kTokens>
inline void s8_rows(const Packed& w, const Activations& a, const Output& out, std::size_t g,
                    std::size_t token) {
    const std::size_t stride = w.chunks * kChunk;
    const std::uint8_t* value = w.stream + w.offsets[g];
    const std::uint8_t* x = a.shifted + token * a.stride * 2;
    __m512i both[kTokens][kGroupRows];
    constexpr int kRows = kInTurn ? 1 : kGroupRows;
    each_of<kGroupRows / kRows>([&](auto turn) ELSA_EACH {
        constexpr std::size_t first = turn * kRows;
        __m512i high[kRows][kTokens], low[kRows][kTokens];
        each_of<kRows>([&](auto r) ELSA_EACH {
            each_of<kTokens>([&](auto m) ELSA_EACH { high[r][m] = low[r][m] = _mm512_setzero_si512(); });
        });
        for (std::size_t k = 0; k < stride; k += kChunk) {
            each_of<kRows>([&](auto r) ELSA_EACH {
                const std::uint8_t* from = value + (first + r) * stride + k;
                if (kInTurn && kTokens > 1) ask(from + kAhead);
                const __m512i weights = _mm512_loadu_si512(from);
                each_of<kTokens>([&](auto m) ELSA_EACH {
                    const std::uint8_t* at = x + m * a.stride * 2 + k;
                    dot_u8(high[r][m], _mm512_loadu_si512(at), weights);
                    dot_u8(low[r][m], _mm512_loadu_si512(at + a.stride), weights);
                });
            });
        }
        each_of<kRows>([&](auto r) ELSA_EACH {
            each_of<kTokens>([&](auto m) ELSA_EACH {
                both[m][first + r] = both_planes(high[r][m], low[r][m]);
            });
        });
    });
    each_of<kTokens>([&](auto m) ELSA_EACH { finish_four(w, a, out, g, token + m, both[m]); });
}

void rows_s8(const Packed& w, const Activations& a, const Output& out, std::size_t first,
             std::size_t last) {
    for (std::size_t g = first; g < last; ++g) {
        std::size_t token = 0;
        if (a.tokens > kMostInTurn) {
            const std::uint8_t* next = w.stream + w.offsets[g + 1];
            for (std::size_t i = 0; i < kGroupRows * w.chunks; ++i) {
                ask(next + i * 64);
            }
            for (; token + 3 <= a.tokens; token += 3) s8_rows<false, 3>(w, a, out, g, token);
        }
        for (; token + 4 <= a.tokens; token += 4) s8_rows<true, 4>(w, a, out, g, token);
        for (; token + 2 <= a.tokens; token += 2) s8_rows<true, 2>(w, a, out, g, token);
        if (token < a.tokens) s8_rows<true, 1>(w, a, out, g, token);
    }
}

// 32 bfloat16 at once: the even ones shifted up and the odd ones masked are floats already.
struct Floats32 {
    __m512 even, odd;
    explicit Floats32(__m512i pairs)
        : even(_mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16))),
          odd(_mm512_castsi512_ps(
              _mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000u))))) {}
    __m512 times(const float* x, __m512 sum) const {
        sum = _mm512_fmadd_ps(even, _mm512_loadu_ps(x), sum);
        return _mm512_fmadd_ps(odd, _mm512_loadu_ps(x + 16), sum);
    }
};

template <int kTokens>
inline void bf16_group(const Packed& w, const Activations& a, const Output& out, std::size_t g,
                       std::size_t token) {
    const std::uint8_t* value = w.stream + w.offsets[g];
    const float* x = a.split + token * a.stride;
    __m512 sums[kGroupRows][kTokens];
    for (auto& row : sums) {
        for (auto& sum : row) sum = _mm512_setzero_ps();
    }
    for (std::size_t c = 0; c < w.chunks; ++c, x += kChunk) {
        std::uint64_t masks[kGroupRows];
        for (std::size_t r = 0; r < kGroupRows; ++r) masks[r] = mask_at(value, r);
        value += kMaskBytes;
        ELSA_UNROLL
        for (std::size_t r = 0; r < kGroupRows; ++r) {
            const std::uint64_t mask = masks[r];
            if (kTokens > 1) ask_row<2>(value + kAhead);
            ELSA_UNROLL
            for (std::size_t s = 0; s < kChunk; s += 32) {
                const std::size_t before = s == 0 ? 0 : count_bits(mask & 0xffffffffu);
                const Floats32 weights(
                    expand_16(value + before * 2, static_cast<__mmask32>(mask >> s)));
                ELSA_UNROLL
                for (int m = 0; m < kTokens; ++m) {
                    const float* at = x + static_cast<std::size_t>(m) * a.stride + s;
                    sums[r][m] = weights.times(at, sums[r][m]);
                }
            }
            value += count_bits(mask) * 2;
        }
    }
    finish_group(w, out, g, token, sums);
}

void decode_bf16(const Packed& w, const Activations& a, const Output& out, std::size_t first,
                 std::size_t last) {
    by_blocks(a, first, last, [&](auto count, std::size_t g, std::size_t token) ELSA_EACH {
        bf16_group<count>(w, a, out, g, token);
    });
}

// Four rows of Format::rows one after another, like rows_in_turn.
template <int kTokens>
inline void bf16_rows(const Packed& w, const Activations& a, const Output& out, std::size_t g,
                      std::size_t token) {
    const std::size_t columns = w.chunks * kChunk;
    const std::uint8_t* value = w.stream + w.offsets[g];
    const float* x = a.split + token * a.stride;
    __m512 sums[kGroupRows][kTokens];
    each_of<kGroupRows>([&](auto r) ELSA_EACH {
        __m512 sum[kTokens];
        each_of<kTokens>([&](auto m) ELSA_EACH { sum[m] = _mm512_setzero_ps(); });
        for (std::size_t k = 0; k < columns; k += 32, value += 64) {
            if (kTokens > 2) ask(value + kAhead);
            const Floats32 weights(_mm512_loadu_si512(value));
            each_of<kTokens>([&](auto m) ELSA_EACH {
                sum[m] = weights.times(x + m * a.stride + k, sum[m]);
            });
        }
        each_of<kTokens>([&](auto m) ELSA_EACH { sums[r][m] = sum[m]; });
    });
    finish_group(w, out, g, token, sums);
}

void rows_bf16(const Packed& w, const Activations& a, const Output& out, std::size_t first,
               std::size_t last) {
    by_blocks(a, first, last, [&](auto count, std::size_t g, std::size_t token) ELSA_EACH {
        bf16_rows<count>(w, a, out, g, token);
    });
}

// One compression for 64 columns. What is beyond the first 16 offsets is written where it is likely
// to be there, and else asked for: stores are the slow half.
template <bool few>
inline void offsets_of(std::uint64_t mask, std::size_t count, int shift, std::uint32_t base,
                       std::uint16_t* to) {
    const I places = _mm512_maskz_compress_epi8(mask, _mm512_load_si512(kPlaces));
    const __m128i by = _mm_cvtsi32_si128(shift);
    const I start = _mm512_set1_epi16(static_cast<short>(base));
    const auto offsets = [&](__m256i half) {
        return _mm512_add_epi16(_mm512_sll_epi16(_mm512_cvtepu8_epi16(half), by), start);
    };
    const I low = offsets(_mm512_castsi512_si256(places));
    if (few) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_castsi512_si256(low));
        if (count <= 16) return;
    }
    _mm512_storeu_si512(to, low);
    if (few && count <= 32) return;
    _mm512_storeu_si512(to + 32, offsets(_mm512_extracti64x4_epi64(places, 1)));
}

#include "lists.inc"

#include "lanes.inc"

}  // namespace

void add_avx512vnni(Kernels& table) {
    table.bitmap[static_cast<int>(Kind::s8_by_s16)] = decode_s8;
    table.bitmap[static_cast<int>(Kind::bf16)] = decode_bf16;
    table.rows[static_cast<int>(Kind::s8_by_s16)] = rows_s8;
    table.rows[static_cast<int>(Kind::bf16)] = rows_bf16;
    table.lanes[static_cast<int>(Kind::s8_by_s16)] = decode_lanes<IntegerLanes>;
    table.lanes[static_cast<int>(Kind::f32)] = decode_lanes<FloatLanes<Type::f32>>;
    table.lanes[static_cast<int>(Kind::bf16)] = decode_lanes<FloatLanes<Type::bf16>>;
    table.lanes[static_cast<int>(Kind::f16)] = decode_lanes<FloatLanes<Type::f16>>;
    table.split_bytes = split_bytes;
    add_list_kernels(table);
    table.wants_shifted = true;
    table.wants_split = true;
}

}  // namespace elsa
