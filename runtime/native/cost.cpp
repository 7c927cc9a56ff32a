#include "cost.h"

namespace elsa {
namespace {

// AVX-512 rows: one thread of an Emerald Rapids, 2048 x 2048, weights streamed from memory, medians
// of interleaved runs (November 2026). AVX2: the same machine, that instruction set forced; its
// sliced rows and all portable ones are estimates on the low side. tools/bench_kernels.py measures
// the same table on another machine.
constexpr CostRow kAvx512F32 = {{1.60, 2.45, 3.3, 3.4, 3.5}, {1.2, 2.0, 2.9, 5.9, 11.0}};
constexpr CostRow kAvx512Half = {{2.0, 3.0, 3.6, 3.8, 3.9}, {1.8, 2.9, 4.1, 8.6, 16.0}};
constexpr CostRow kVnniBf16 = {{2.9, 4.3, 5.2, 5.3, 5.4}, {1.8, 2.9, 4.1, 8.6, 16.0}};
constexpr CostRow kAvx512S8 = {{2.2, 2.8, 3.0, 3.2, 3.3}, {2.1, 3.3, 4.6, 8.2, 16.0}};
constexpr CostRow kVnniS8 = {{5.4, 7.7, 9.5, 11.6, 12.7}, {2.1, 3.3, 4.6, 8.2, 20.0}};
constexpr CostRow kAvx2F32 = {{1.4, 1.95, 2.2, 2.3, 2.35}, {1.0, 1.6, 2.2, 4.2, 8.0}};
constexpr CostRow kAvx2Half = {{1.6, 2.0, 2.3, 2.4, 2.4}, {1.2, 1.9, 2.5, 4.5, 8.5}};
// Zen 4, medians of 1536 x 576, 576 x 1536 and 2048 x 2048, one thread, December 2026; rows: the lower of
// 49152 x 576 and 2048 x 2048. Expansions and gathers cost it more than twice as much. Last: bitmaps with
// lanes, where there are any; without, bfloat16 from 90 % on and float16 at 80 % are estimates. float16 at 80 % was measured at 5.07; with that, 85 % would be expected to
// be slower than it is.
constexpr CostRow kZenF32 = {{2.45, 3.2, 3.31, 3.6, 3.63}, {0.84, 1.34, 1.93, 3.43, 6.33}, 1.34,
                             {2.45, 3.2, 4.6, 6.7, 10.7}};
constexpr CostRow kZenBf16 = {{3.79, 3.99, 4.3, 4.3, 4.3}, {0.86, 1.33, 1.92, 4.37, 7.13}, 2.78,
                              {3.79, 3.99, 6.3, 8.8, 12.6}};
constexpr CostRow kZenF16 = {{2.68, 2.87, 2.87, 2.87, 2.87}, {0.92, 1.49, 2.22, 3.98, 7.03}, 2.22,
                             {2.68, 4.7, 5.6, 9.2, 11.7}};
constexpr CostRow kZenS8 = {{7.15, 7.4, 7.6, 7.9, 8.2}, {0.88, 1.48, 2.0, 4.1, 6.85}, 5.0,
                            {7.15, 7.4, 8.8, 12.9, 13.9}};
// For processors of AMD with AVX2 alone: rows are those of a Zen 4 with AVX2 forced, the rest as above.
constexpr CostRow kAmdAvx2F32 = {{1.4, 1.95, 2.2, 2.3, 2.35}, {1.0, 1.6, 2.2, 4.2, 8.0}, 1.23};
constexpr CostRow kAmdAvx2Half = {{1.6, 2.0, 2.3, 2.4, 2.4}, {1.2, 1.9, 2.5, 4.5, 8.5}, 1.66};
constexpr CostRow kPlain = {{0.4, 0.6, 0.9, 1.6, 2.6}, {0.3, 0.5, 0.8, 1.6, 3.0}};

double interpolate(const double (&gains)[kCostPoints], double density) {
    if (density >= 0.5) {
        // Towards dense the time grows with the density; at density 1 it is that of 0.5 twice.
        return gains[0] * 0.5 / density;
    }
    for (int i = 1; i < kCostPoints; ++i) {
        const double left = 1.0 - kCostSparsity[i - 1], right = 1.0 - kCostSparsity[i];
        if (density < right && i + 1 < kCostPoints) continue;
        const double at = density < right ? 1.0 : (left - density) / (left - right);
        // Times, not gains, are close to linear in the density.
        return 1.0 / ((1.0 - at) / gains[i - 1] + at / gains[i]);
    }
    return gains[kCostPoints - 1];
}

const CostRow& zen_row(Type type) {
    switch (type) {
        case Type::f32: return kZenF32;
        case Type::bf16: return kZenBf16;
        case Type::f16: return kZenF16;
        case Type::s8: break;
    }
    return kZenS8;
}

}  // namespace

const CostRow& cost_row(Isa isa, Type type) {
    if (isa == Isa::avx512vnni && made_by_amd()) return zen_row(type);
    if (isa == Isa::avx2 && made_by_amd() && type != Type::s8) {
        return type == Type::f32 ? kAmdAvx2F32 : kAmdAvx2Half;
    }
    switch (isa) {
        case Isa::portable: return kPlain;
        case Isa::avx2: return type == Type::f32 ? kAvx2F32 : kAvx2Half;
        case Isa::avx512:
            return type == Type::f32 ? kAvx512F32 : type == Type::s8 ? kAvx512S8 : kAvx512Half;
        case Isa::avx512vnni: break;
    }
    switch (type) {
        case Type::f32: return kAvx512F32;
        case Type::bf16: return kVnniBf16;
        case Type::f16: return kAvx512Half;
        case Type::s8: break;
    }
    return kVnniS8;
}

Choice choose(std::uint64_t rows, std::uint64_t columns, std::uint64_t nonzeros, Type type, Isa isa,
              bool whole, bool lanes) {
    Choice choice;
    const std::uint64_t most = type == Type::s8 ? kMaxColumnsS8 : kMaxColumns;
    if (rows == 0 || columns == 0 || rows > kMaxRows || columns > most) return choice;
    if (rows * columns < kLeastElements) return choice;
    const double density =
        static_cast<double>(nonzeros) / (static_cast<double>(rows) * static_cast<double>(columns));
    const CostRow& row = cost_row(isa, type);
    const double bitmap = interpolate(lanes && row.lanes[0] > 0.0 ? row.lanes : row.bitmap, density);
    const double sliced = interpolate(row.sliced, density);
    // Of equals the bitmap: it is the faster one for several tokens.
    const bool take_sliced = sliced > 1.1 * bitmap;
    choice.format = take_sliced ? Format::sliced : Format::bitmap;
    choice.gain = take_sliced ? sliced : bitmap;
    const bool head = rows >= kLeastHeadRatio * columns && rows * columns >= kLeastHeadElements;
    const bool too_dense = type != Type::s8 && density > kMostDensity;
    if (whole && (type == Type::s8 || head) && row.rows > (too_dense ? 1.0 : 1.1 * choice.gain)) {
        choice.format = Format::rows;
        choice.gain = row.rows;
    } else if (too_dense) {
        choice.gain = 1.0;
        choice.prompts_lose = true;
        return choice;
    }
    choice.packed = choice.gain >= kLeastGain;
    return choice;
}

}  // namespace elsa
