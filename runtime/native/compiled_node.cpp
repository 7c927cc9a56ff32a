// A fused node: packed weights, and their products with whatever comes in.
#include <new>
#include <stdexcept>
#include <utility>
#include <vector>

#include "provider.h"

namespace elsa {
namespace {

// Threads are onnxruntime's own: a second pool beside it made medians three times slower.
struct Pool {
    const ort::Api& api;
    const ort::KernelContext* context;
};

void run_on_pool(void* context, std::size_t tasks, void (*task)(void*, std::size_t), void* data) {
    const Pool& pool = *static_cast<Pool*>(context);
    check(pool.api, pool.api.ParallelFor(pool.context, task, tasks, 0, data));
}

struct Input {
    const float* data = nullptr;
    std::size_t rank = 0, tokens = 1;
    std::int64_t sizes[16] = {};
};

Input input_of(const ort::Api& api, ort::KernelContext* context, std::size_t columns) {
    const ort::Value* value = nullptr;
    check(api, api.KernelContext_GetInput(context, 0, &value));
    ort::TensorInfo* info = nullptr;
    check(api, api.GetTensorTypeAndShape(value, &info));
    Input input;
    int type = 0;
    std::size_t& rank = input.rank;
    ort::Status* status = api.GetDimensionsCount(info, &rank);
    if (status == nullptr) status = api.GetTensorElementType(info, &type);
    if (status == nullptr && rank >= 1 && rank <= 16) {
        status = api.GetDimensions(info, input.sizes, rank);
    }
    api.ReleaseTensorInfo(info);
    check(api, status);
    if (type != ort::kFloat || rank < 1 || rank > 16 ||
        input.sizes[rank - 1] != static_cast<std::int64_t>(columns)) {
        throw std::runtime_error("an input that is not float32 (..., " + std::to_string(columns) +
                                 ")");
    }
    for (std::size_t i = 0; i + 1 < rank; ++i) {
        input.tokens *= static_cast<std::size_t>(input.sizes[i]);
    }
    void* data = nullptr;
    check(api, api.GetTensorMutableData(const_cast<ort::Value*>(value), &data));
    input.data = static_cast<const float*>(data);
    return input;
}

void compute(const CompiledNode& node, ort::KernelContext* context) {
    const ort::Api& api = node.api;
    Input input = input_of(api, context, node.members.front().weight.view.columns);
    std::vector<Part> parts;
    for (const Member& member : node.members) {
        input.sizes[input.rank - 1] = static_cast<std::int64_t>(member.weight.view.rows);
        ort::Value* output = nullptr;
        check(api, api.KernelContext_GetOutput(context, member.output, input.sizes, input.rank,
                                               &output));
        void* to = nullptr;
        check(api, api.GetTensorMutableData(output, &to));
        parts.push_back({&member.weight.view, member.bias.empty() ? nullptr : member.bias.data(),
                         static_cast<float*>(to)});
    }
    Request request;
    request.x = input.data;
    request.tokens = input.tokens;
    request.rounded = node.rounded;
    Pool pool{api, context};
    multiply(parts.data(), parts.size(), node.kernels, request, Parallel{&pool, run_on_pool});
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
    } catch (const std::bad_alloc&) {
        return node.api.CreateStatus(ort::kFail, "out of memory");
    } catch (const std::exception& error) {
        return node.api.CreateStatus(ort::kFail, error.what());
    }
}

void release_state(ort::NodeComputeInfo*, void*) {}

}  // namespace

Member packed_product(const Product& product, Format format, const ProviderOptions& options) {
    const Type type = options.type_of(product);
    const float* scales = product.scales.empty() ? nullptr : product.scales.data();
    if (product.packed) return {pack(product.packed->bits, format, type, scales), product.bias, 0};
    Dense dense;
    dense.data = product.data;
    dense.integers = product.integers;
    dense.rows = product.rows;
    dense.columns = product.columns;
    dense.row_stride = product.transposed ? product.columns : 1;
    dense.column_stride = product.transposed ? 1 : product.rows;
    return {pack(dense, format, type, scales), product.bias, 0};
}

CompiledNode::CompiledNode(const ort::Api& api_, std::vector<Member> members_,
                           const ProviderOptions& options)
    : Compiled(create_state, compute_node, release_state),
      api(api_),
      members(std::move(members_)),
      kernels(kernels_for(options.isa)),
      rounded(options.rounded) {}

}  // namespace elsa
