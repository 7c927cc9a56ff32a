// The plugin execution provider: takes the MatMul and Gemm nodes of an unchanged model whose
// constant weight has enough zeros, packs it when the session is made, lets the dense copy go.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "cost.h"
#include "graph_values.h"
#include "matmul.h"
#include "ort_api.h"
#include "unpack_node.h"

namespace elsa {

constexpr const char* kProviderName = "ElsaSparseExecutionProvider";

// A product with a constant weight, as found in a graph.
struct Product {
    std::string node, op;
    std::string input, output;  // names of the values
    bool transposed = false;    // the weight is (rows, columns), otherwise (columns, rows)
    std::size_t rows = 0, columns = 0;
    const float* data = nullptr;            // float32 weight, or null
    const std::int8_t* integers = nullptr;  // int8 weight behind a DequantizeLinear, or null
    std::vector<float> scales;              // (rows), of the int8 weight
    std::vector<float> bias;                // (rows), or empty
    const ort::Node* widening = nullptr;    // that DequantizeLinear, or the Cast of a packed weight
    std::optional<Unpacking> packed;        // instead of data and integers: packed in the file
};

// From the provider's options (session options "ep.<provider>.<name>").
struct ProviderOptions {
    Type type = Type::f32;        // values: exact, float32, bfloat16, float16, int8
    bool narrow = true;           // exact: two bytes a value where those hold every value of a weight
    bool rounded = true;          // activations: int16 or float32, of int8 values only
    Isa isa = Isa::portable;
    std::optional<Format> format;  // format: bitmap, sliced or rows, instead of the cost model's
    bool lanes = true;            // lanes: auto, or none: without the second form for few tokens
    bool between = true;          // fuse: all, or products: without what stands between them
    bool shared_cache = false;    // cache: copied, or shared: docs/kernels.md
    double least_gain = kLeastGain;  // least_gain: 0 takes every product it can
    // As the file or the options have it; `narrow` is not looked at.
    Type type_of(const Product& product) const;
    // Whether few tokens multiply such values as lanes, if there are kernels for it.
    bool lanes_of(Type values) const { return lanes && (rounded || values != Type::s8); }
};

// How a product's weight is kept.
struct Form {
    Format format = Format::bitmap;
    Type type = Type::f32;
};

// Throws std::invalid_argument.
ProviderOptions read_options(const ort::Api& api, const ort::SessionOptions* session);

// The product a node computes; none, and why, when it is not one of ours.
std::optional<Product> product_of(const ort::Api& api, const ort::Node* node, std::string& why);
std::uint64_t count_nonzeros(const Product& product);
bool all_finite(const Product& product);
// The type that holds every value of a float32 weight unchanged: bfloat16, else float16, else float32.
Type narrowest_type(const Product& product);
std::vector<const ort::Node*> nodes_of(const ort::Api& api, const ort::Graph* graph);

// The constant weight of a product out of the packed form: fills shape, type and scales. False, and
// why, when the kernels do not take it as it lies.
bool read_packed(const ort::Api& api, Product& product, std::string& why);
// The scales of the int8 weight behind a DequantizeLinear, whose shape is known; false otherwise.
bool read_scales(const ort::Api& api, Product& product, std::string& why);
Type packed_type(const Unpacking& packed);

// A fused node at run time; onnxruntime hands it back to be deleted.
struct Compiled : ort::NodeComputeInfo {
    explicit Compiled(const ort::Api& api);
    Compiled(const Compiled&) = delete;
    Compiled& operator=(const Compiled&) = delete;
    virtual ~Compiled() = default;

    // One run; what it throws fails the session's run with its message.
    virtual void compute(ort::KernelContext* context) const = 0;

    const ort::Api& api;
};

// A product, packed.
struct Member {
    Owned weight;
    std::vector<float> bias;
};
Member packed_product(const Product& product, const Form& form);

}  // namespace elsa
