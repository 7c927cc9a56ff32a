#include "bitmask.h"

#include <cmath>
#include <cstring>
#include <stdexcept>

#include "half.h"
#include "packing.h"

namespace elsa {
namespace {

// Positions in the list of values are 32 bits wide, here and in the files.
constexpr std::uint64_t kMaxEntries = std::uint64_t{1} << 31;

std::size_t ones(std::uint64_t word) {
    word -= word >> 1 & 0x5555555555555555u;
    word = (word & 0x3333333333333333u) + (word >> 2 & 0x3333333333333333u);
    word = (word + (word >> 4)) & 0x0f0f0f0f0f0f0f0fu;
    return static_cast<std::size_t>(word * 0x0101010101010101u >> 56);
}

// Up to 64 bits from bit `first` on, `count` of them; never reads behind the mask.
std::uint64_t bits_at(const Bitmask& weight, std::size_t first, std::size_t count) {
    const std::size_t byte = first / 8, shift = first % 8;
    const std::size_t there = weight.mask_bytes - byte;
    std::uint64_t word = 0;
    std::memcpy(&word, weight.mask + byte, there < 8 ? there : 8);
    word >>= shift;
    if (shift != 0 && there > 8) word |= std::uint64_t{weight.mask[byte + 8]} << (64 - shift);
    return count >= 64 ? word : word & ((std::uint64_t{1} << count) - 1);
}

// work(column, word): the bits of a row, 64 at a time.
template <class Work>
void for_each_word(const Bitmask& weight, std::size_t row, const Work& work) {
    for (std::size_t k = 0; k < weight.columns; k += 64) {
        const std::size_t count = weight.columns - k < 64 ? weight.columns - k : 64;
        work(k, bits_at(weight, row * weight.columns + k, count));
    }
}

std::size_t lowest(std::uint64_t word) { return ones((word & (~word + 1)) - 1); }

bool is_zero(const std::uint8_t* value, std::size_t bytes) {
    for (std::size_t b = 0; b < bytes; ++b) {
        if (value[b] != 0) return false;
    }
    return true;
}

}  // namespace

std::string validate(const Bitmask& weight) {
    const auto number = [](std::uint64_t value) { return std::to_string(value); };
    const std::size_t bytes = weight.value_bytes;
    if (bytes != 1 && bytes != 2 && bytes != 4 && bytes != 8) return "has values of no known size";
    if (weight.rows != 0 && weight.columns > kMaxEntries / weight.rows) {
        return "has " + number(weight.rows) + " x " + number(weight.columns) +
               " entries, wanted at most " + number(kMaxEntries);
    }
    const std::size_t entries = weight.rows * weight.columns;
    if (weight.mask_bytes != (entries + 7) / 8) {
        return "has a mask of " + number(weight.mask_bytes) + " bytes for " + number(entries) +
               " entries, wanted " + number((entries + 7) / 8);
    }
    if (entries % 8 != 0 && weight.mask[weight.mask_bytes - 1] >> entries % 8 != 0) {
        return "has a bit behind its last entry";
    }
    std::size_t set = 0;
    for (std::size_t i = 0; i < entries; i += 64) set += ones(bits_at(weight, i, 64));
    if (weight.count != set + 1) {
        return "has " + number(weight.count) + " values for " + number(set) +
               " set bits, wanted one more than bits: the fill value first";
    }
    return "";
}

bool fills_with_zero(const Bitmask& weight) {
    if (!is_zero(weight.values, weight.value_bytes)) return false;
    for (std::size_t i = 1; i < weight.count; ++i) {
        if (is_zero(weight.values + i * weight.value_bytes, weight.value_bytes)) return false;
    }
    return true;
}

std::vector<std::uint32_t> row_starts(const Bitmask& weight) {
    std::vector<std::uint32_t> starts(weight.rows + 1);
    std::size_t next = 1;
    for (std::size_t row = 0; row < weight.rows; ++row) {
        starts[row] = static_cast<std::uint32_t>(next);
        for_each_word(weight, row, [&](std::size_t, std::uint64_t word) { next += ones(word); });
    }
    starts[weight.rows] = static_cast<std::uint32_t>(next);
    return starts;
}

void read_row(const Bitmask& weight, std::size_t row, std::size_t start, std::uint8_t* out) {
    const std::size_t bytes = weight.value_bytes;
    for (std::size_t k = 0; k < weight.columns; ++k) {
        std::memcpy(out + k * bytes, weight.values, bytes);
    }
    const std::uint8_t* value = weight.values + start * bytes;
    for_each_word(weight, row, [&](std::size_t k, std::uint64_t word) {
        for (; word != 0; word &= word - 1, value += bytes) {
            std::memcpy(out + (k + lowest(word)) * bytes, value, bytes);
        }
    });
}

Owned pack(const Bitmask& weight, Format format, Type type, const float* scales) {
    check_shape(weight.rows, weight.columns, type);
    Rows rows;
    rows.entries.reserve(weight.count - 1);
    rows.begin.reserve(weight.rows + 1);
    rows.begin.push_back(0);
    const std::size_t bytes = weight.value_bytes;
    const bool narrowed = bytes != value_bytes(type);  // of float32 values
    const std::uint8_t* value = weight.values + bytes;
    for (std::size_t row = 0; row < weight.rows; ++row) {
        std::int32_t sum = 0;
        for_each_word(weight, row, [&](std::size_t k, std::uint64_t word) {
            for (; word != 0; word &= word - 1, value += bytes) {
                std::uint32_t bits = 0;
                std::memcpy(&bits, value, bytes);
                if (narrowed) bits = encode(float_of(bits), type, 1.0f);
                const auto column = static_cast<std::uint32_t>(k + lowest(word));
                rows.entries.push_back({column, bits});
                sum += static_cast<std::int8_t>(bits & 0xffu);
            }
        });
        rows.begin.push_back(rows.entries.size());
        if (type != Type::s8) continue;
        if (!std::isfinite(scales[row]) || scales[row] < 0.0f) {
            throw std::invalid_argument("an int8 scale is negative or not finite");
        }
        rows.sums.push_back(sum);
        rows.scales.push_back(scales[row]);
    }
    return pack_rows(weight.rows, weight.columns, format, type, rows);
}

}  // namespace elsa
