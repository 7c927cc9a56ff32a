#include "lanes.h"

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "packing.h"
#include "pages.h"

namespace elsa {
namespace {

// Beyond these a token, which reads all of it from memory, is as fast with a bitmap: by density, of
// float32, bfloat16, float16, int8 (Zen 4, December 2026; elsewhere nobody measured, and a lower one is
// taken, by counting instructions);
constexpr double kMostDensity[] = {0.26, 0.34, 0.34, 0.22};
constexpr double kMostUnmeasured = 0.12;
// and by bytes, where both wait for memory, or where a bitmap waits for its expansions. Zeros anywhere
// take 1.35 times the bytes of a bitmap at 80 % (int8), 1.1 at 90 %; very small weights more.
constexpr double kMostBytes = 1.4;                       // times a bitmap's
constexpr double kExpansions[] = {0.8, 0.6, 0.6, 0.45};  // bytes an element

// Longest stretches that are tried, times the mean, and what a slice costs beside its steps, as bytes read
// meanwhile.
constexpr double kStretches[] = {1.0, 1.25, 1.5, 2.0};
constexpr std::size_t kSliceCost = 96;
constexpr std::size_t kMostSlices = 255;

using Row = std::vector<Entry>;

// The non-zeros of the rows of a unit.
std::vector<Row> rows_of(const Packed& bitmap, std::size_t unit) {
    std::vector<Row> rows(kLaneUnit);
    const std::size_t groups = kLaneUnit / kGroupRows, bytes = value_bytes(bitmap.type);
    const std::size_t last = std::min(bitmap.units, (unit + 1) * groups);
    for (std::size_t g = unit * groups; g < last; ++g) {
        for_each_of_group(bitmap, g, [&](std::size_t n, std::size_t k, const std::uint8_t* value) {
            Entry entry{static_cast<std::uint32_t>(k), 0};
            std::memcpy(&entry.bits, value, bytes);
            rows[n - unit * kLaneUnit].push_back(entry);
        });
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

// Entries of a row that one lane takes.
struct Stretch {
    std::size_t row = 0, first = 0, count = 0;
};

// Bytes of the steps of a slice whose longest stretch has `count` entries.
std::size_t step_bytes(std::size_t count, Type type) {
    const std::size_t bytes = value_bytes(type), entry = kLaneRows * bytes;
    const std::size_t whole = kLaneColumns + kLaneEntries * entry;
    if (type == Type::s8) return (count + kLaneEntries - 1) / kLaneEntries * whole;
    const std::size_t rest = count % kLaneEntries;
    const std::size_t more = rest > 0 ? kLaneColumns + round_up(rest * entry, kAlign) : 0;
    return count / kLaneEntries * whole + more;
}

// Rows cut into stretches of at most `longest`, the long ones first; those of one row apart, where that
// is possible, since what they add to its sum waits for one another.
std::vector<Stretch> stretches(const std::vector<Stretch>& rows, std::size_t longest) {
    std::vector<Stretch> found;
    bool more = true;
    for (std::size_t done = 0; more; done += longest) {
        more = false;
        for (const Stretch& row : rows) {
            if (row.count <= done) continue;
            found.push_back({row.row, row.first + done, std::min(longest, row.count - done)});
            more = more || row.count > done + longest;
        }
    }
    std::stable_sort(found.begin(), found.end(),
                     [](const Stretch& a, const Stretch& b) { return a.count > b.count; });
    return found;
}

std::size_t slices_of(const std::vector<Stretch>& found) {
    return (found.size() + kLaneRows - 1) / kLaneRows;
}

std::size_t cost_of(const std::vector<Stretch>& found, Type type) {
    std::size_t cost = 0;
    for (std::size_t i = 0; i < found.size(); i += kLaneRows) {
        cost += kSliceCost + step_bytes(found[i].count, type);
    }
    return cost;
}

// Appends a cut, of whose rows the stretches are given.
void append_cut(const std::vector<Row>& rows, const std::vector<Stretch>& found,
                std::size_t first_column, Type type, std::vector<std::uint8_t>& stream) {
    const std::size_t head = stream.size(), slices = slices_of(found);
    stream.resize(head + lane_head(slices), 0);
    stream[head] = static_cast<std::uint8_t>(slices);
    for (std::size_t s = 0; s < slices; ++s) {
        const std::size_t longest = found[s * kLaneRows].count;
        const bool whole = type == Type::s8;
        stream[head + 1 + s] = static_cast<std::uint8_t>(
            (longest + (whole ? kLaneEntries - 1 : 0)) / kLaneEntries);
        stream[head + 1 + slices + s] =
            static_cast<std::uint8_t>(whole ? 0 : longest % kLaneEntries);
        const std::size_t begin = stream.size();
        stream.resize(begin + step_bytes(longest, type), 0);
        for (std::size_t lane = 0; lane < kLaneRows; ++lane) {
            if (s * kLaneRows + lane >= found.size()) break;  // lanes of nothing add 0 to row 0
            const Stretch& each = found[s * kLaneRows + lane];
            stream[head + 1 + 2 * slices + s * kLaneRows + lane] =
                static_cast<std::uint8_t>(each.row);
            write_row(rows[each.row].data() + each.first, each.count, lane, first_column, type,
                      stream.data() + begin);
        }
    }
}

// Appends the cut that begins at column `first` to the stream; `next`: the first entry of each row in it.
void append_best_cut(const std::vector<Row>& rows, std::size_t first, std::size_t width, Type type,
                     std::vector<std::size_t>& next, std::vector<std::uint8_t>& stream) {
    std::vector<Stretch> there;
    for (std::size_t r = 0; r < kLaneUnit; ++r) {
        std::size_t end = next[r];
        while (end < rows[r].size() && rows[r][end].column < first + width) ++end;
        if (end > next[r]) there.push_back({r, next[r], end - next[r]});
        next[r] = end;
    }
    std::size_t entries = 0;
    for (const Stretch& row : there) entries += row.count;
    std::vector<Stretch> best = stretches(there, width);
    for (const double times : kStretches) {
        const double wanted = times * static_cast<double>(entries) / static_cast<double>(kLaneUnit);
        const std::size_t longest =
            round_up(std::max(std::size_t{1}, static_cast<std::size_t>(wanted)), kLaneEntries);
        std::vector<Stretch> found = stretches(there, longest);
        if (slices_of(found) > kMostSlices) continue;
        if (cost_of(found, type) < cost_of(best, type)) best = std::move(found);
    }
    append_cut(rows, best, first, type, stream);
}

}  // namespace

void add_lanes(Owned& weight, const Kernels& kernels) {
    const Packed& bitmap = weight.view;
    const auto type = static_cast<std::size_t>(bitmap.type);
    const Kind kind = bitmap.type == Type::s8 ? Kind::s8_by_s16 : static_cast<Kind>(bitmap.type);
    if (kernels.lanes[static_cast<int>(kind)] == nullptr || bitmap.format != Format::bitmap) return;
    const double elements = static_cast<double>(bitmap.rows) * static_cast<double>(bitmap.columns);
    const double density = made_by_amd() ? kMostDensity[type] : kMostUnmeasured;
    if (static_cast<double>(bitmap.nonzeros) > density * elements) return;
    auto lanes = std::make_unique<Lanes>();
    const std::size_t most = lane_cut(bitmap.type) / kChunk;
    lanes->cuts = (bitmap.chunks + most - 1) / most;
    lanes->chunks = (bitmap.chunks + lanes->cuts - 1) / lanes->cuts;
    const std::size_t units = (bitmap.rows + kLaneUnit - 1) / kLaneUnit;
    const std::size_t width = lanes->chunks * kChunk;
    const double limit = std::max(kMostBytes * static_cast<double>(bitmap.offsets[bitmap.units]),
                                  kExpansions[type] * elements);
    std::vector<std::uint8_t> stream;
    stream.reserve(bitmap.size + bitmap.size / 4);
    for (std::size_t u = 0; u < units; ++u) {
        lanes->offsets.push_back(stream.size());
        const auto rows = rows_of(bitmap, u);
        std::vector<std::size_t> next(kLaneUnit, 0);
        for (std::size_t c = 0; c < lanes->cuts; ++c) {
            append_best_cut(rows, c * width, width, bitmap.type, next, stream);
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
