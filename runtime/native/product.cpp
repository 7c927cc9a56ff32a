// What a node of a graph multiplies with.
#include <cmath>
#include <cstring>
#include <vector>

#include "half.h"
#include "provider.h"

namespace elsa {
namespace {

constexpr const char* kNotOurInt8 =
    "a quantised weight that is not an int8 matrix with one constant scale for each output";

// Gemm is ours when it is x * W + bias, whichever way W lies.
bool plain_gemm(const ort::Api& api, const ort::Node* node, Product& product, std::string& why) {
    const auto whole = [&](const char* name) {
        return attribute(api, node, name, std::int64_t{0});
    };
    const auto real = [&](const char* name) { return attribute(api, node, name, 1.0f); };
    if (whole("transA") != 0 || real("alpha") != 1.0f || real("beta") != 1.0f) {
        why = "a Gemm with transA, alpha or beta";
        return false;
    }
    product.transposed = whole("transB") != 0;
    return true;
}

bool read_bias(const ort::Api& api, const ort::ValueInfo* input, Product& product,
               std::string& why) {
    if (input == nullptr) return true;
    const ort::Value* bias = constant(api, input);
    if (bias == nullptr) {
        why = "a bias that is not constant";
        return false;
    }
    const Shape shape = shape_of(api, bias);
    const bool fits = !shape.sizes.empty() && shape.sizes.size() <= 2 &&
                      elements(shape) == product.rows &&
                      static_cast<std::size_t>(shape.sizes.back()) == product.rows;
    if (shape.type != ort::kFloat || !fits) {
        why = "a bias that is not one float32 for each output";
        return false;
    }
    const auto* data = static_cast<const float*>(data_of(api, bias));
    product.bias.assign(data, data + product.rows);
    return true;
}

// Products have one output.
std::string output_of(const ort::Api& api, const ort::Node* node) {
    const ort::ValueInfo* output = nullptr;
    check(api, api.Node_GetOutputs(node, &output, 1));
    return name_of(api, output);
}

bool all_zero(const ort::Api& api, const ort::ValueInfo* input) {
    const ort::Value* value = constant(api, input);
    if (value == nullptr) return false;
    const Shape shape = shape_of(api, value);
    if (shape.type != ort::kInt8) return false;
    const auto* data = static_cast<const std::int8_t*>(data_of(api, value));
    for (std::size_t i = 0; i < elements(shape); ++i) {
        if (data[i] != 0) return false;
    }
    return true;
}

// The DequantizeLinear that makes a weight for this product alone, or null.
const ort::Node* widening_of(const ort::Api& api, const ort::ValueInfo* input) {
    const ort::Node* node = only_producer(api, input);
    return node != nullptr && is_operator(api, node, "", "DequantizeLinear") ? node : nullptr;
}

void set_shape(const Shape& shape, Product& product) {
    product.rows = static_cast<std::size_t>(shape.sizes[product.transposed ? 0 : 1]);
    product.columns = static_cast<std::size_t>(shape.sizes[product.transposed ? 1 : 0]);
}

// An int8 weight, one scale for each output or for all, no zero point.
bool read_integers(const ort::Api& api, Product& product, std::string& why) {
    const auto inputs = inputs_of(api, product.widening);
    const ort::Value* weight = constant(api, inputs[0]);
    why = kNotOurInt8;
    if (weight == nullptr) return false;
    const Shape shape = shape_of(api, weight);
    if (shape.type != ort::kInt8 || shape.sizes.size() != 2) return false;
    set_shape(shape, product);
    if (!read_scales(api, product, why)) return false;
    product.integers = static_cast<const std::int8_t*>(data_of(api, weight));
    return true;
}

bool read_weight(const ort::Api& api, const ort::ValueInfo* input, Product& product,
                 std::string& why) {
    if (product.packed) return read_packed(api, product, why);
    if (product.widening != nullptr) return read_integers(api, product, why);
    const ort::Value* weight = constant(api, input);
    const Shape shape = shape_of(api, weight);
    if (shape.type != ort::kFloat || shape.sizes.size() != 2) {
        why = "a weight that is not a float32 matrix";
        return false;
    }
    set_shape(shape, product);
    product.data = static_cast<const float*>(data_of(api, weight));
    return true;
}

// A weight that is packed in the file, perhaps behind a DequantizeLinear or a Cast.
bool find_packed(const ort::Api& api, const ort::ValueInfo* input, Product& product) {
    product.packed = unpacking_of(api, input);
    if (product.packed) return true;
    const ort::Node* node = only_producer(api, input);
    if (node == nullptr) return false;
    if (!is_operator(api, node, "", "DequantizeLinear") && !is_operator(api, node, "", "Cast")) {
        return false;
    }
    product.packed = unpacking_of(api, inputs_of(api, node)[0]);
    if (product.packed) product.widening = node;
    return product.packed.has_value();
}

}  // namespace

bool read_scales(const ort::Api& api, Product& product, std::string& why) {
    const ort::Node* node = product.widening;
    const auto inputs = inputs_of(api, node);
    const ort::Value* scale = inputs.size() > 1 ? constant(api, inputs[1]) : nullptr;
    why = kNotOurInt8;
    if (scale == nullptr) return false;
    const Shape scales = shape_of(api, scale);
    if (scales.type != ort::kFloat || scales.sizes.size() > 1) return false;
    if (inputs.size() > 2 && inputs[2] != nullptr && !all_zero(api, inputs[2])) {
        why = "a quantised weight with a zero point";
        return false;
    }
    std::int64_t axis = attribute(api, node, "axis", std::int64_t{1});
    axis = axis < 0 ? axis + 2 : axis;
    const bool by_row = axis == (product.transposed ? 0 : 1);
    const bool blocks = attribute(api, node, "block_size", std::int64_t{0}) != 0;
    const std::int64_t made = attribute(api, node, "output_dtype", std::int64_t{0});
    if (made != 0 && made != ort::kFloat) return false;
    const auto* data = static_cast<const float*>(data_of(api, scale));
    if (!blocks && elements(scales) == 1) {
        product.scales.assign(product.rows, data[0]);
    } else if (!blocks && by_row && elements(scales) == product.rows) {
        product.scales.assign(data, data + product.rows);
    } else {
        return false;
    }
    for (const float each : product.scales) {
        if (std::isfinite(each) && each >= 0.0f) continue;
        why = "a quantised weight with a scale that is negative or not finite";
        return false;
    }
    why.clear();
    return true;
}

std::optional<Product> product_of(const ort::Api& api, const ort::Node* node, std::string& why) {
    const char *op = nullptr, *domain = nullptr, *name = nullptr;
    check(api, api.Node_GetOperatorType(node, &op));
    check(api, api.Node_GetDomain(node, &domain));
    const bool gemm = std::strcmp(op, "Gemm") == 0;
    if (!gemm && std::strcmp(op, "MatMul") != 0) return std::nullopt;
    if (*domain != '\0' && std::strcmp(domain, "ai.onnx") != 0) return std::nullopt;
    check(api, api.Node_GetName(node, &name));
    Product product;
    product.op = op;
    product.output = output_of(api, node);
    product.node = *name != '\0' ? name : product.output;  // names are optional
    const auto inputs = inputs_of(api, node);
    if (inputs.size() < 2 || inputs.size() > 3 || inputs[0] == nullptr) return std::nullopt;
    if (constant(api, inputs[0]) != nullptr) return std::nullopt;  // folds away, or should
    product.input = name_of(api, inputs[0]);
    if (constant(api, inputs[1]) == nullptr && !find_packed(api, inputs[1], product)) {
        product.widening = widening_of(api, inputs[1]);
        if (product.widening == nullptr) return std::nullopt;  // a product of two activations
    }
    if (gemm && !plain_gemm(api, node, product, why)) return product;
    if (!read_weight(api, inputs[1], product, why)) return product;
    if (inputs.size() == 3) read_bias(api, inputs[2], product, why);
    return product;
}

std::uint64_t count_nonzeros(const Product& product) {
    if (product.packed) return product.packed->bits.count - 1;
    std::uint64_t count = 0;
    const std::size_t total = product.rows * product.columns;
    for (std::size_t i = 0; i < total && product.data != nullptr; ++i) {
        count += product.data[i] != 0.0f ? 1 : 0;
    }
    for (std::size_t i = 0; i < total && product.integers != nullptr; ++i) {
        count += product.integers[i] != 0 ? 1 : 0;
    }
    return count;
}

Type narrowest_type(const Product& product) {
    std::size_t count = product.rows * product.columns;
    const auto* bytes = reinterpret_cast<const std::uint8_t*>(product.data);
    if (product.packed) {
        count = product.packed->bits.count;
        bytes = product.packed->bits.values;
    }
    bool bf16 = true, f16 = true;
    for (std::size_t i = 0; i < count && (bf16 || f16); ++i) {
        float value;
        std::memcpy(&value, bytes + i * sizeof value, sizeof value);
        bf16 = bf16 && (bits_of(value) & 0xffffu) == 0;
        f16 = f16 && bits_of(from_f16(to_f16(value))) == bits_of(value);
    }
    return bf16 ? Type::bf16 : f16 ? Type::f16 : Type::f32;
}

bool all_finite(const Product& product) {
    const std::size_t total = product.data != nullptr ? product.rows * product.columns : 0;
    for (std::size_t i = 0; i < total; ++i) {
        if (!std::isfinite(product.data[i])) return false;
    }
    return true;
}

std::vector<const ort::Node*> nodes_of(const ort::Api& api, const ort::Graph* graph) {
    std::size_t count = 0;
    check(api, api.Graph_GetNumNodes(graph, &count));
    std::vector<const ort::Node*> nodes(count, nullptr);
    check(api, api.Graph_GetNodes(graph, nodes.data(), count));
    return nodes;
}

}  // namespace elsa
