// Plain C++: correct on every processor, and the second opinion on the vector kernels.
#include <cstring>
#include <vector>

#include "half.h"
#include "kernels.h"

namespace elsa {
namespace {

inline std::size_t lowest_bit(std::uint64_t mask) {
#if defined(__GNUC__) || defined(__clang__)
    return static_cast<std::size_t>(__builtin_ctzll(mask));
#else
    std::size_t bit = 0;
    for (; (mask & 1) == 0; mask >>= 1) ++bit;
    return bit;
#endif
}

inline std::uint64_t mask_at(const std::uint8_t* masks, std::size_t index) {
    std::uint64_t mask;
    std::memcpy(&mask, masks + index * 8, 8);
    return mask;
}

struct F32 {
    static constexpr std::size_t bytes = 4;
    static float load(const std::uint8_t* at) {
        float value;
        std::memcpy(&value, at, 4);
        return value;
    }
};
struct Bf16 {
    static constexpr std::size_t bytes = 2;
    static float load(const std::uint8_t* at) {
        std::uint16_t half;
        std::memcpy(&half, at, 2);
        return from_bf16(half);
    }
};
struct F16 {
    static constexpr std::size_t bytes = 2;
    static float load(const std::uint8_t* at) {
        std::uint16_t half;
        std::memcpy(&half, at, 2);
        return from_f16(half);
    }
};
struct S8 {
    static constexpr std::size_t bytes = 1;
    static float load(const std::uint8_t* at) {
        return static_cast<float>(static_cast<std::int8_t>(*at));
    }
};

// A weight times an activation, summed; of floats or of integers.
template <class Stored>
struct FloatSum {
    using Value = Stored;
    using Sum = float;
    static void add(Sum& sum, const std::uint8_t* value, const Activations& a, std::size_t at) {
        sum += Stored::load(value) * a.values[at];
    }
    static float scale(const Activations&, std::size_t) { return 1.0f; }
};
struct IntegerSum {
    using Value = S8;
    using Sum = std::int32_t;
    static void add(Sum& sum, const std::uint8_t* value, const Activations& a, std::size_t at) {
        sum += static_cast<std::int8_t>(*value) * static_cast<std::int16_t>(a.quantised[at]);
    }
    static float scale(const Activations& a, std::size_t token) { return a.scales[token]; }
};

inline void finish(const Packed& w, const Output& out, std::size_t row, std::size_t token,
                   float value) {
    if (w.scales != nullptr) value *= w.scales[row];
    if (out.bias != nullptr) value += out.bias[row];
    out.y[token * out.stride + row] = value;
}

template <class Math>
void decode_bitmap(const Packed& w, const Activations& a, const Output& out, std::size_t first,
                   std::size_t last) {
    using Value = typename Math::Value;
    for (std::size_t g = first; g < last; ++g) {
        for (std::size_t token = 0; token < a.tokens; ++token) {
            const std::uint8_t* value = w.stream + w.offsets[g];
            typename Math::Sum sums[kGroupRows] = {};
            for (std::size_t c = 0; c < w.chunks; ++c) {
                const std::size_t base = token * a.stride + c * kChunk;
                const std::uint8_t* masks = value;
                value += kMaskBytes;
                for (std::size_t r = 0; r < kGroupRows; ++r) {
                    std::uint64_t mask = mask_at(masks, r);
                    for (; mask != 0; mask &= mask - 1) {
                        Math::add(sums[r], value, a, base + lowest_bit(mask));
                        value += Value::bytes;
                    }
                }
            }
            for (std::size_t r = 0; r < kGroupRows && g * kGroupRows + r < w.rows; ++r) {
                finish(w, out, g * kGroupRows + r, token,
                       static_cast<float>(sums[r]) * Math::scale(a, token));
            }
        }
    }
}

template <class Math>
void decode_sliced(const Packed& w, const Activations& a, const Output& out, std::size_t first,
                   std::size_t last) {
    using Value = typename Math::Value;
    for (std::size_t s = first; s < last; ++s) {
        const std::size_t steps = w.steps[s];
        const std::uint8_t* deltas = w.stream + w.offsets[s];
        const std::uint8_t* values = deltas + round_up(steps * kSliceRows, kAlign);
        for (std::size_t token = 0; token < a.tokens; ++token) {
            typename Math::Sum sums[kSliceRows] = {};
            std::size_t columns[kSliceRows] = {};
            for (std::size_t i = 0; i < steps * kSliceRows; ++i) {
                std::size_t& column = columns[i % kSliceRows];
                column += deltas[i];
                Math::add(sums[i % kSliceRows], values + i * Value::bytes, a,
                          token * a.stride + column);
            }
            for (std::size_t r = 0; r < kSliceRows && s * kSliceRows + r < w.rows; ++r) {
                finish(w, out, w.order[s * kSliceRows + r], token,
                       static_cast<float>(sums[r]) * Math::scale(a, token));
            }
        }
    }
}

template <class Math>
void decode_rows(const Packed& w, const Activations& a, const Output& out, std::size_t first,
                 std::size_t last) {
    using Value = typename Math::Value;
    for (std::size_t n = first * kGroupRows; n < last * kGroupRows && n < w.rows; ++n) {
        const std::uint8_t* value = w.stream + n * w.chunks * kChunk * Value::bytes;
        for (std::size_t token = 0; token < a.tokens; ++token) {
            typename Math::Sum sum = 0;
            for (std::size_t k = 0; k < w.columns; ++k) {
                Math::add(sum, value + k * Value::bytes, a, token * a.stride + k);
            }
            finish(w, out, n, token, static_cast<float>(sum) * Math::scale(a, token));
        }
    }
}

template <class Stored>
void widen(const Packed& w, std::size_t group, float* rows) {
    if (w.format == Format::rows) {
        const std::uint8_t* value = w.stream + w.offsets[group];
        for (std::size_t i = 0; i < kGroupRows * w.chunks * kChunk; ++i) {
            rows[i] = Stored::load(value + i * Stored::bytes);
        }
        return;
    }
    const std::uint8_t* value = w.stream + w.offsets[group];
    const std::size_t stride = w.chunks * kChunk;
    std::memset(rows, 0, kGroupRows * stride * sizeof(float));
    for (std::size_t c = 0; c < w.chunks; ++c) {
        const std::uint8_t* masks = value;
        value += kMaskBytes;
        for (std::size_t r = 0; r < kGroupRows; ++r) {
            float* row = rows + r * stride + c * kChunk;
            for (std::uint64_t mask = mask_at(masks, r); mask != 0; mask &= mask - 1) {
                row[lowest_bit(mask)] = Stored::load(value);
                value += Stored::bytes;
            }
        }
    }
}

void four_rows(const float* rows, const float* x, std::size_t columns, std::size_t tokens,
               float* sums, bool) {
    constexpr std::size_t kLanes = 8;  // sums side by side, for the compiler to make vectors of
    for (std::size_t m = 0; m < tokens; ++m) {
        for (std::size_t r = 0; r < kGroupRows; ++r) {
            const float *weights = rows + r * columns, *activations = x + m * columns;
            float part[kLanes] = {};
            for (std::size_t k = 0; k < columns; k += kLanes) {
                for (std::size_t i = 0; i < kLanes; ++i) {
                    part[i] += weights[k + i] * activations[k + i];
                }
            }
            float sum = 0.0f;
            for (const float each : part) sum += each;
            sums[m * kGroupRows + r] = sum;
        }
    }
}

template <class Stored>
void list_bitmap(const Packed& w, std::size_t first, std::size_t last, WorkList& list) {
    std::uint32_t at = 0;
    struct Place {
        std::uint64_t mask;
        const std::uint8_t* value;
    };
    std::vector<Place> places;  // of each chunk and row
    for (std::size_t g = first; g < last; ++g) {
        const std::uint8_t* value = w.stream + w.offsets[g];
        places.clear();
        for (std::size_t c = 0; c < w.chunks; ++c) {
            const std::uint8_t* masks = value;
            value += kMaskBytes;
            for (std::size_t r = 0; r < kGroupRows; ++r) {
                places.push_back({mask_at(masks, r), value});
                for (std::uint64_t mask = mask_at(masks, r); mask != 0; mask &= mask - 1) {
                    value += Stored::bytes;
                }
            }
        }
        for (std::size_t i = 0; i < list.cuts * kGroupRows; ++i) {
            const std::size_t row = i % kGroupRows, start = i / kGroupRows * list.cut_chunks;
            const std::uint32_t begin = at;
            for (std::size_t c = start; c < w.chunks && c < start + list.cut_chunks; ++c) {
                std::uint64_t mask = places[c * kGroupRows + row].mask;
                const std::uint8_t* from = places[c * kGroupRows + row].value;
                for (; mask != 0; mask &= mask - 1, from += Stored::bytes) {
                    const std::size_t column = (c - start) * kChunk + lowest_bit(mask);
                    list.offset[at] = static_cast<std::uint16_t>(column * list.width);
                    list.value[at++] = Stored::load(from);
                }
            }
            const std::size_t of_list = (g - first) * kGroupRows + row;
            list.pieces[i / kGroupRows * list.rows + of_list] = {
                list.value + begin, list.offset + begin, at - begin};
        }
    }
}

void tile(const WorkList& list, const Piece* pieces, bool begin, const float* xt, float* yt,
          std::size_t eights) {
    const std::size_t tokens = eights * 8;
    for (std::size_t r = 0; r < list.rows; ++r) {
        const Piece& piece = pieces[r];
        float* sums = yt + r * list.width;
        if (begin) std::memset(sums, 0, tokens * sizeof(float));
        for (std::size_t i = 0; i < piece.count; ++i) {
            const float value = piece.value[i];
            const float* x = xt + piece.offset[i];
            for (std::size_t t = 0; t < tokens; ++t) sums[t] += value * x[t];
        }
    }
}

template <class Stored>
void list_slice(const Packed& w, std::size_t s, std::size_t width, std::uint32_t* offset,
                float* value) {
    const std::size_t count = w.steps[s] * kSliceRows;
    const std::uint8_t* delta = w.stream + w.offsets[s];
    const std::uint8_t* from = delta + round_up(count, kAlign);
    std::size_t columns[kSliceRows] = {};
    for (std::size_t i = 0; i < count; ++i) {
        std::size_t& column = columns[i % kSliceRows];
        column += delta[i];
        offset[i] = static_cast<std::uint32_t>(column * width);
        value[i] = Stored::load(from + i * Stored::bytes);
    }
}

void slice_of(const std::uint32_t* offset, const float* value, std::size_t steps,
              const std::uint32_t* order, std::size_t rows, const float* xt, float* yt,
              std::size_t width) {
    for (std::size_t r = 0; r < rows; ++r) {
        float* sums = yt + order[r] * width;
        std::memset(sums, 0, width * sizeof(float));
        for (std::size_t i = r; i < steps * kSliceRows; i += kSliceRows) {
            for (std::size_t m = 0; m < width; ++m) sums[m] += value[i] * xt[offset[i] + m];
        }
    }
}

void transpose(const float* from, std::size_t from_stride, float* to, std::size_t to_stride,
               std::size_t rows, std::size_t columns) {
    for (std::size_t k = 0; k < columns; ++k) {
        for (std::size_t n = 0; n < rows; ++n) to[k * to_stride + n] = from[n * from_stride + k];
    }
}

#include "quantise.inc"
#include "moments.inc"
#include "rowwise.inc"

Kernels made() {
    Kernels table;
    table.quantise = quantise;
    add_row_kernels(table);
    table.adam_step = adam_step;
    table.bitmap[0] = decode_bitmap<FloatSum<F32>>;
    table.bitmap[1] = decode_bitmap<FloatSum<Bf16>>;
    table.bitmap[2] = decode_bitmap<FloatSum<F16>>;
    table.bitmap[3] = decode_bitmap<FloatSum<S8>>;
    table.bitmap[4] = decode_bitmap<IntegerSum>;
    table.sliced[0] = decode_sliced<FloatSum<F32>>;
    table.sliced[1] = decode_sliced<FloatSum<Bf16>>;
    table.sliced[2] = decode_sliced<FloatSum<F16>>;
    table.sliced[3] = decode_sliced<FloatSum<S8>>;
    table.sliced[4] = decode_sliced<IntegerSum>;
    table.rows[0] = decode_rows<FloatSum<F32>>;
    table.rows[1] = decode_rows<FloatSum<Bf16>>;
    table.rows[2] = decode_rows<FloatSum<F16>>;
    table.rows[3] = decode_rows<FloatSum<S8>>;
    table.rows[4] = decode_rows<IntegerSum>;
    table.list_bitmap[0] = list_bitmap<F32>;
    table.list_bitmap[1] = list_bitmap<Bf16>;
    table.list_bitmap[2] = list_bitmap<F16>;
    table.list_bitmap[3] = list_bitmap<S8>;
    table.widen[0] = widen<F32>;
    table.widen[1] = widen<Bf16>;
    table.widen[2] = widen<F16>;
    table.widen[3] = widen<S8>;
    table.four_rows = four_rows;
    table.tile = tile;
    table.transpose = transpose;
    table.list_slice[0] = list_slice<F32>;
    table.list_slice[1] = list_slice<Bf16>;
    table.list_slice[2] = list_slice<F16>;
    table.list_slice[3] = list_slice<S8>;
    table.slice = slice_of;
    return table;
}

}  // namespace

const Kernels kPortable = made();

}  // namespace elsa
