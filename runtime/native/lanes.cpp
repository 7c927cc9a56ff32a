#include "lanes.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <utility>
#include <vector>

#include "packing.h"
#include "pages.h"

namespace elsa {
namespace {

// Beyond these a token, which reads all of it from memory, is as fast with a bitmap (Zen 4, December
// 2026): by density of float32, bfloat16, float16, int8;
constexpr double kMostDensity[] = {0.26, 0.28, 0.34, 0.22};
// and by bytes, where both wait for memory, or where a bitmap waits for its expansions. Random zeros take
// 1.35 times the bytes of a bitmap at 80 % (int8), 1.1 at 90 %; rows of very different lengths more.
constexpr double kMostBytes = 1.4;                          // times a bitmap's
constexpr double kExpansions[] = {0.8, 0.6, 0.6, 0.45};     // bytes an element

using Row = std::vector<Entry>;

// The non-zeros of the rows of a unit.
std::vector<Row> rows_of(const Packed& bitmap, std::size_t unit) {
    std::vector<Row> rows(kLaneUnit);
    const std::size_t groups = kLaneUnit / kGroupRows, bytes = value_bytes(bitmap.type);
    const std::size_t last = std::min(bitmap.units, (unit + 1) * groups);
    for (std::size_t g = unit * groups; g < last; ++g) {
        const std::uint8_t* at = bitmap.stream + bitmap.offsets[g];
        for (std::size_t c = 0; c < bitmap.chunks; ++c) {
            std::uint64_t masks[kGroupRows];
            std::memcpy(masks, at, kMaskBytes);
            at += kMaskBytes;
            for (std::size_t r = 0; r < kGroupRows; ++r) {
                Row& row = rows[(g - unit * groups) * kGroupRows + r];
                for (std::size_t k = c * kChunk; masks[r] != 0; masks[r] >>= 1, ++k) {
                    if ((masks[r] & 1) == 0) continue;
                    Entry entry{static_cast<std::uint32_t>(k), 0};
                    std::memcpy(&entry.bits, at, bytes);
                    row.push_back(entry);
                    at += bytes;
                }
            }
        }
    }
    return rows;
}

// Writes the entries of a slice's row, whose first step begins at `step`.
void write_row(const Entry* entry, std::size_t count, std::size_t lane, std::size_t first_column,
               Type type, std::uint8_t* step) {
    const std::size_t bytes = value_bytes(type);
    for (std::size_t i = 0; i < count; ++i, ++entry) {
        const std::size_t e = i % kLaneEntries;
        if (i > 0 && e == 0) step += kLaneColumns + kLaneRows * kLaneEntries * bytes;
        const std::size_t beside = lane * kLaneEntries + e;
        const std::size_t column =
            type == Type::s8 ? beside : lane / 4 * 16 + e * 4 + lane % 4;
        const std::size_t value = type == Type::s8 ? beside : (e * kLaneRows + lane) * bytes;
        step[column] = static_cast<std::uint8_t>(entry->column - first_column);
        std::memcpy(step + kLaneColumns + value, &entry->bits, bytes);
    }
}

// Appends the cut that begins at column `first` to the stream; `next`: the first entry of each row in it.
void append_cut(const std::vector<Row>& rows, std::size_t first, std::size_t width, Type type,
                std::vector<std::size_t>& next, std::vector<std::uint8_t>& stream) {
    std::size_t count[kLaneUnit], order[kLaneUnit];
    for (std::size_t r = 0; r < kLaneUnit; ++r) {
        std::size_t end = next[r];
        while (end < rows[r].size() && rows[r][end].column < first + width) ++end;
        count[r] = end - next[r];
    }
    std::iota(order, order + kLaneUnit, std::size_t{0});
    std::stable_sort(order, order + kLaneUnit,
                     [&](std::size_t a, std::size_t b) { return count[a] > count[b]; });
    const std::size_t head = stream.size(), bytes = value_bytes(type);
    stream.resize(head + kLaneHead, 0);
    for (std::size_t i = 0; i < kLaneUnit; ++i) {
        stream[head + i] = static_cast<std::uint8_t>(order[i]);
    }
    for (std::size_t s = 0; s < kLaneSlices; ++s) {
        const std::size_t longest = count[order[s * kLaneRows]];
        const bool whole = type == Type::s8;
        const std::size_t steps = whole ? (longest + kLaneEntries - 1) / kLaneEntries
                                        : longest / kLaneEntries;
        const std::size_t rest = whole ? 0 : longest % kLaneEntries;
        stream[head + kLaneUnit + s] = static_cast<std::uint8_t>(steps);
        stream[head + kLaneUnit + kLaneSlices + s] = static_cast<std::uint8_t>(rest);
        const std::size_t begin = stream.size();
        std::size_t size = steps * (kLaneColumns + kLaneRows * kLaneEntries * bytes);
        if (rest > 0) size += kLaneColumns + round_up(rest * kLaneRows * bytes, kAlign);
        stream.resize(begin + size, 0);
        for (std::size_t lane = 0; lane < kLaneRows; ++lane) {
            const std::size_t r = order[s * kLaneRows + lane];
            write_row(rows[r].data() + next[r], count[r], lane, first, type, stream.data() + begin);
            next[r] += count[r];
        }
    }
}

}  // namespace

void add_lanes(Owned& weight, const Kernels& kernels) {
    const Packed& bitmap = weight.view;
    const auto type = static_cast<std::size_t>(bitmap.type);
    const Kind kind = bitmap.type == Type::s8 ? Kind::s8_by_s16 : static_cast<Kind>(bitmap.type);
    if (kernels.lanes[static_cast<int>(kind)] == nullptr || bitmap.format != Format::bitmap) return;
    const double elements = static_cast<double>(bitmap.rows) * static_cast<double>(bitmap.columns);
    if (static_cast<double>(bitmap.nonzeros) > kMostDensity[type] * elements) return;
    auto lanes = std::make_unique<Lanes>();
    const std::size_t most = lane_cut(bitmap.type) / kChunk;
    lanes->cuts = (bitmap.chunks + most - 1) / most;
    lanes->chunks = (bitmap.chunks + lanes->cuts - 1) / lanes->cuts;
    const std::size_t units = (bitmap.rows + kLaneUnit - 1) / kLaneUnit;
    const std::size_t width = lanes->chunks * kChunk;
    const double limit = std::max(kMostBytes * static_cast<double>(bitmap.offsets[bitmap.units]),
                                  kExpansions[type] * elements);
    std::vector<std::uint8_t> stream;
    for (std::size_t u = 0; u < units; ++u) {
        lanes->offsets.push_back(stream.size());
        const auto rows = rows_of(bitmap, u);
        std::vector<std::size_t> next(kLaneUnit, 0);
        for (std::size_t c = 0; c < lanes->cuts; ++c) {
            append_cut(rows, c * width, width, bitmap.type, next, stream);
        }
        if (static_cast<double>(stream.size()) > limit) return;
    }
    lanes->offsets.push_back(stream.size());
    lanes->memory = Pages(allocate_pages(stream.size()));
    std::memcpy(lanes->memory.get(), stream.data(), stream.size());
    weight.lanes = std::move(lanes);
    weight.view.lanes = weight.lanes.get();
}

}  // namespace elsa
