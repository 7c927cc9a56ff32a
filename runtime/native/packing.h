// What packing works on: the non-zeros of a weight, row after row, already in the stored type.
#pragma once

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

Owned pack_rows(std::size_t rows, std::size_t columns, Format format, Type type, const Rows& found);

}  // namespace elsa
