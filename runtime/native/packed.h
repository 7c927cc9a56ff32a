// The packed weight formats as bytes, and a checked view of them. docs/kernels.md draws them.
//
//   header | unit offsets | [steps] | [row order] | [scales] | [row sums] | stream | over-read
//
// Every section starts at a multiple of 64 bytes. Their places follow from the header's shape,
// format and type alone, so a file cannot point anywhere.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "packed weights are little-endian"
#endif

namespace elsa {

// rows: every value, zeros too; made in memory for weights without enough zeros, never read from a file.
enum class Format : std::uint8_t { bitmap = 1, sliced = 2, rows = 3 };
enum class Type : std::uint8_t { f32 = 0, bf16 = 1, f16 = 2, s8 = 3 };

constexpr std::size_t kAlign = 64;
constexpr std::size_t kChunk = 64;      // columns of one bitmap word
constexpr std::size_t kGroupRows = 4;   // rows of a bitmap group
constexpr std::size_t kMaskBytes = kGroupRows * 8;  // of a chunk, before its values
constexpr std::size_t kSliceRows = 16;  // rows of a slice
constexpr std::size_t kOverRead = 64;   // a vector load may start at the last value
constexpr std::size_t kMaxRows = std::size_t{1} << 24;
constexpr std::size_t kMaxColumns = std::size_t{1} << 24;
// 128 * 127 * 2^17 < 2^31: sums of products with 255 levels or more are exact.
constexpr std::size_t kMaxColumnsS8 = std::size_t{1} << 17;

constexpr std::int32_t kMostLevels = 32767;  // of an activation as an integer

constexpr std::size_t round_up(std::size_t value, std::size_t multiple) {
    return (value + multiple - 1) / multiple * multiple;
}

constexpr std::size_t value_bytes(Type type) {
    return type == Type::f32 ? 4 : type == Type::s8 ? 1 : 2;
}

struct Header {
    char magic[4];  // "ELSP"
    std::uint16_t version;
    std::uint8_t format;
    std::uint8_t type;
    std::uint32_t rows;
    std::uint32_t columns;
    std::uint64_t nonzeros;
    std::uint64_t stream_bytes;
    std::uint8_t reserved[32];  // zeros
};
static_assert(sizeof(Header) == kAlign, "the header fills one line");

constexpr std::uint16_t kFormatVersion = 2;

// Where the sections of a packed weight lie, in bytes from its start. Absent ones have length 0.
struct Layout {
    std::size_t units = 0;  // groups or slices
    std::size_t offsets = 0, steps = 0, order = 0, scales = 0, sums = 0, stream = 0;
};
Layout layout_of(Format format, Type type, std::size_t rows, std::size_t columns);

struct Lanes;

// A weight that was checked, or made here. Owns nothing.
struct Packed {
    Format format = Format::bitmap;
    Type type = Type::f32;
    std::size_t rows = 0, columns = 0, units = 0, chunks = 0;
    std::uint64_t nonzeros = 0;
    const std::uint64_t* offsets = nullptr;  // (units + 1) bytes from the start of the stream
    const std::uint32_t* steps = nullptr;    // (units), sliced only
    const std::uint32_t* order = nullptr;    // (rows), sliced only: packed row -> row of the output
    const float* scales = nullptr;           // (rows), s8 only, by row of the output
    const std::int32_t* sums = nullptr;      // (rows), s8 only: sum of a row's values
    // s8 only: activations may be integers from -levels to levels and no row's sum of products
    // leaves 32 bits. At least 127.
    std::int32_t levels = 0;
    const std::uint8_t* stream = nullptr;
    const Lanes* lanes = nullptr;  // the same once more, for few tokens; may be missing (lanes.h)
    const std::uint8_t* bytes = nullptr;
    std::size_t size = 0;
};

// 64-byte aligned memory.
struct Freed {
    void operator()(std::uint8_t* memory) const;
};
using Buffer = std::unique_ptr<std::uint8_t[], Freed>;
struct FreedPages {
    void operator()(std::uint8_t* memory) const;
};
using Pages = std::unique_ptr<std::uint8_t[], FreedPages>;
Buffer allocate(std::size_t bytes);  // zeros; throws std::bad_alloc

// A dense matrix anywhere: element (n, k) is data[n * row_stride + k * column_stride].
struct Dense {
    const float* data = nullptr;
    std::size_t rows = 0, columns = 0;
    std::size_t row_stride = 0, column_stride = 0;
    const std::int8_t* integers = nullptr;  // instead of data, for s8 with given scales
};

// What lanes.h draws.
struct Lanes {
    Pages memory;
    std::vector<std::uint64_t> offsets;  // (units + 1)
    std::size_t cuts = 0, chunks = 0;    // chunks of 64 columns in a cut
};

struct Owned {
    Pages memory;
    Packed view;
    std::unique_ptr<Lanes> lanes;
};

// Non-zeros of a dense matrix. s8: scales (rows) given, or the largest magnitude of a row over 127.
// Throws std::invalid_argument (a shape or value that cannot be packed), std::bad_alloc.
Owned pack(const Dense& dense, Format format, Type type, const float* scales = nullptr);

// Where the sections of packed bytes lie that were checked, or made here; levels are left at 0.
void find_sections(const std::uint8_t* bytes, std::size_t size, Packed& view);
// The `levels` of a weight whose rows' sums of magnitudes are at most `most`.
std::int32_t levels_of(std::int64_t most);

// Checks bytes that may come from anywhere and fills the view. Empty string, or what is wrong.
std::string validate(const void* bytes, std::size_t size, Packed& view);

// Writes all rows * columns values, zeros included, row after row.
void unpack(const Packed& packed, float* dense);

}  // namespace elsa
