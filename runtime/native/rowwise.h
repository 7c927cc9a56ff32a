// Nodes that stand between products and treat every token alone: norms, activations, sums.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "graph_values.h"
#include "kernels.h"

namespace elsa {

enum class RowOp { rms_norm, layer_norm, add, add_constant, times, function };

// Such a node: float32, over the last axis of its inputs.
struct RowNode {
    std::string node, op;
    RowOp kind = RowOp::function;
    Function function = Function::sigmoid;
    std::vector<std::string> inputs;  // one value, or two of the same shape
    std::string output;
    std::vector<float> scale, bias;  // of a norm; the constant of add_constant is `bias`
    float epsilon = 0.0f;
    std::size_t width = 0;  // of the last axis
};

// The node as one of these, or none. Whether two inputs have the same shape is not looked at.
std::optional<RowNode> row_node_of(const ort::Api& api, const ort::Node* node);

}  // namespace elsa
