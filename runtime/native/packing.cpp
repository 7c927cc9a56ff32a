// Dense -> packed and back. Speed matters little here: each weight is packed once.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>
#include <numeric>
#include <stdexcept>
#include <vector>

#include "half.h"
#include "packing.h"
#include "pages.h"

namespace elsa {

void Freed::operator()(std::uint8_t* memory) const {
    ::operator delete[](memory, std::align_val_t{kAlign});
}

void FreedPages::operator()(std::uint8_t* memory) const { free_pages(memory); }

Buffer allocate(std::size_t bytes) {
    const std::size_t whole = round_up(std::max<std::size_t>(bytes, 1), kAlign);
    auto* memory = static_cast<std::uint8_t*>(::operator new[](whole, std::align_val_t{kAlign}));
    std::memset(memory, 0, whole);
    return Buffer(memory);
}

Layout layout_of(Format format, Type type, std::size_t rows, std::size_t columns) {
    (void)columns;
    Layout at;
    const bool sliced = format == Format::sliced, quantised = type == Type::s8;
    const std::size_t unit_rows = sliced ? kSliceRows : kGroupRows;
    at.units = (rows + unit_rows - 1) / unit_rows;
    std::size_t end = sizeof(Header);
    const auto place = [&end](std::size_t bytes) {
        const std::size_t start = end;
        end = round_up(end + bytes, kAlign);
        return start;
    };
    at.offsets = place((at.units + 1) * 8);
    at.steps = place(sliced ? at.units * 4 : 0);
    at.order = place(sliced ? rows * 4 : 0);
    at.scales = place(quantised ? rows * 4 : 0);
    at.sums = place(quantised ? rows * 4 : 0);
    at.stream = end;
    return at;
}

void check_shape(std::size_t rows, std::size_t columns, Type type) {
    if (rows == 0 || columns == 0) {
        throw std::invalid_argument("a weight without elements cannot be packed");
    }
    const std::size_t most = type == Type::s8 ? kMaxColumnsS8 : kMaxColumns;
    if (rows > kMaxRows || columns > most) {
        throw std::invalid_argument(
            "a weight of " + std::to_string(rows) + " x " + std::to_string(columns) +
            " is too large, wanted at most " + std::to_string(kMaxRows) + " x " +
            std::to_string(most));
    }
}

std::uint32_t encode(float value, Type type, float inverse_scale) {
    switch (type) {
        case Type::f32: return value == 0.0f ? 0 : bits_of(value);
        case Type::bf16: {
            const std::uint16_t bits = to_bf16(value);
            return (bits & 0x7fffu) == 0 ? 0 : bits;
        }
        case Type::f16: {
            const std::uint16_t bits = to_f16(value);
            return (bits & 0x7fffu) == 0 ? 0 : bits;
        }
        case Type::s8: break;
    }
    const float scaled = std::nearbyint(value * inverse_scale);
    const float clipped = std::min(127.0f, std::max(-128.0f, scaled));
    return static_cast<std::uint8_t>(static_cast<std::int8_t>(clipped));
}

namespace {

constexpr std::size_t kBlockRows = 16;  // read together: a transposed source has them side by side

float decode(const std::uint8_t* at, Type type) {
    std::uint16_t half;
    switch (type) {
        case Type::f32: {
            float value;
            std::memcpy(&value, at, 4);
            return value;
        }
        case Type::bf16: std::memcpy(&half, at, 2); return from_bf16(half);
        case Type::f16: std::memcpy(&half, at, 2); return from_f16(half);
        case Type::s8: break;
    }
    return static_cast<float>(static_cast<std::int8_t>(*at));
}

float row_scale(const float* row, std::size_t columns) {
    float largest = 0.0f;
    for (std::size_t k = 0; k < columns; ++k) {
        if (!std::isfinite(row[k])) {
            throw std::invalid_argument("a weight that is not finite cannot be stored as int8");
        }
        largest = std::max(largest, std::fabs(row[k]));
    }
    return largest / 127.0f;
}

void add_scale(float scale, Rows& rows) {
    if (!std::isfinite(scale) || scale < 0.0f) {
        throw std::invalid_argument("an int8 scale is negative or not finite");
    }
    rows.scales.push_back(scale);
}

// A row of integers: stored as they are.
void take_row(const std::int8_t* row, std::size_t columns, float scale, Rows& rows) {
    add_scale(scale, rows);
    std::int32_t sum = 0;
    for (std::size_t k = 0; k < columns; ++k) {
        if (row[k] == 0) continue;
        rows.entries.push_back({static_cast<std::uint32_t>(k), static_cast<std::uint8_t>(row[k])});
        sum += row[k];
    }
    rows.sums.push_back(sum);
    rows.begin.push_back(rows.entries.size());
}

void encode_row(const float* row, std::size_t n, std::size_t columns, Type type,
                const float* scales, Rows& rows) {
    float inverse = 1.0f;
    if (type == Type::s8) {
        const float own = row_scale(row, columns);  // refuses what is not finite
        const float scale = scales != nullptr ? scales[n] : own;
        add_scale(scale, rows);
        inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
        if (!std::isfinite(inverse)) inverse = 0.0f;  // a row of subnormals: zeros
    }
    std::int32_t sum = 0;
    for (std::size_t k = 0; k < columns; ++k) {
        const std::uint32_t bits = encode(row[k], type, inverse);
        if (bits == 0) continue;
        rows.entries.push_back({static_cast<std::uint32_t>(k), bits});
        sum += static_cast<std::int8_t>(bits & 0xffu);
    }
    if (type == Type::s8) rows.sums.push_back(sum);
    rows.begin.push_back(rows.entries.size());
}

// Calls each(row, n) with every row, its values side by side.
template <class Value, class Each>
void for_each_row(const Value* data, const Dense& dense, const Each& each) {
    std::vector<Value> block(kBlockRows * dense.columns);
    for (std::size_t first = 0; first < dense.rows; first += kBlockRows) {
        const std::size_t count = std::min(kBlockRows, dense.rows - first);
        const Value* from = data + first * dense.row_stride;
        for (std::size_t k = 0; k < dense.columns; ++k) {
            for (std::size_t n = 0; n < count; ++n) {
                block[n * dense.columns + k] = from[n * dense.row_stride + k * dense.column_stride];
            }
        }
        for (std::size_t n = 0; n < count; ++n) each(&block[n * dense.columns], first + n);
    }
}

// Calls each(append, n): append(rows) adds the non-zeros of row n.
template <class Each>
void for_each_encoded(const Dense& dense, Type type, const float* scales, const Each& each) {
    if (dense.integers == nullptr) {
        for_each_row(dense.data, dense, [&](const float* row, std::size_t n) {
            each([&](Rows& to) { encode_row(row, n, dense.columns, type, scales, to); }, n);
        });
        return;
    }
    if (type != Type::s8 || scales == nullptr) {
        throw std::invalid_argument("integers are packed as int8 with given scales");
    }
    for_each_row(dense.integers, dense, [&](const std::int8_t* row, std::size_t n) {
        each([&](Rows& to) { take_row(row, dense.columns, scales[n], to); }, n);
    });
}

Rows read_rows(const Dense& dense, Type type, const float* scales) {
    Rows rows;
    rows.begin.push_back(0);
    for_each_encoded(dense, type, scales, [&](const auto& append, std::size_t) { append(rows); });
    return rows;
}

// Columns more than 255 apart need steps in between that hold no value.
template <class Step>
void for_each_step(const Rows& rows, std::size_t row, const Step& step) {
    std::uint32_t column = 0;
    for (std::size_t i = rows.begin[row]; i < rows.begin[row + 1]; ++i) {
        const Entry& entry = rows.entries[i];
        for (; entry.column - column > 255; column += 255) step(255u, 0u);
        step(entry.column - column, entry.bits);
        column = entry.column;
    }
}

Pages start(Format format, Type type, const Dense& dense, const Rows& rows,
            std::size_t stream_bytes, std::size_t& size) {
    const Layout at = layout_of(format, type, dense.rows, dense.columns);
    size = at.stream + stream_bytes + kOverRead;
    Pages memory(allocate_pages(size));
    Header header{};
    std::memcpy(header.magic, "ELSP", 4);
    header.version = kFormatVersion;
    header.format = static_cast<std::uint8_t>(format);
    header.type = static_cast<std::uint8_t>(type);
    header.rows = static_cast<std::uint32_t>(dense.rows);
    header.columns = static_cast<std::uint32_t>(dense.columns);
    header.nonzeros = rows.entries.size();
    header.stream_bytes = stream_bytes;
    std::memcpy(memory.get(), &header, sizeof header);
    if (type == Type::s8) {
        std::memcpy(memory.get() + at.scales, rows.scales.data(), dense.rows * 4);
        std::memcpy(memory.get() + at.sums, rows.sums.data(), dense.rows * 4);
    }
    return memory;
}

Pages pack_bitmap(const Dense& dense, Type type, const Rows& rows, std::size_t& size) {
    const std::size_t chunks = (dense.columns + kChunk - 1) / kChunk, bytes = value_bytes(type);
    const Layout at = layout_of(Format::bitmap, type, dense.rows, dense.columns);
    std::vector<std::uint64_t> offsets(at.units + 1, 0);
    for (std::size_t g = 0; g < at.units; ++g) {
        const std::size_t last = std::min(dense.rows, (g + 1) * kGroupRows);
        const std::size_t values = rows.begin[last] - rows.begin[g * kGroupRows];
        offsets[g + 1] =
            offsets[g] + round_up(chunks * kMaskBytes + values * bytes, kAlign);
    }
    Pages memory = start(Format::bitmap, type, dense, rows, offsets.back(), size);
    std::memcpy(memory.get() + at.offsets, offsets.data(), offsets.size() * 8);
    for (std::size_t g = 0; g < at.units; ++g) {
        std::uint8_t* to = memory.get() + at.stream + offsets[g];
        std::size_t next[kGroupRows] = {}, end[kGroupRows] = {};
        for (std::size_t r = 0; r < kGroupRows && g * kGroupRows + r < dense.rows; ++r) {
            next[r] = rows.begin[g * kGroupRows + r];
            end[r] = rows.begin[g * kGroupRows + r + 1];
        }
        for (std::size_t c = 0; c < chunks; ++c) {
            std::uint64_t masks[kGroupRows] = {};
            std::uint8_t* value = to + kMaskBytes;
            for (std::size_t r = 0; r < kGroupRows; ++r) {
                for (; next[r] < end[r]; ++next[r]) {
                    const Entry& entry = rows.entries[next[r]];
                    if (entry.column >= (c + 1) * kChunk) break;
                    masks[r] |= std::uint64_t{1} << entry.column % kChunk;
                    std::memcpy(value, &entry.bits, bytes);
                    value += bytes;
                }
            }
            std::memcpy(to, masks, kMaskBytes);
            to = value;
        }
    }
    return memory;
}

Pages pack_sliced(const Dense& dense, Type type, const Rows& rows, std::size_t& size) {
    const std::size_t bytes = value_bytes(type);
    const Layout at = layout_of(Format::sliced, type, dense.rows, dense.columns);
    std::vector<std::uint32_t> length(dense.rows, 0), order(dense.rows), steps(at.units, 0);
    for (std::size_t n = 0; n < dense.rows; ++n) {
        for_each_step(rows, n, [&](std::uint32_t, std::uint32_t) { ++length[n]; });
    }
    std::iota(order.begin(), order.end(), 0u);
    // Rows of one slice are padded to its longest: alike lengths lie together.
    std::stable_sort(order.begin(), order.end(),
                     [&](std::uint32_t a, std::uint32_t b) { return length[a] > length[b]; });
    std::vector<std::uint64_t> offsets(at.units + 1, 0);
    for (std::size_t s = 0; s < at.units; ++s) {
        steps[s] = length[order[s * kSliceRows]];
        const std::size_t deltas = round_up(std::size_t{steps[s]} * kSliceRows, kAlign);
        offsets[s + 1] =
            offsets[s] + round_up(deltas + std::size_t{steps[s]} * kSliceRows * bytes, kAlign);
    }
    Pages memory = start(Format::sliced, type, dense, rows, offsets.back(), size);
    std::memcpy(memory.get() + at.offsets, offsets.data(), offsets.size() * 8);
    std::memcpy(memory.get() + at.steps, steps.data(), steps.size() * 4);
    std::memcpy(memory.get() + at.order, order.data(), order.size() * 4);
    for (std::size_t i = 0; i < dense.rows; ++i) {
        const std::size_t s = i / kSliceRows;
        std::uint8_t* delta = memory.get() + at.stream + offsets[s] + i % kSliceRows;
        std::uint8_t* value = memory.get() + at.stream + offsets[s] +
                              round_up(std::size_t{steps[s]} * kSliceRows, kAlign) +
                              i % kSliceRows * bytes;
        for_each_step(rows, order[i], [&](std::uint32_t gap, std::uint32_t bits) {
            *delta = static_cast<std::uint8_t>(gap);
            std::memcpy(value, &bits, bytes);
            delta += kSliceRows;
            value += kSliceRows * bytes;
        });
    }
    return memory;
}

// Row after row, padded to whole chunks and groups. A row of entries at a time: a weight without zeros
// has too many for a list of all.
Owned pack_every_value(const Dense& dense, Type type, const float* scales) {
    const std::size_t chunks = (dense.columns + kChunk - 1) / kChunk, bytes = value_bytes(type);
    const std::size_t stride = chunks * kChunk * bytes;
    const Layout at = layout_of(Format::rows, type, dense.rows, dense.columns);
    Rows none;
    none.scales.resize(dense.rows);
    none.sums.resize(dense.rows);
    std::size_t size = 0;
    Owned owned;
    owned.memory = start(Format::rows, type, dense, none, at.units * kGroupRows * stride, size);
    std::uint8_t* memory = owned.memory.get();
    std::vector<std::uint64_t> offsets(at.units + 1);
    for (std::size_t g = 0; g <= at.units; ++g) offsets[g] = g * kGroupRows * stride;
    std::memcpy(memory + at.offsets, offsets.data(), offsets.size() * 8);
    std::uint64_t nonzeros = 0;
    std::int64_t most = 1;
    Rows row;
    for_each_encoded(dense, type, scales, [&](const auto& append, std::size_t n) {
        row.entries.clear();
        row.begin.clear();
        row.scales.clear();
        row.sums.clear();
        append(row);
        std::uint8_t* to = memory + at.stream + n * stride;
        std::int64_t sizes = 0;
        for (const Entry& entry : row.entries) {
            std::memcpy(to + entry.column * bytes, &entry.bits, bytes);
            sizes += std::abs(static_cast<std::int8_t>(entry.bits & 0xffu));
        }
        nonzeros += row.entries.size();
        if (type != Type::s8) return;
        most = std::max(most, sizes);
        std::memcpy(memory + at.scales + n * 4, row.scales.data(), 4);
        std::memcpy(memory + at.sums + n * 4, row.sums.data(), 4);
    });
    Header header;
    std::memcpy(&header, memory, sizeof header);
    header.nonzeros = nonzeros;
    std::memcpy(memory, &header, sizeof header);
    owned.view.format = Format::rows;
    owned.view.type = type;
    owned.view.rows = dense.rows;
    owned.view.columns = dense.columns;
    owned.view.chunks = chunks;
    owned.view.nonzeros = nonzeros;
    find_sections(memory, size, owned.view);
    owned.view.levels = levels_of(most);
    return owned;
}

void unpack_every_value(const Packed& packed, float* dense) {
    const std::size_t bytes = value_bytes(packed.type);
    for (std::size_t n = 0; n < packed.rows; ++n) {
        const std::uint8_t* value = packed.stream + n * packed.chunks * kChunk * bytes;
        for (std::size_t k = 0; k < packed.columns; ++k) {
            dense[n * packed.columns + k] = decode(value + k * bytes, packed.type);
        }
    }
}

void unpack_bitmap(const Packed& packed, float* dense) {
    for (std::size_t g = 0; g < packed.units; ++g) {
        for_each_of_group(packed, g, [&](std::size_t n, std::size_t k, const std::uint8_t* value) {
            dense[n * packed.columns + k] = decode(value, packed.type);
        });
    }
}

void unpack_sliced(const Packed& packed, float* dense) {
    const std::size_t bytes = value_bytes(packed.type);
    for (std::size_t i = 0; i < packed.rows; ++i) {
        const std::size_t s = i / kSliceRows, steps = packed.steps[s];
        const std::uint8_t* delta = packed.stream + packed.offsets[s] + i % kSliceRows;
        const std::uint8_t* value = packed.stream + packed.offsets[s] +
                                    round_up(steps * kSliceRows, kAlign) + i % kSliceRows * bytes;
        float* row = dense + packed.order[i] * packed.columns;
        std::size_t k = 0;
        for (std::size_t t = 0; t < steps; ++t) {
            k += delta[t * kSliceRows];
            row[k] += decode(value + t * kSliceRows * bytes, packed.type);
        }
    }
}

}  // namespace

Owned pack(const Dense& dense, Format format, Type type, const float* scales) {
    check_shape(dense.rows, dense.columns, type);
    if (format == Format::rows) return pack_every_value(dense, type, scales);
    return pack_rows(dense.rows, dense.columns, format, type, read_rows(dense, type, scales));
}

Owned pack_rows(std::size_t rows, std::size_t columns, Format format, Type type,
                const Rows& found) {
    std::size_t size = 0;
    Owned owned;
    Dense dense;  // its shape alone
    dense.rows = rows;
    dense.columns = columns;
    owned.memory = format == Format::bitmap ? pack_bitmap(dense, type, found, size)
                                            : pack_sliced(dense, type, found, size);
    const std::string fault = validate(owned.memory.get(), size, owned.view);
    if (!fault.empty()) throw std::logic_error("packing made a weight that " + fault);
    return owned;
}

void unpack(const Packed& packed, float* dense) {
    std::fill(dense, dense + packed.rows * packed.columns, 0.0f);
    if (packed.format == Format::rows) {
        unpack_every_value(packed, dense);
    } else if (packed.format == Format::bitmap) {
        unpack_bitmap(packed, dense);
    } else {
        unpack_sliced(packed, dense);
    }
    if (packed.type != Type::s8) return;
    for (std::size_t n = 0; n < packed.rows; ++n) {
        float* row = dense + n * packed.columns;
        for (std::size_t k = 0; k < packed.columns; ++k) row[k] *= packed.scales[n];
    }
}

}  // namespace elsa
