// Weights as the GPU reads them (docs/cuda.md): thirty-two rows side by side, a warp's lanes, in
// packets of eight values a row with a byte each for the column.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

namespace elsa {
namespace cuda {

enum class Value : std::uint8_t { f32 = 0, bf16 = 1, f16 = 2, s8 = 3 };
constexpr std::size_t bytes_of(Value value) {
    return value == Value::f32 ? 4 : value == Value::s8 ? 1 : 2;
}

constexpr std::uint32_t kLanes = 32;    // rows of a slice
constexpr std::uint32_t kSlices = 4;    // of a block of rows
constexpr std::uint32_t kBlockRows = kLanes * kSlices;
constexpr std::uint32_t kPacket = 8;    // values of a row in a packet
constexpr std::uint32_t kReach = 255;   // columns from the first value of a packet to its last
constexpr std::uint32_t kIndexBytes = kLanes * kPacket;
constexpr std::uint32_t kSlabColumns = 4096;  // at most: 64 KB of activations for four tokens
constexpr std::uint32_t kMostGroup = 32768;   // rows: their numbers have 16 bits
constexpr std::size_t kGroupBytes = std::size_t{32} << 20;  // of a group as dense floats
constexpr std::uint32_t kMostParts = 16;
constexpr std::uint32_t kMostWarps = 16;      // of a thread block

constexpr std::uint32_t packet_bytes(Value value) {
    return kIndexBytes + kLanes * kPacket * static_cast<std::uint32_t>(bytes_of(value));
}

// How a product is cut among thread blocks.
struct Plan {
    std::uint32_t slabs = 1;             // cuts of the columns; several sums are added afterwards
    std::uint32_t slab_columns = 8;      // of each but the last; the activations a block holds
    std::uint32_t parts = 1;             // warps that share the packets of a slice
    std::uint32_t slices_per_block = 1;  // 1, 2 or 4
    // Rows are sorted inside groups of so many, which are written out dense together; a multiple
    // of kBlockRows.
    std::uint32_t group_rows = kBlockRows;

    constexpr std::uint32_t warps() const { return parts * slices_per_block; }
};

// Enough warps for each multiprocessor, if the weight is large enough for it.
Plan plan_for(std::size_t rows, std::size_t columns, std::size_t nonzeros,
              std::size_t multiprocessors);

// On the host. Units are counted (block * slabs + slab) * kSlices + slice.
struct Sliced {
    std::size_t rows = 0, columns = 0, nonzeros = 0;
    Value value = Value::f16;
    Plan plan;
    std::vector<std::uint32_t> starts;  // (units + 1) first packet of each unit
    std::vector<std::uint16_t> bases;   // (units, parts, 32) where each lane is before its part
    std::vector<std::uint16_t> order;   // (units, 32) row inside the group of each lane
    std::vector<std::uint8_t> stream;   // packets: (32, 8) bytes of columns, then values

    std::size_t blocks() const { return (rows + kBlockRows - 1) / kBlockRows; }
    std::size_t units() const { return blocks() * plan.slabs * kSlices; }
    std::size_t nbytes() const {
        return starts.size() * 4 + (bases.size() + order.size()) * 2 + stream.size();
    }
};

// Writes the values of one row, zeros included: columns * bytes_of(value) bytes.
using ReadRow = std::function<void(std::size_t row, std::uint8_t* out)>;

// Values are copied as they are; those whose bits are all zero are left out.
// Throws std::invalid_argument (no rows or columns, a plan that does not fit, more packets than
// 32 bits count), std::bad_alloc.
Sliced slice(std::size_t rows, std::size_t columns, Value value, const Plan& plan,
             const ReadRow& read_row);

}  // namespace cuda
}  // namespace elsa
