#include "lookup.h"

#include <cstring>
#include <stdexcept>

namespace elsa {
namespace {

constexpr std::size_t kMaxRank = 32;

// Row numbers as they come: int32 or int64, negative ones counted from the end.
std::size_t row_at(const void* indices, bool wide, std::size_t i, std::size_t rows) {
    std::int64_t row = wide ? static_cast<const std::int64_t*>(indices)[i]
                            : static_cast<const std::int32_t*>(indices)[i];
    const auto count = static_cast<std::int64_t>(rows);
    if (row < -count || row >= count) {
        throw std::runtime_error("row " + std::to_string(row) + " of a table of " +
                                 std::to_string(rows) + " was asked for");
    }
    return static_cast<std::size_t>(row < 0 ? row + count : row);
}

}  // namespace

std::optional<Lookup> lookup_of(const ort::Api& api, const ort::Node* node) {
    if (!is_operator(api, node, "", "Gather")) return std::nullopt;
    const auto inputs = inputs_of(api, node);
    if (inputs.size() != 2 || attribute(api, node, "axis", std::int64_t{0}) != 0) {
        return std::nullopt;
    }
    std::optional<Unpacking> table = unpacking_of(api, inputs[0]);
    if (!table || table->transposed || constant(api, inputs[1]) != nullptr) return std::nullopt;
    const char* name = nullptr;
    check(api, api.Node_GetName(node, &name));
    return Lookup{name, *table};
}

CompiledLookup::CompiledLookup(const ort::Api& api_, const Lookup& lookup)
    : Compiled(api_),
      mask(lookup.table.bits.mask, lookup.table.bits.mask + lookup.table.bits.mask_bytes),
      values(lookup.table.bits.values,
             lookup.table.bits.values + lookup.table.bits.count * lookup.table.bits.value_bytes),
      table(lookup.table.bits),
      row_sizes(attribute_list(api_, lookup.table.node, "shape", kMaxRank)),
      starts(row_starts(lookup.table.bits)) {
    table.mask = mask.data();
    table.values = values.data();
    row_sizes.erase(row_sizes.begin());
}

void CompiledLookup::compute(ort::KernelContext* context) const {
    const ort::Value* input = nullptr;
    check(api, api.KernelContext_GetInput(context, 0, &input));
    const Shape indices = shape_of(api, input);
    if (indices.type != ort::kInt32 && indices.type != ort::kInt64) {
        throw std::runtime_error("row numbers that are neither int32 nor int64");
    }
    std::vector<std::int64_t> sizes = indices.sizes;
    sizes.insert(sizes.end(), row_sizes.begin(), row_sizes.end());
    ort::Value* output = nullptr;
    check(api, api.KernelContext_GetOutput(context, 0, sizes.data(), sizes.size(), &output));
    void* to = nullptr;
    check(api, api.GetTensorMutableData(output, &to));
    const void* from = data_of(api, input);
    auto* out = static_cast<std::uint8_t*>(to);
    const std::size_t bytes = table.columns * table.value_bytes;
    for (std::size_t i = 0; i < elements(indices); ++i, out += bytes) {
        const std::size_t row = row_at(from, indices.type == ort::kInt64, i, table.rows);
        read_row(table, row, starts[row], out);
    }
}

}  // namespace elsa
