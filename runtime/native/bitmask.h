// A weight as the packed form of a model file holds it (docs/packed-format.md): one bit an entry,
// row after row and lowest bit first, and the values of the set bits behind the fill value.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "packed.h"

namespace elsa {

// Owns nothing.
struct Bitmask {
    const std::uint8_t* mask = nullptr;
    std::size_t mask_bytes = 0;
    const std::uint8_t* values = nullptr;  // count values, the first of which is the fill value
    std::size_t count = 0;
    std::size_t value_bytes = 0;           // of one: 1, 2, 4 or 8
    std::size_t rows = 0, columns = 0;     // columns: entries of a row
};

// Checks sizes and counts, whatever the bytes hold. Empty string, or what is wrong.
std::string validate(const Bitmask& weight);

// Whether the fill value is zero, and no value equals it: then the set bits are the non-zeros.
bool fills_with_zero(const Bitmask& weight);

// Position in `values` of the first value of each row: (rows + 1), the last one `count`.
std::vector<std::uint32_t> row_starts(const Bitmask& weight);

// Writes one row of columns values; start: that of the row in `row_starts`.
void read_row(const Bitmask& weight, std::size_t row, std::size_t start, std::uint8_t* out);

// The weight in a format of the kernels. Call after `validate`; fills_with_zero must hold.
// type: that of the values, or one that holds all of float32 values. scales: (rows) of s8, else null.
// Throws std::invalid_argument, std::bad_alloc.
Owned pack(const Bitmask& weight, Format format, Type type, const float* scales);

}  // namespace elsa
