#include "sliced32.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <stdexcept>

namespace elsa {
namespace cuda {
namespace {

constexpr std::size_t kLeastSlab = 512;       // columns: below, packets are mostly padding
constexpr std::size_t kWarpsWanted = 16;      // of a multiprocessor, to keep its loads in flight
constexpr std::size_t kWarpsOfBlock = 8;

struct Entry {
    std::uint8_t step;     // first of a packet: from the packet before; others: from the first
    std::uint32_t column;  // where the value is, or none
};
constexpr std::uint32_t kNone = 0xffffffffu;

std::size_t up(std::size_t value, std::size_t unit) { return (value + unit - 1) / unit * unit; }

// One row of one slab as whole packets. `bases` takes where each packet starts from.
void encode(const std::vector<std::uint32_t>& columns, std::vector<Entry>& entries,
            std::vector<std::uint16_t>& bases) {
    entries.clear();
    bases.clear();
    std::uint32_t base = 0;
    std::size_t next = 0;
    while (next < columns.size()) {
        bases.push_back(static_cast<std::uint16_t>(base));
        const std::uint32_t gap = columns[next] - base;
        if (gap > kReach) {  // a packet that only goes on
            base += kReach;
            entries.push_back({static_cast<std::uint8_t>(kReach), kNone});
            entries.insert(entries.end(), kPacket - 1, {0, kNone});
            continue;
        }
        base = columns[next];
        entries.push_back({static_cast<std::uint8_t>(gap), columns[next++]});
        for (std::uint32_t i = 1; i < kPacket; ++i) {
            if (next < columns.size() && columns[next] - base <= kReach) {
                const auto step = static_cast<std::uint8_t>(columns[next] - base);
                entries.push_back({step, columns[next++]});
            } else {
                entries.push_back({0, kNone});
            }
        }
    }
    bases.push_back(static_cast<std::uint16_t>(base));
}

struct EncodedRow {
    std::vector<Entry> entries;
    std::vector<std::uint16_t> bases;  // packets + 1

    std::size_t packets() const { return bases.size() - 1; }
};

bool is_zero(const std::uint8_t* value, std::size_t bytes) {
    return std::all_of(value, value + bytes, [](std::uint8_t byte) { return byte == 0; });
}

// Where value `i` of a lane lies in the values of a packet: 16 bytes of each lane side by side.
std::size_t value_place(std::size_t lane, std::size_t i, std::size_t bytes) {
    const std::size_t most = 16 / bytes, piece = std::min<std::size_t>(most, kPacket);
    return (i / piece * kLanes * piece + lane * piece + i % piece) * bytes;
}

// Appends to a Sliced, block of rows by block of rows.
class Writer {
public:
    explicit Writer(Sliced& made) : made_(made), bytes_(bytes_of(made.value)) {}

    // rows: kBlockRows dense rows of all columns; numbers: of each inside its group.
    void add_block(const std::vector<std::uint8_t>& rows, const std::uint16_t* numbers) {
        for (std::size_t slab = 0; slab < made_.plan.slabs; ++slab) add_slab(rows, numbers, slab);
    }

private:
    void add_slab(const std::vector<std::uint8_t>& rows, const std::uint16_t* numbers,
                  std::size_t slab) {
        const std::size_t first = slab * made_.plan.slab_columns;
        const std::size_t last = std::min(made_.columns, first + made_.plan.slab_columns);
        std::vector<EncodedRow> encoded(kBlockRows);
        std::vector<std::uint32_t> columns;
        for (std::size_t row = 0; row < kBlockRows; ++row) {
            columns.clear();
            for (std::size_t column = first; column < last; ++column) {
                if (is_zero(at(rows, row, column), bytes_)) continue;
                columns.push_back(static_cast<std::uint32_t>(column - first));
            }
            made_.nonzeros += columns.size();
            encode(columns, encoded[row].entries, encoded[row].bases);
        }
        std::vector<std::uint8_t> order(kBlockRows);
        std::iota(order.begin(), order.end(), std::uint8_t{0});
        std::stable_sort(order.begin(), order.end(), [&](std::uint8_t a, std::uint8_t b) {
            return encoded[a].packets() > encoded[b].packets();
        });
        for (const std::uint8_t row : order) made_.order.push_back(numbers[row]);
        for (std::size_t slice = 0; slice < kSlices; ++slice) {
            add_slice(rows, first, encoded, order.data() + slice * kLanes);
        }
    }

    void add_slice(const std::vector<std::uint8_t>& rows, std::size_t first,
                   const std::vector<EncodedRow>& encoded, const std::uint8_t* order) {
        const std::size_t packets = encoded[order[0]].packets();
        const std::size_t start = made_.stream.size();
        if (made_.starts.back() + packets > 0xffffffffu) {
            throw std::invalid_argument("the weight has more packets than 32 bits count");
        }
        made_.starts.push_back(made_.starts.back() + static_cast<std::uint32_t>(packets));
        made_.stream.resize(start + packets * packet_bytes(made_.value), 0);
        for (std::size_t lane = 0; lane < kLanes; ++lane) {
            const EncodedRow& row = encoded[order[lane]];
            for (std::size_t i = 0; i < row.entries.size(); ++i) {
                std::uint8_t* packet = made_.stream.data() + start +
                                       i / kPacket * packet_bytes(made_.value);
                const Entry& entry = row.entries[i];
                packet[lane * kPacket + i % kPacket] = entry.step;
                if (entry.column == kNone) continue;
                std::memcpy(packet + kIndexBytes + value_place(lane, i % kPacket, bytes_),
                            at(rows, order[lane], first + entry.column), bytes_);
            }
        }
        for (std::size_t part = 0; part < made_.plan.parts; ++part) {
            const std::size_t packet = packets * part / made_.plan.parts;
            for (std::size_t lane = 0; lane < kLanes; ++lane) {
                const EncodedRow& row = encoded[order[lane]];
                made_.bases.push_back(row.bases[std::min(packet, row.packets())]);
            }
        }
    }

