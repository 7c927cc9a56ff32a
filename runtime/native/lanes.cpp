#include "lanes.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <vector>

#include "pages.h"

namespace elsa {
namespace {

// A token reads all of it, and from memory that decides: beyond this a bitmap is as fast (Zen 4,
// December 2026). Random zeros take 0.44 at 80 %, 0.24 at 90 %, rows of very different lengths more.
constexpr double kMostLaneBytes = 0.5;  // an element of the weight
constexpr double kMostLaneDensity = kMostLaneBytes / 2.0;

struct Entry8 {
    std::uint32_t column;
    std::uint8_t value;
};

// The non-zeros of the rows of a unit.
std::vector<std::vector<Entry8>> rows_of(const Packed& bitmap, std::size_t unit) {
    std::vector<std::vector<Entry8>> rows(kLaneUnit);
    const std::size_t groups = kLaneUnit / kGroupRows;
    const std::size_t last = std::min(bitmap.units, (unit + 1) * groups);
    for (std::size_t g = unit * groups; g < last; ++g) {
        const std::uint8_t* at = bitmap.stream + bitmap.offsets[g];
        for (std::size_t c = 0; c < bitmap.chunks; ++c) {
            std::uint64_t masks[kGroupRows];
            std::memcpy(masks, at, kMaskBytes);
            at += kMaskBytes;
            for (std::size_t r = 0; r < kGroupRows; ++r) {
                auto& row = rows[(g - unit * groups) * kGroupRows + r];
                for (std::size_t k = c * kChunk; masks[r] != 0; masks[r] >>= 1, ++k) {
                    if ((masks[r] & 1) != 0) row.push_back({static_cast<std::uint32_t>(k), *at++});
                }
            }
        }
    }
    return rows;
}

// Appends the cut that begins at column `first` to the stream; `next`: the first entry of each row in it.
void append_cut(const std::vector<std::vector<Entry8>>& rows, std::size_t first, std::size_t width,
                std::vector<std::size_t>& next, std::vector<std::uint8_t>& stream) {
    std::size_t end[kLaneUnit], order[kLaneUnit];
    for (std::size_t r = 0; r < kLaneUnit; ++r) {
        end[r] = next[r];
        while (end[r] < rows[r].size() && rows[r][end[r]].column < first + width) ++end[r];
    }
    std::iota(order, order + kLaneUnit, std::size_t{0});
    std::stable_sort(order, order + kLaneUnit, [&](std::size_t a, std::size_t b) {
        return end[a] - next[a] > end[b] - next[b];
    });
    const std::size_t head = stream.size();
    stream.resize(head + kLaneHead, 0);
    for (std::size_t i = 0; i < kLaneUnit; ++i) {
        stream[head + i] = static_cast<std::uint8_t>(order[i]);
    }
    for (std::size_t s = 0; s < kLaneSlices; ++s) {
        const std::size_t longest = end[order[s * kLaneRows]] - next[order[s * kLaneRows]];
        const std::size_t steps = (longest + kLaneEntries - 1) / kLaneEntries;
        stream[head + kLaneUnit + s] = static_cast<std::uint8_t>(steps);
        const std::size_t begin = stream.size();
        stream.resize(begin + steps * kLaneStep, 0);
        for (std::size_t lane = 0; lane < kLaneRows; ++lane) {
            const std::size_t r = order[s * kLaneRows + lane];
            for (std::size_t i = 0; next[r] < end[r]; ++next[r], ++i) {
                std::uint8_t* to = &stream[begin + i / kLaneEntries * kLaneStep +
                                           lane * kLaneEntries + i % kLaneEntries];
                to[0] = static_cast<std::uint8_t>(rows[r][next[r]].column - first);
                to[kLaneStep / 2] = rows[r][next[r]].value;
            }
        }
    }
}

}  // namespace

void add_lanes(Owned& weight, const Kernels& kernels) {
    const Packed& bitmap = weight.view;
    if (kernels.lanes == nullptr || bitmap.format != Format::bitmap || bitmap.type != Type::s8) return;
    const double elements = static_cast<double>(bitmap.rows) * static_cast<double>(bitmap.columns);
    if (static_cast<double>(bitmap.nonzeros) > kMostLaneDensity * elements) return;
    auto lanes = std::make_unique<Lanes>();
    const std::size_t most = kLaneCut / kChunk;
    lanes->cuts = (bitmap.chunks + most - 1) / most;
    lanes->chunks = (bitmap.chunks + lanes->cuts - 1) / lanes->cuts;
    const std::size_t units = (bitmap.rows + kLaneUnit - 1) / kLaneUnit;
    std::vector<std::uint8_t> stream;
    for (std::size_t u = 0; u < units; ++u) {
        lanes->offsets.push_back(stream.size());
        const auto rows = rows_of(bitmap, u);
        std::vector<std::size_t> next(kLaneUnit, 0);
        const std::size_t width = lanes->chunks * kChunk;
        for (std::size_t c = 0; c < lanes->cuts; ++c) append_cut(rows, c * width, width, next, stream);
        if (static_cast<double>(stream.size()) > kMostLaneBytes * elements) return;
    }
    lanes->offsets.push_back(stream.size());
    lanes->memory = Pages(allocate_pages(stream.size()));
    std::memcpy(lanes->memory.get(), stream.data(), stream.size());
    weight.lanes = std::move(lanes);
    weight.view.lanes = weight.lanes.get();
}

}  // namespace elsa
