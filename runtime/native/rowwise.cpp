#include "rowwise.h"

#include <cstring>
#include <utility>

namespace elsa {
namespace {

// Rank and last size of a value that is declared as float32 with a known last size.
struct Row {
    std::size_t rank = 0, width = 0;
};

Row row_of(const ort::Api& api, const ort::ValueInfo* value) {
    const std::optional<Shape> shape = declared_shape(api, value);
    if (!shape || shape->type != ort::kFloat || shape->sizes.empty()) return {};
    if (shape->sizes.back() < 1 || constant(api, value) != nullptr) return {};
    return {shape->sizes.size(), static_cast<std::size_t>(shape->sizes.back())};
}

// A constant float32 vector.
bool read_vector(const ort::Api& api, const ort::ValueInfo* input, std::vector<float>& to) {
    const ort::Value* value = constant(api, input);
    if (value == nullptr) return false;
    const Shape shape = shape_of(api, value);
    if (shape.type != ort::kFloat || shape.sizes.size() != 1 || shape.sizes[0] < 1) return false;
    const auto* data = static_cast<const float*>(data_of(api, value));
    to.assign(data, data + shape.sizes[0]);
    return true;
}

bool read_norm(const ort::Api& api, const ort::Node* node,
               const std::vector<const ort::ValueInfo*>& inputs, RowNode& made) {
    if (inputs.size() < 2 || inputs.size() > 3) return false;
    const Row row = row_of(api, inputs[0]);
    const std::int64_t axis = attribute(api, node, "axis", std::int64_t{-1});
    if (axis != -1 && axis != static_cast<std::int64_t>(row.rank) - 1) return false;
    if (attribute(api, node, "stash_type", std::int64_t{1}) != ort::kFloat) return false;
    if (!read_vector(api, inputs[1], made.scale) || made.scale.size() != row.width) return false;
    const bool biased = inputs.size() == 3 && inputs[2] != nullptr;
    if (biased && (made.kind != RowOp::layer_norm || !read_vector(api, inputs[2], made.bias) ||
                   made.bias.size() != made.scale.size())) {
        return false;
    }
    made.epsilon = attribute(api, node, "epsilon", 1e-5f);
    made.inputs = {name_of(api, inputs[0])};
    return true;
}

bool read_pair(const ort::Api& api, const std::vector<const ort::ValueInfo*>& inputs,
               RowNode& made) {
    if (inputs.size() != 2 || inputs[0] == nullptr || inputs[1] == nullptr) return false;
    for (std::size_t i = 0; i < 2 && made.kind == RowOp::add; ++i) {
        if (!read_vector(api, inputs[i], made.bias)) continue;
        made.kind = RowOp::add_constant;
        made.inputs = {name_of(api, inputs[1 - i])};
        return row_of(api, inputs[1 - i]).width == made.bias.size();
    }
    const Row first = row_of(api, inputs[0]), second = row_of(api, inputs[1]);
    made.inputs = {name_of(api, inputs[0]), name_of(api, inputs[1])};
    return first.rank > 0 && first.rank == second.rank && first.width == second.width;
}

bool read_function(const ort::Api& api, const ort::Node* node,
                   const std::vector<const ort::ValueInfo*>& inputs, RowNode& made) {
    if (inputs.size() != 1 || row_of(api, inputs[0]).rank == 0) return false;
    if (made.op == "Sigmoid") {
        made.function = Function::sigmoid;
    } else if (made.op == "Relu") {
        made.function = Function::relu;
    } else if (made.op == "Gelu") {
        const std::string how = attribute(api, node, "approximate", std::string("none"));
        if (how != "none" && how != "tanh") return false;
        made.function = how == "tanh" ? Function::gelu_tanh : Function::gelu;
    } else {  // Swish
        if (attribute(api, node, "alpha", 1.0f) != 1.0f) return false;
        made.function = Function::silu;
    }
    made.inputs = {name_of(api, inputs[0])};
    return true;
}

}  // namespace

std::optional<RowNode> row_node_of(const ort::Api& api, const ort::Node* node) {
    static const std::pair<const char*, RowOp> kOps[] = {
        {"RMSNormalization", RowOp::rms_norm}, {"SimplifiedLayerNormalization", RowOp::rms_norm},
        {"LayerNormalization", RowOp::layer_norm}, {"Add", RowOp::add}, {"Mul", RowOp::times},
        {"Sigmoid", RowOp::function}, {"Relu", RowOp::function}, {"Gelu", RowOp::function},
        {"Swish", RowOp::function},
    };
    RowNode made;
    for (const auto& [name, kind] : kOps) {
        if (!is_operator(api, node, "", name)) continue;
        made.op = name;
        made.kind = kind;
    }
    const auto outputs = outputs_of(api, node);
    if (made.op.empty() || outputs.empty() || outputs[0] == nullptr) return std::nullopt;
    for (std::size_t i = 1; i < outputs.size(); ++i) {
        if (outputs[i] != nullptr) return std::nullopt;  // the mean or deviation of a norm
    }
    const auto inputs = inputs_of(api, node);
    bool read = false;
    switch (made.kind) {
        case RowOp::rms_norm:
        case RowOp::layer_norm: read = read_norm(api, node, inputs, made); break;
        case RowOp::add:
        case RowOp::add_constant:
        case RowOp::times: read = read_pair(api, inputs, made); break;
        case RowOp::function: read = read_function(api, node, inputs, made); break;
    }
    const Row row = row_of(api, outputs[0]);
    if (!read || row.rank == 0) return std::nullopt;
    made.width = row.width;
    made.output = name_of(api, outputs[0]);
    const char* name = nullptr;
    check(api, api.Node_GetName(node, &name));
    made.node = *name != '\0' ? name : made.output;
    return made;
}

}  // namespace elsa
