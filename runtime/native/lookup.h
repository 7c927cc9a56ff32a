// A Gather of rows of a packed weight, as an embedding does: rows are unpacked when they are read.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "provider.h"
#include "unpack_node.h"

namespace elsa {

struct Lookup {
    std::string node;
    Unpacking table;
};

// The lookup a node does in a packed table, or none.
std::optional<Lookup> lookup_of(const ort::Api& api, const ort::Node* node);

// One fused lookup at run time, with a copy of its table.
struct CompiledLookup : Compiled {
    CompiledLookup(const ort::Api& api, const Lookup& lookup);
    void compute(ort::KernelContext* context) const override;

    std::vector<std::uint8_t> mask, values;
    Bitmask table;
    std::vector<std::int64_t> row_sizes;  // all sizes of the table but the first
    std::vector<std::uint32_t> starts;
};

}  // namespace elsa