    const std::uint8_t* at(const std::vector<std::uint8_t>& rows, std::size_t row,
                           std::size_t column) const {
        return rows.data() + (row * made_.columns + column) * bytes_;
    }

    Sliced& made_;
    std::size_t bytes_;
};

void check(const Plan& plan, std::size_t rows, std::size_t columns) {
    constexpr std::size_t most = std::size_t{1} << 31;
    if (rows == 0 || columns == 0 || rows > most || columns > most) {
        throw std::invalid_argument("the weight has no rows or columns, or more than 2^31");
    }
    const std::size_t covered = std::size_t{plan.slabs} * plan.slab_columns;
    const bool cut = plan.slabs > 0 && plan.slab_columns <= kSlabColumns && covered >= columns &&
                     covered - columns < plan.slab_columns;
    const bool shared = plan.parts > 0 && plan.parts <= kMostParts;
    const bool whole = plan.slices_per_block == 1 || plan.slices_per_block == 2 ||
                       plan.slices_per_block == 4;
    const bool grouped = plan.group_rows > 0 && plan.group_rows % kBlockRows == 0 &&
                         plan.group_rows <= kMostGroup;
    if (!cut || !shared || !whole || !grouped || plan.warps() > kMostWarps) {
        throw std::invalid_argument("the plan does not fit the weight");
    }
}

// Rows of a group, those with most values first; whole blocks, so some may lie beyond the matrix.
std::vector<std::uint16_t> by_count(std::size_t first, std::size_t rows, std::size_t columns,
                                    std::size_t bytes, const ReadRow& read_row) {
    std::vector<std::size_t> counts(up(rows, kBlockRows), 0);
    std::vector<std::uint8_t> dense(columns * bytes);
    for (std::size_t row = 0; row < rows; ++row) {
        read_row(first + row, dense.data());
        for (std::size_t i = 0; i < columns; ++i) {
            counts[row] += is_zero(dense.data() + i * bytes, bytes) ? 0 : 1;
        }
    }
    std::vector<std::uint16_t> order(counts.size());
    std::iota(order.begin(), order.end(), std::uint16_t{0});
    std::stable_sort(order.begin(), order.end(),
                     [&](std::uint16_t a, std::uint16_t b) { return counts[a] > counts[b]; });
    return order;
}

}  // namespace

Plan plan_for(std::size_t rows, std::size_t columns, std::size_t nonzeros,
              std::size_t multiprocessors) {
    const std::size_t slices = up(rows, kBlockRows) / kLanes;
    const std::size_t least = (columns + kSlabColumns - 1) / kSlabColumns;
    const std::size_t wanted = (multiprocessors + slices - 1) / slices;
    std::size_t slabs = std::max(least, std::min(wanted, columns / kLeastSlab));
    Plan plan;
    plan.slab_columns = static_cast<std::uint32_t>(up((columns + slabs - 1) / slabs, kPacket));
    slabs = (columns + plan.slab_columns - 1) / plan.slab_columns;  // rounding may save one
    plan.slabs = static_cast<std::uint32_t>(slabs);
    const std::size_t packets = nonzeros / (slices * slabs * kLanes * kPacket);
    while (plan.parts < kMostParts && packets >= 4 * plan.parts &&
           slices * slabs * plan.parts < kWarpsWanted * multiprocessors) {
        plan.parts *= 2;
    }
    while (plan.slices_per_block < kSlices && 2 * plan.warps() <= kWarpsOfBlock &&
           slices * slabs / (2 * plan.slices_per_block) >= multiprocessors) {
        plan.slices_per_block *= 2;
    }
    const std::size_t fit = kGroupBytes / (columns * sizeof(float)) / kBlockRows * kBlockRows;
    const std::size_t most = std::min<std::size_t>(kMostGroup, up(rows, kBlockRows));
    plan.group_rows =
        static_cast<std::uint32_t>(std::max<std::size_t>(kBlockRows, std::min(fit, most)));
    return plan;
}

Sliced slice(std::size_t rows, std::size_t columns, Value value, const Plan& plan,
             const ReadRow& read_row) {
    check(plan, rows, columns);
    Sliced made;
    made.rows = rows;
    made.columns = columns;
    made.value = value;
    made.plan = plan;
    made.starts.push_back(0);
    Writer writer(made);
    const std::size_t row_bytes = columns * bytes_of(value);
    std::vector<std::uint8_t> dense(kBlockRows * row_bytes);
    for (std::size_t first = 0; first < rows; first += plan.group_rows) {
        const std::size_t here = std::min<std::size_t>(plan.group_rows, rows - first);
        const std::vector<std::uint16_t> order =
            by_count(first, here, columns, bytes_of(value), read_row);
        for (std::size_t block = 0; block < order.size(); block += kBlockRows) {
            std::fill(dense.begin(), dense.end(), std::uint8_t{0});
            for (std::size_t row = 0; row < kBlockRows; ++row) {
                const std::size_t number = order[block + row];
                if (number < here) read_row(first + number, dense.data() + row * row_bytes);
            }
            writer.add_block(dense, order.data() + block);
        }
    }
    return made;
}

}  // namespace cuda
}  // namespace elsa
