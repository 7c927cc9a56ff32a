// The nodes elsa.Unpack and elsa.UnpackTransposed of the packed form (docs/packed-format.md).
#pragma once

#include <optional>
#include <string>

#include "bitmask.h"
#include "graph_values.h"

namespace elsa {

// One of these nodes with constant inputs, its bytes checked.
struct Unpacking {
    const ort::Node* node = nullptr;
    bool transposed = false;  // the node gives (columns, rows)
    int type = 0;             // of the values
    Bitmask bits;             // columns: the product of all sizes but the first
};

// The node that makes an input for one reader alone, when it is one of these and sound.
std::optional<Unpacking> unpacking_of(const ort::Api& api, const ort::ValueInfo* input);

// What is wrong with the bytes of such a node; empty when nothing is, or it is another.
std::string damage_of(const ort::Api& api, const ort::Node* node);

}  // namespace elsa
