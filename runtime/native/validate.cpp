// Packed bytes as hostile input: after `validate` no kernel can leave the buffer, whatever it held.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "packed.h"

namespace elsa {
namespace {

std::string number(std::uint64_t value) { return std::to_string(value); }

std::size_t popcount(std::uint64_t mask) {
    std::size_t count = 0;
    for (; mask != 0; mask &= mask - 1) ++count;
    return count;
}

// Shape, format, type and size; nothing behind the header has been read yet.
std::string check_header(const Header& header, std::size_t size, Packed& view) {
    if (std::memcmp(header.magic, "ELSP", 4) != 0) return "does not start with ELSP";
    if (header.version != kFormatVersion) {
        return "has format version " + number(header.version) + ", wanted " +
               number(kFormatVersion);
    }
    if (header.format != 1 && header.format != 2) {
        return "has format number " + number(header.format) + ", wanted 1 or 2";
    }
    if (header.type > 3) return "has value type " + number(header.type) + ", wanted 0 to 3";
    for (const std::uint8_t byte : header.reserved) {
        if (byte != 0) return "has reserved header bytes that are not zero";
    }
    view.format = static_cast<Format>(header.format);
    view.type = static_cast<Type>(header.type);
    const std::size_t most = view.type == Type::s8 ? kMaxColumnsS8 : kMaxColumns;
    if (header.rows == 0 || header.rows > kMaxRows || header.columns == 0 ||
        header.columns > most) {
        return "has shape " + number(header.rows) + " x " + number(header.columns) +
               ", wanted 1 to " + number(kMaxRows) + " rows and 1 to " + number(most) + " columns";
    }
    view.rows = header.rows;
    view.columns = header.columns;
    view.chunks = (view.columns + kChunk - 1) / kChunk;
    view.nonzeros = header.nonzeros;
    const Layout at = layout_of(view.format, view.type, view.rows, view.columns);
    if (header.stream_bytes > size || at.stream + kOverRead > size ||
        at.stream + kOverRead + header.stream_bytes != size) {
        return "has " + number(size) + " bytes, but its header speaks of " +
               number(at.stream + kOverRead) + " + " + number(header.stream_bytes);
    }
    return "";
}

std::string check_offsets(const Packed& view, std::uint64_t stream_bytes) {
    if (view.offsets[0] != 0) return "has a first offset that is not 0";
    for (std::size_t u = 0; u < view.units; ++u) {
        const std::uint64_t next = view.offsets[u + 1];
        if (next < view.offsets[u] || next > stream_bytes || next % kAlign != 0) {
            return "has offset " + number(next) + " of unit " + number(u + 1) + " out of order";
        }
    }
    if (view.offsets[view.units] != stream_bytes) return "has a last offset that is not its end";
    return "";
}

std::string check_total(const Packed& view, std::uint64_t total) {
    if (total == view.nonzeros) return "";
    return "has " + number(total) + " non-zeros, but its header says " + number(view.nonzeros);
}

// Of a row of int8 values.
struct RowSum {
    std::int64_t plain = 0, sizes = 0;
    void add(std::int8_t value) {
        plain += value;
        sizes += value < 0 ? -value : value;
    }
};

// Checks a chunk of a group at `at`, where `room` bytes are left. Returns how many values its bits
// count; sets `fault` when it is broken.
std::size_t check_chunk(const Packed& view, std::size_t group, std::size_t chunk,
                        const std::uint8_t* at, std::size_t room, std::vector<RowSum>& sums,
                        std::string& fault) {
    const std::size_t bytes = value_bytes(view.type), tail = view.columns % kChunk;
    const bool last = chunk + 1 == view.chunks && tail != 0;
    const std::uint64_t beyond = last ? ~((std::uint64_t{1} << tail) - 1) : 0;
    if (room < kMaskBytes) {
        fault = "has a group " + number(group) + " without room for its bitmap";
        return 0;
    }
    std::uint64_t masks[kGroupRows];
    std::memcpy(masks, at, kMaskBytes);
    std::size_t values = 0;
    for (std::size_t r = 0; r < kGroupRows; ++r) {
        const std::size_t row = group * kGroupRows + r, count = popcount(masks[r]);
        if ((masks[r] & beyond) != 0 || (masks[r] != 0 && row >= view.rows)) {
            fault = "has a bit outside the matrix in group " + number(group);
            return 0;
        }
        if (kMaskBytes + (values + count) * bytes > room) {
            fault = "has a group " + number(group) + " without room for what its bitmap counts";
            return 0;
        }
        for (std::size_t j = 0; view.type == Type::s8 && j < count; ++j) {
            sums[row].add(static_cast<std::int8_t>(at[kMaskBytes + values + j]));
        }
        values += count;
    }
    return values;
}

std::string check_bitmap(const Packed& view, std::vector<RowSum>& sums) {
    std::uint64_t total = 0;
    std::string fault;
    for (std::size_t g = 0; g < view.units; ++g) {
        const std::uint64_t room = view.offsets[g + 1] - view.offsets[g];
        std::size_t used = 0;
        for (std::size_t c = 0; c < view.chunks; ++c) {
            const std::uint8_t* at = view.stream + view.offsets[g] + used;
            const std::size_t values = check_chunk(view, g, c, at, room - used, sums, fault);
            if (!fault.empty()) return fault;
            used += kMaskBytes + values * value_bytes(view.type);
            total += values;
        }
        if (round_up(used, kAlign) != room) {
            return "has a group " + number(g) + " of " + number(room) + " bytes, but its bitmap " +
                   "counts " + number(used);
        }
    }
    return check_total(view, total);
}

std::string check_order(const Packed& view) {
    std::vector<bool> seen(view.rows, false);
    for (std::size_t i = 0; i < view.rows; ++i) {
        const std::uint32_t row = view.order[i];
        if (row >= view.rows || seen[row]) return "has a row order that is no permutation";
        seen[row] = true;
    }
    return "";
}

// One row of a slice: its columns stay inside and rise, wherever there is a value.
std::string check_lane(const Packed& view, std::size_t packed_row, const std::uint8_t* deltas,
                       const std::uint8_t* values, std::uint64_t& total, RowSum& sum) {
    const std::size_t bytes = value_bytes(view.type), lane = packed_row % kSliceRows;
    std::size_t column = 0;
    bool taken = false;  // the current column has its value
    for (std::size_t t = 0; t < view.steps[packed_row / kSliceRows]; ++t) {
        const std::size_t at = t * kSliceRows + lane;
        column += deltas[at];
        if (column >= view.columns) return "has a column outside the matrix";
        if (deltas[at] != 0) taken = false;
        const std::uint8_t* value = values + at * bytes;
        bool zero = true;
        for (std::size_t b = 0; b < bytes; ++b) zero = zero && value[b] == 0;
        if (zero) continue;
        if (taken) return "has two values for one element";
        if (packed_row >= view.rows) return "has values in rows outside the matrix";
        taken = true;
        ++total;
        if (view.type == Type::s8) sum.add(static_cast<std::int8_t>(*value));
    }
    return "";
}

std::string check_sliced(const Packed& view, std::vector<RowSum>& sums) {
    const std::size_t bytes = value_bytes(view.type);
    std::string fault = check_order(view);
    if (!fault.empty()) return fault;
    std::uint64_t total = 0;
    for (std::size_t s = 0; s < view.units; ++s) {
        // A lane takes at most one step for each column, and one for each 255 it leaps over.
        const std::uint64_t steps = view.steps[s], room = view.offsets[s + 1] - view.offsets[s];
        const std::uint64_t deltas = round_up(steps * kSliceRows, kAlign);
        if (steps > view.columns || round_up(deltas + steps * kSliceRows * bytes, kAlign) != room) {
            return "has a slice " + number(s) + " of " + number(steps) + " steps in " +
                   number(room) + " bytes";
        }
        const std::uint8_t* start = view.stream + view.offsets[s];
        for (std::size_t i = s * kSliceRows; i < (s + 1) * kSliceRows; ++i) {
            RowSum unused;
            RowSum& sum =
                view.type == Type::s8 && i < view.rows ? sums[view.order[i]] : unused;
            fault = check_lane(view, i, start, start + deltas, total, sum);
            if (!fault.empty()) return fault + " in slice " + number(s);
        }
    }
    return check_total(view, total);
}

}  // namespace

void find_sections(const std::uint8_t* bytes, std::size_t size, Packed& view) {
    const Layout at = layout_of(view.format, view.type, view.rows, view.columns);
    view.bytes = bytes;
    view.size = size;
    view.units = at.units;
    view.offsets = reinterpret_cast<const std::uint64_t*>(bytes + at.offsets);
    view.stream = bytes + at.stream;
    if (view.format == Format::sliced) {
        view.steps = reinterpret_cast<const std::uint32_t*>(bytes + at.steps);
        view.order = reinterpret_cast<const std::uint32_t*>(bytes + at.order);
    }
    if (view.type == Type::s8) {
        view.scales = reinterpret_cast<const float*>(bytes + at.scales);
        view.sums = reinterpret_cast<const std::int32_t*>(bytes + at.sums);
    }
}

std::int32_t levels_of(std::int64_t most) {
    return static_cast<std::int32_t>(std::min<std::int64_t>(
        kMostLevels, std::numeric_limits<std::int32_t>::max() / std::max<std::int64_t>(1, most)));
}

std::string validate(const void* bytes, std::size_t size, Packed& view) {
    view = Packed{};
    if (bytes == nullptr || size < sizeof(Header)) {
        return "has " + number(size) + " bytes, wanted at least " + number(sizeof(Header));
    }
    if (reinterpret_cast<std::uintptr_t>(bytes) % kAlign != 0) {
        return "does not lie at a multiple of 64 bytes";
    }
    Header header;
    std::memcpy(&header, bytes, sizeof header);
    Packed made;
    std::string fault = check_header(header, size, made);
    if (!fault.empty()) return fault;
    find_sections(static_cast<const std::uint8_t*>(bytes), size, made);
    fault = check_offsets(made, header.stream_bytes);
    if (!fault.empty()) return fault;
    std::vector<RowSum> sums(made.type == Type::s8 ? made.rows : 0);
    fault = made.format == Format::bitmap ? check_bitmap(made, sums) : check_sliced(made, sums);
    if (!fault.empty()) return fault;
    for (std::size_t n = 0; n < sums.size(); ++n) {
        if (!(made.scales[n] >= 0.0f) || !std::isfinite(made.scales[n])) {
            return "has a scale of row " + number(n) + " that is negative or not finite";
        }
        if (sums[n].plain != made.sums[n]) return "has a wrong sum of row " + number(n);
    }
    std::int64_t most = 1;
    for (const RowSum& sum : sums) most = std::max(most, sum.sizes);
    made.levels = levels_of(most);
    view = made;
    return "";
}

}  // namespace elsa
