// A fused node: packed weights, their products with whatever comes in, and what is between them.
#include <algorithm>
#include <stdexcept>
#include <utility>
#include <vector>

#include "pool.h"
#include "region.h"
#include "scratch.h"

namespace elsa {
namespace {

// Tokens that go through a region at a time: values between its steps stay in the cache.
constexpr std::size_t kBlock = 512;
constexpr std::size_t kTaskFloats = 16384;  // of work between products
constexpr std::size_t kMaxRank = 16;

struct Input {
    const float* data = nullptr;
    std::size_t rank = 0, tokens = 1;
    std::int64_t sizes[kMaxRank] = {};
};

Input input_of(const ort::Api& api, ort::KernelContext* context, std::size_t index,
               std::size_t columns) {
    const ort::Value* value = nullptr;
    check(api, api.KernelContext_GetInput(context, index, &value));
    ort::TensorInfo* info = nullptr;
    check(api, api.GetTensorTypeAndShape(value, &info));
    Input input;
    int type = 0;
    std::size_t& rank = input.rank;
    ort::Status* status = api.GetDimensionsCount(info, &rank);
    if (status == nullptr) status = api.GetTensorElementType(info, &type);
    if (status == nullptr && rank >= 1 && rank <= kMaxRank) {
        status = api.GetDimensions(info, input.sizes, rank);
    }
    api.ReleaseTensorInfo(info);
    check(api, status);
    if (type != ort::kFloat || rank < 1 || rank > kMaxRank ||
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

// One call: where values begin, and the steps over some tokens.
class Call {
  public:
    Call(const CompiledNode& node, ort::KernelContext* context)
        : node_(node), pool_{node.api, context}, at_(node.plan.values.size(), nullptr) {
        Input first;
        for (std::size_t v = 0; v < at_.size(); ++v) {
            const Slot& slot = node.plan.values[v];
            if (slot.input < 0) continue;
            const Input input = input_of(node.api, context, static_cast<std::size_t>(slot.input),
                                         slot.width);
            const bool same = first.rank == 0 ||
                              (first.rank == input.rank &&
                               std::equal(first.sizes, first.sizes + first.rank - 1, input.sizes));
            if (!same) throw std::runtime_error("inputs of a region with different leading sizes");
            first = input;
            at_[v] = const_cast<float*>(input.data);  // only read
        }
        tokens_ = first.tokens;
        for (std::size_t v = 0; v < at_.size(); ++v) {
            const Slot& slot = node.plan.values[v];
            if (slot.output < 0) continue;
            first.sizes[first.rank - 1] = static_cast<std::int64_t>(slot.width);
            ort::Value* output = nullptr;
            check(node.api, node.api.KernelContext_GetOutput(
                                context, static_cast<std::size_t>(slot.output), first.sizes,
                                first.rank, &output));
            void* to = nullptr;
            check(node.api, node.api.GetTensorMutableData(output, &to));
            at_[v] = static_cast<float*>(to);
        }
    }

    void run() {
        const std::size_t block = std::min(tokens_, kBlock);
        float* between = scratch<float>(Scratch::between, block * node_.plan.floats);
        for (std::size_t v = 0; v < at_.size(); ++v) {
            const Slot& slot = node_.plan.values[v];
            if (slot.input < 0 && slot.output < 0) at_[v] = between + block * slot.offset;
        }
        for (std::size_t start = 0; start < tokens_; start += block) {
            const std::size_t tokens = std::min(block, tokens_ - start);
            for (const Step& step : node_.plan.steps) {
                step.row ? between_products(step, start, tokens) : products(step, start, tokens);
            }
        }
    }

  private:
    float* value(std::size_t v, std::size_t start) const {
        const Slot& slot = node_.plan.values[v];
        return slot.input < 0 && slot.output < 0 ? at_[v] : at_[v] + start * slot.width;
    }

    void products(const Step& step, std::size_t start, std::size_t tokens) {
        std::vector<Part> parts;
        for (std::size_t i = 0; i < step.members.size(); ++i) {
            const Member& member = step.members[i];
            parts.push_back({&member.weight.view,
                             member.bias.empty() ? nullptr : member.bias.data(),
                             value(step.to[i], start)});
        }
        Request request;
        request.x = value(step.from[0], start);
        request.tokens = tokens;
        request.rounded = node_.rounded;
        multiply(parts.data(), parts.size(), node_.kernels, request, pool_.parallel());
    }

    void between_products(const Step& step, std::size_t start, std::size_t tokens) {
        const std::size_t width = step.row->width;
        const float* a = value(step.from[0], start);
        const float* b = step.from.size() > 1 ? value(step.from[1], start) : nullptr;
        float* y = value(step.to[0], start);
        const std::size_t tasks = std::min(tokens, 1 + tokens * width / kTaskFloats);
        for_each(pool_.parallel(), tasks, [&](std::size_t i) {
            const std::size_t first = tokens * i / tasks, last = tokens * (i + 1) / tasks;
            const std::size_t skip = first * width;
            rows(*step.row, last - first, a + skip, b != nullptr ? b + skip : nullptr, y + skip);
        });
    }

    void rows(const RowNode& row, std::size_t tokens, const float* a, const float* b,
              float* y) const {
        const std::size_t width = row.width;
        const Kernels& kernels = node_.kernels;
        switch (row.kind) {
            case RowOp::add: kernels.add(a, b, tokens * width, y); return;
            case RowOp::times: kernels.times(a, b, tokens * width, y); return;
            case RowOp::function:
                kernels.each[static_cast<int>(row.function)](a, tokens * width, y);
                return;
            default: break;
        }
        for (std::size_t t = 0; t < tokens; ++t, a += width, y += width) {
            if (row.kind == RowOp::rms_norm) {
                kernels.rms_norm(a, row.scale.data(), row.epsilon, width, y);
            } else if (row.kind == RowOp::layer_norm) {
                kernels.layer_norm(a, row.scale.data(),
                                   row.bias.empty() ? nullptr : row.bias.data(), row.epsilon,
                                   width, y);
            } else {
                kernels.add(a, row.bias.data(), width, y);
            }
        }
    }

    const CompiledNode& node_;
    Pool pool_;
    std::vector<float*> at_;
    std::size_t tokens_ = 0;
};

}  // namespace

Member packed_product(const Product& product, const Form& form) {
    const float* scales = product.scales.empty() ? nullptr : product.scales.data();
    if (product.packed) return {pack(product.packed->bits, form.format, form.type, scales), product.bias};
    Dense dense;
    dense.data = product.data;
    dense.integers = product.integers;
    dense.rows = product.rows;
    dense.columns = product.columns;
    dense.row_stride = product.transposed ? product.columns : 1;
    dense.column_stride = product.transposed ? 1 : product.rows;
    return {pack(dense, form.format, form.type, scales), product.bias};
}

CompiledNode::CompiledNode(const ort::Api& api_, Plan plan_, const ProviderOptions& options)
    : Compiled(api_),
      plan(std::move(plan_)),
      kernels(kernels_for(options.isa)),
      rounded(options.rounded) {}

void CompiledNode::compute(ort::KernelContext* context) const { Call(*this, context).run(); }

}  // namespace elsa
