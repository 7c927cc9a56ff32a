#include "graph_values.h"

#include <cstring>
#include <stdexcept>
#include <string>

namespace elsa {
namespace {

// An attribute; null when it is not there.
const ort::OpAttr* find(const ort::Api& api, const ort::Node* node, const char* name) {
    const ort::OpAttr* found = nullptr;
    ort::Status* status = api.Node_GetAttributeByName(node, name, &found);
    if (status == nullptr) return found;
    api.ReleaseStatus(status);
    return nullptr;
}

template <class T>
T read(const ort::Api& api, const ort::OpAttr* found, ort::AttrType type) {
    T value{};
    std::size_t written = 0;
    check(api, api.ReadOpAttr(found, type, &value, sizeof value, &written));
    return value;
}

Shape read_shape(const ort::Api& api, const ort::TensorInfo* info) {
    Shape shape;
    std::size_t count = 0;
    check(api, api.GetTensorElementType(info, &shape.type));
    check(api, api.GetDimensionsCount(info, &count));
    shape.sizes.resize(count);
    check(api, api.GetDimensions(info, shape.sizes.data(), count));
    return shape;
}

}  // namespace

void check(const ort::Api& api, ort::Status* status) {
    if (status == nullptr) return;
    const std::string message = api.GetErrorMessage(status);
    api.ReleaseStatus(status);
    throw std::runtime_error(message);
}

Shape shape_of(const ort::Api& api, const ort::Value* value) {
    ort::TensorInfo* info = nullptr;
    check(api, api.GetTensorTypeAndShape(value, &info));
    struct Release {
        const ort::Api& api;
        ort::TensorInfo* info;
        ~Release() { api.ReleaseTensorInfo(info); }
    } release{api, info};
    return read_shape(api, info);
}

std::size_t elements(const Shape& shape) {
    std::size_t total = 1;
    for (const std::int64_t size : shape.sizes) total *= static_cast<std::size_t>(size);
    return total;
}

const void* data_of(const ort::Api& api, const ort::Value* value) {
    void* data = nullptr;
    check(api, api.GetTensorMutableData(const_cast<ort::Value*>(value), &data));
    return data;
}

const ort::Value* constant(const ort::Api& api, const ort::ValueInfo* input) {
    if (input == nullptr) return nullptr;  // an optional input that is not given
    bool is = false;
    check(api, api.ValueInfo_IsConstantInitializer(input, &is));
    if (!is) return nullptr;
    const ort::Value* value = nullptr;
    check(api, api.ValueInfo_GetInitializerValue(input, &value));
    return value;
}

std::vector<const ort::ValueInfo*> inputs_of(const ort::Api& api, const ort::Node* node) {
    std::size_t count = 0;
    check(api, api.Node_GetNumInputs(node, &count));
    std::vector<const ort::ValueInfo*> inputs(count, nullptr);
    check(api, api.Node_GetInputs(node, inputs.data(), count));
    return inputs;
}

std::vector<const ort::ValueInfo*> outputs_of(const ort::Api& api, const ort::Node* node) {
    std::size_t count = 0;
    check(api, api.Node_GetNumOutputs(node, &count));
    std::vector<const ort::ValueInfo*> outputs(count, nullptr);
    check(api, api.Node_GetOutputs(node, outputs.data(), count));
    return outputs;
}

std::string name_of(const ort::Api& api, const ort::ValueInfo* value) {
    const char* name = nullptr;
    check(api, api.GetValueInfoName(value, &name));
    return name;
}

std::optional<Shape> declared_shape(const ort::Api& api, const ort::ValueInfo* value) {
    if (value == nullptr) return std::nullopt;
    const ort::TypeInfo* type = nullptr;
    const ort::TensorInfo* info = nullptr;
    ort::Status* status = api.GetValueInfoTypeInfo(value, &type);
    if (status == nullptr && type != nullptr) status = api.CastTypeInfoToTensorInfo(type, &info);
    if (status != nullptr) api.ReleaseStatus(status);
    if (info == nullptr) return std::nullopt;
    return read_shape(api, info);
}

std::int64_t attribute(const ort::Api& api, const ort::Node* node, const char* name,
                       std::int64_t missing) {
    const ort::OpAttr* found = find(api, node, name);
    return found == nullptr ? missing : read<std::int64_t>(api, found, ort::kAttrInt);
}

float attribute(const ort::Api& api, const ort::Node* node, const char* name, float missing) {
    const ort::OpAttr* found = find(api, node, name);
    return found == nullptr ? missing : read<float>(api, found, ort::kAttrFloat);
}

std::string attribute(const ort::Api& api, const ort::Node* node, const char* name,
                      const std::string& missing) {
    const ort::OpAttr* found = find(api, node, name);
    if (found == nullptr) return missing;
    char text[64] = {};
    std::size_t written = 0;
    check(api, api.ReadOpAttr(found, ort::kAttrString, text, sizeof text - 1, &written));
    return text;
}

std::vector<std::int64_t> attribute_list(const ort::Api& api, const ort::Node* node,
                                         const char* name, std::size_t most) {
    const ort::OpAttr* found = find(api, node, name);
    if (found == nullptr) return {};
    std::vector<std::int64_t> values(most);
    std::size_t bytes = 0;
    ort::Status* status =
        api.ReadOpAttr(found, ort::kAttrInts, values.data(), most * sizeof values[0], &bytes);
    if (status != nullptr) {
        api.ReleaseStatus(status);
        return {};
    }
    values.resize(bytes / sizeof values[0]);
    return values;
}

const ort::Node* only_producer(const ort::Api& api, const ort::ValueInfo* input) {
    const ort::Node* node = nullptr;
    std::size_t output = 0, users = 0;
    if (input == nullptr) return nullptr;
    ort::Status* status = api.ValueInfo_GetValueProducer(input, &node, &output);
    if (status != nullptr) {
        api.ReleaseStatus(status);
        return nullptr;
    }
    if (node == nullptr) return nullptr;
    bool seen_outside = false;
    check(api, api.ValueInfo_GetValueNumConsumers(input, &users));
    check(api, api.ValueInfo_IsGraphOutput(input, &seen_outside));
    return users == 1 && !seen_outside ? node : nullptr;
}

bool is_operator(const ort::Api& api, const ort::Node* node, const char* domain, const char* op) {
    const char *found = nullptr, *of = nullptr;
    check(api, api.Node_GetOperatorType(node, &found));
    if (std::strcmp(found, op) != 0) return false;
    check(api, api.Node_GetDomain(node, &of));
    const bool standard = *domain == '\0' && std::strcmp(of, "ai.onnx") == 0;
    return standard || std::strcmp(of, domain) == 0;
}

}  // namespace elsa
