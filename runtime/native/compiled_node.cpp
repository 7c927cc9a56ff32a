// A fused node: packed weight, and its product with whatever comes in.
#include <stdexcept>
#include <vector>

#include "provider.h"

namespace elsa {
namespace {

Owned pack_product(const Product& product, Format format, Type type) {
    if (product.packed) {
        const float* scales = product.scales.empty() ? nullptr : product.scales.data();
        return pack(product.packed->bits, format, type, scales);
    }
    Dense dense;
    dense.data = product.data;
    dense.rows = product.rows;
    dense.columns = product.columns;
    dense.row_stride = product.transposed ? product.columns : 1;
    dense.column_stride = product.transposed ? 1 : product.rows;
    if (product.integers == nullptr) return pack(dense, format, type);
    // Packing takes values; integer * scale / scale rounds back to the integer.
    std::vector<float> values(product.rows * product.columns);
    for (std::size_t i = 0; i < values.size(); ++i) {
        const std::size_t row = product.transposed ? i / product.columns : i % product.rows;
        values[i] = static_cast<float>(product.integers[i]) * product.scales[row];
    }
    dense.data = values.data();
    return pack(dense, format, type, product.scales.data());
}

// Threads are onnxruntime's own: a second pool beside it made medians three times slower.
struct Pool {
    const ort::Api& api;
    const ort::KernelContext* context;
};

void run_on_pool(void* context, std::size_t tasks, void (*task)(void*, std::size_t), void* data) {
    const Pool& pool = *static_cast<Pool*>(context);
    check(pool.api, pool.api.ParallelFor(pool.context, task, tasks, 0, data));
}

void compute(const CompiledNode& node, ort::KernelContext* context) {
    const ort::Api& api = node.api;
    const Packed& weight = node.weight.view;
    const ort::Value* input = nullptr;
    check(api, api.KernelContext_GetInput(context, 0, &input));
    ort::TensorInfo* info = nullptr;
    check(api, api.GetTensorTypeAndShape(input, &info));
    std::size_t rank = 0;
    int type = 0;
    std::int64_t sizes[16] = {};
    ort::Status* status = api.GetDimensionsCount(info, &rank);
    if (status == nullptr) status = api.GetTensorElementType(info, &type);
    if (status == nullptr && rank >= 1 && rank <= 16) status = api.GetDimensions(info, sizes, rank);
    api.ReleaseTensorInfo(info);
    check(api, status);
    if (type != ort::kFloat || rank < 1 || rank > 16 ||
        sizes[rank - 1] != static_cast<std::int64_t>(weight.columns)) {
        throw std::runtime_error("an input that is not float32 (..., " +
                                 std::to_string(weight.columns) + ")");
    }
    Request request;
    request.tokens = 1;
    for (std::size_t i = 0; i + 1 < rank; ++i) {
        request.tokens *= static_cast<std::size_t>(sizes[i]);
    }
    sizes[rank - 1] = static_cast<std::int64_t>(weight.rows);
    ort::Value* output = nullptr;
    check(api, api.KernelContext_GetOutput(context, 0, sizes, rank, &output));
    void *from = nullptr, *to = nullptr;
    check(api, api.GetTensorMutableData(const_cast<ort::Value*>(input), &from));
    check(api, api.GetTensorMutableData(output, &to));
    request.x = static_cast<const float*>(from);
    request.y = static_cast<float*>(to);
    request.bias = node.bias.empty() ? nullptr : node.bias.data();
    request.s8_activations = node.s8_activations;
    Pool pool{api, context};
    multiply(weight, node.kernels, request, Parallel{&pool, run_on_pool});
}

ort::Status* create_state(ort::NodeComputeInfo* self, ort::ComputeContext*, void** state) {
    *state = self;
    return nullptr;
}

ort::Status* compute_node(ort::NodeComputeInfo* self, void*, ort::KernelContext* context) {
    const auto& node = *static_cast<const CompiledNode*>(self);
    try {
        compute(node, context);
        return nullptr;
    } catch (const std::exception& error) {
        return node.api.CreateStatus(ort::kFail, error.what());
    }
}

void release_state(ort::NodeComputeInfo*, void*) {}

}  // namespace

CompiledNode::CompiledNode(const ort::Api& api_, const Product& product, Format format,
                           const ProviderOptions& options)
    : Compiled(create_state, compute_node, release_state),
      api(api_),
      weight(pack_product(product, format, options.type_of(product))),
      bias(product.bias),
      kernels(kernels_for(options.isa)),
      s8_activations(options.s8_activations) {}

}  // namespace elsa
