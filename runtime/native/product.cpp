// What a node of a graph multiplies with.
#include <cstring>
#include <stdexcept>
#include <vector>

#include "provider.h"

namespace elsa {

void check(const ort::Api& api, ort::Status* status) {
    if (status == nullptr) return;
    const std::string message = api.GetErrorMessage(status);
    api.ReleaseStatus(status);
    throw std::runtime_error(message);
}

namespace {

struct Shape {
    int type = 0;
    std::vector<std::int64_t> sizes;
};

Shape shape_of(const ort::Api& api, const ort::Value* value) {
    ort::TensorInfo* info = nullptr;
    check(api, api.GetTensorTypeAndShape(value, &info));
    struct Release {
        const ort::Api& api;
        ort::TensorInfo* info;
        ~Release() { api.ReleaseTensorInfo(info); }
    } release{api, info};
    Shape shape;
    std::size_t count = 0;
    check(api, api.GetTensorElementType(info, &shape.type));
    check(api, api.GetDimensionsCount(info, &count));
    shape.sizes.resize(count);
    check(api, api.GetDimensions(info, shape.sizes.data(), count));
    return shape;
}

const void* data_of(const ort::Api& api, const ort::Value* value) {
    void* data = nullptr;
    check(api, api.GetTensorMutableData(const_cast<ort::Value*>(value), &data));
    return data;
}

// The constant behind an input, or null.
const ort::Value* constant(const ort::Api& api, const ort::ValueInfo* input) {
    if (input == nullptr) return nullptr;  // an optional input that is not given
    bool is = false;
    check(api, api.ValueInfo_IsConstantInitializer(input, &is));
    if (!is) return nullptr;
    const ort::Value* value = nullptr;
    check(api, api.ValueInfo_GetInitializerValue(input, &value));
    return value;
}

// An attribute of a node; `missing` when it is not there.
template <class T>
T attribute(const ort::Api& api, const ort::Node* node, const char* name, ort::AttrType type,
            T missing) {
    const ort::OpAttr* found = nullptr;
    ort::Status* status = api.Node_GetAttributeByName(node, name, &found);
    if (status != nullptr) {
        api.ReleaseStatus(status);
        return missing;
    }
    if (found == nullptr) return missing;
    T value{};
    std::size_t written = 0;
    check(api, api.ReadOpAttr(found, type, &value, sizeof value, &written));
    return value;
}

// Gemm is ours when it is x * W + bias, whichever way W lies.
bool plain_gemm(const ort::Api& api, const ort::Node* node, Product& product, std::string& why) {
    const auto whole = [&](const char* name) {
        return attribute<std::int64_t>(api, node, name, ort::kAttrInt, 0);
    };
    const auto real = [&](const char* name) {
        return attribute<float>(api, node, name, ort::kAttrFloat, 1.0f);
    };
    if (whole("transA") != 0 || real("alpha") != 1.0f || real("beta") != 1.0f) {
        why = "a Gemm with transA, alpha or beta";
        return false;
    }
    product.transposed = whole("transB") != 0;
    return true;
}

std::size_t elements(const Shape& shape) {
    std::size_t total = 1;
    for (const std::int64_t size : shape.sizes) total *= static_cast<std::size_t>(size);
    return total;
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

std::vector<const ort::ValueInfo*> inputs_of(const ort::Api& api, const ort::Node* node) {
    std::size_t count = 0;
    check(api, api.Node_GetNumInputs(node, &count));
    std::vector<const ort::ValueInfo*> inputs(count, nullptr);
    check(api, api.Node_GetInputs(node, inputs.data(), count));
    return inputs;
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
    const ort::Node* node = nullptr;
    std::size_t output = 0, users = 0;
    ort::Status* status = api.ValueInfo_GetValueProducer(input, &node, &output);
    if (status != nullptr) {  // a value from an outer graph has no producer here
        api.ReleaseStatus(status);
        return nullptr;
    }
    if (node == nullptr) return nullptr;
    const char* op = nullptr;
    bool seen_outside = false;
    check(api, api.Node_GetOperatorType(node, &op));
    if (std::strcmp(op, "DequantizeLinear") != 0) return nullptr;
    check(api, api.ValueInfo_GetValueNumConsumers(input, &users));
    check(api, api.ValueInfo_IsGraphOutput(input, &seen_outside));
    return users == 1 && !seen_outside ? node : nullptr;
}

void set_shape(const Shape& shape, Product& product) {
    product.rows = static_cast<std::size_t>(shape.sizes[product.transposed ? 0 : 1]);
    product.columns = static_cast<std::size_t>(shape.sizes[product.transposed ? 1 : 0]);
}

// An int8 weight, one scale for each output or for all, no zero point.
bool read_integers(const ort::Api& api, Product& product, std::string& why) {
    const auto inputs = inputs_of(api, product.widening);
    const ort::Value* weight = constant(api, inputs[0]);
    const ort::Value* scale = inputs.size() > 1 ? constant(api, inputs[1]) : nullptr;
    why = "a quantised weight that is not an int8 matrix with one constant scale for each output";
    if (weight == nullptr || scale == nullptr) return false;
    const Shape shape = shape_of(api, weight), scales = shape_of(api, scale);
    if (shape.type != ort::kInt8 || shape.sizes.size() != 2) return false;
    if (scales.type != ort::kFloat || scales.sizes.size() > 1) return false;
    if (inputs.size() > 2 && inputs[2] != nullptr && !all_zero(api, inputs[2])) {
        why = "a quantised weight with a zero point";
        return false;
    }
    set_shape(shape, product);
    const ort::Node* node = product.widening;
    std::int64_t axis = attribute<std::int64_t>(api, node, "axis", ort::kAttrInt, 1);
    axis = axis < 0 ? axis + 2 : axis;
    const bool by_row = axis == (product.transposed ? 0 : 1);
    const bool blocks = attribute<std::int64_t>(api, node, "block_size", ort::kAttrInt, 0) != 0;
    const auto* data = static_cast<const float*>(data_of(api, scale));
    if (!blocks && elements(scales) == 1) {
        product.scales.assign(product.rows, data[0]);
    } else if (!blocks && by_row && elements(scales) == product.rows) {
        product.scales.assign(data, data + product.rows);
    } else {
        return false;
    }
    why.clear();
    product.integers = static_cast<const std::int8_t*>(data_of(api, weight));
    return true;
}

bool read_weight(const ort::Api& api, const ort::ValueInfo* input, Product& product,
                 std::string& why) {
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

}  // namespace

std::optional<Product> product_of(const ort::Api& api, const ort::Node* node, std::string& why) {
    const char *op = nullptr, *domain = nullptr, *name = nullptr;
    check(api, api.Node_GetOperatorType(node, &op));
    check(api, api.Node_GetDomain(node, &domain));
    const bool gemm = std::strcmp(op, "Gemm") == 0;
    if (!gemm && std::strcmp(op, "MatMul") != 0) return std::nullopt;
    if (*domain != '\0' && std::strcmp(domain, "ai.onnx") != 0) return std::nullopt;
    check(api, api.Node_GetName(node, &name));
    Product product;
    product.node = name;
    product.op = op;
    const auto inputs = inputs_of(api, node);
    if (inputs.size() < 2 || inputs.size() > 3 || inputs[0] == nullptr) return std::nullopt;
    if (constant(api, inputs[0]) != nullptr) return std::nullopt;  // folds away, or should
    if (constant(api, inputs[1]) == nullptr) {
        product.widening = widening_of(api, inputs[1]);
        if (product.widening == nullptr) return std::nullopt;  // a product of two activations
    }
    if (gemm && !plain_gemm(api, node, product, why)) return product;
    if (!read_weight(api, inputs[1], product, why)) return product;
    if (inputs.size() == 3) read_bias(api, inputs[2], product, why);
    return product;
}

std::uint64_t count_nonzeros(const Product& product) {
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

}  // namespace elsa
