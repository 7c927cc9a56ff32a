// What packing works on: the non-zeros of a weight, row after row, already in the stored type.
#pragma once

#include <cstring>
#include <vector>

#include "packed.h"

namespace elsa {

struct Entry {
    std::uint32_t column;
    std::uint32_t bits;  // the value as stored; not zero
};

struct Rows {
    std::vector<Entry> entries;
    std::vector<std::size_t> begin;  // (rows + 1)
    std::vector<float> scales;       // (rows), s8 only
    std::vector<std::int32_t> sums;
};

// Throws std::invalid_argument.
void check_shape(std::size_t rows, std::size_t columns, Type type);

// A value as stored, in the low bytes; zero when it is stored as zero. inverse_scale: of s8.
std::uint32_t encode(float value, Type type, float inverse_scale);

// Calls visit(row, column, value) with every non-zero of a group of a bitmap, columns of a row ascending.
template <class Visit>
void for_each_of_group(const Packed& bitmap, std::size_t group, const Visit& visit) {
    const std::size_t bytes = value_bytes(bitmap.type);
    const std::uint8_t* at = bitmap.stream + bitmap.offsets[group];
    for (std::size_t c = 0; c < bitmap.chunks; ++c) {
        std::uint64_t masks[kGroupRows];
        std::memcpy(masks, at, kMaskBytes);
        at += kMaskBytes;
        for (std::size_t r = 0; r < kGroupRows; ++r) {
            for (std::size_t k = c * kChunk; masks[r] != 0; masks[r] >>= 1, ++k) {
                if ((masks[r] & 1) == 0) continue;
                visit(group * kGroupRows + r, k, at);
                at += bytes;
            }
        }
    }
}

Owned pack_rows(std::size_t rows, std::size_t columns, Format format, Type type, const Rows& found);

}  // namespace elsa
