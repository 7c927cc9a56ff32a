// Reading a graph through onnxruntime's C interface: constants, shapes, attributes.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "ort_api.h"

namespace elsa {

struct Shape {
    int type = 0;
    std::vector<std::int64_t> sizes;
};

// Throws std::runtime_error with onnxruntime's message when the status is a failure.
void check(const ort::Api& api, ort::Status* status);

Shape shape_of(const ort::Api& api, const ort::Value* value);
std::size_t elements(const Shape& shape);
const void* data_of(const ort::Api& api, const ort::Value* value);

// The constant behind an input, or null.
const ort::Value* constant(const ort::Api& api, const ort::ValueInfo* input);
std::vector<const ort::ValueInfo*> inputs_of(const ort::Api& api, const ort::Node* node);

// The outputs of a node; null where an optional one is not given.
std::vector<const ort::ValueInfo*> outputs_of(const ort::Api& api, const ort::Node* node);
std::string name_of(const ort::Api& api, const ort::ValueInfo* value);

// Type and sizes that a graph declares for a value, -1 where a size is free; none when it does not
// say or it is no tensor.
std::optional<Shape> declared_shape(const ort::Api& api, const ort::ValueInfo* value);

// An attribute of a node; `missing` when it is not there.
std::int64_t attribute(const ort::Api& api, const ort::Node* node, const char* name,
                       std::int64_t missing);
float attribute(const ort::Api& api, const ort::Node* node, const char* name, float missing);
std::string attribute(const ort::Api& api, const ort::Node* node, const char* name,
                      const std::string& missing);
// Empty when it is not there or has more than `most` entries.
std::vector<std::int64_t> attribute_list(const ort::Api& api, const ort::Node* node,
                                         const char* name, std::size_t most);

// The node that makes an input for one reader alone, or null: a value from an outer graph, an
// output of the graph, or with more readers.
const ort::Node* only_producer(const ort::Api& api, const ort::ValueInfo* input);

// Whether a node is this operator of this domain; "" also means ai.onnx.
bool is_operator(const ort::Api& api, const ort::Node* node, const char* domain, const char* op);

}  // namespace elsa
