#include "attention_node.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <utility>

#include "pool.h"
#include "scratch.h"

namespace elsa {
namespace {

constexpr std::size_t kMaxRank = 4;
// Heads as declared: how many and how wide. None where the graph does not say.
struct Heads {
    std::size_t rank = 0, count = 0, width = 0;
};

std::optional<Heads> heads_of(const ort::Api& api, const ort::ValueInfo* value, std::int64_t flat) {
    const std::optional<Shape> shape = value ? declared_shape(api, value) : std::nullopt;
    if (!shape || shape->type != ort::kFloat || constant(api, value) != nullptr) {
        return std::nullopt;
    }
    const std::size_t rank = shape->sizes.size();
    if (rank != 3 && rank != 4) return std::nullopt;
    const std::int64_t count = rank == 3 ? flat : shape->sizes[1];
    const std::int64_t last = shape->sizes[rank - 1];
    if (count < 1 || last < 1 || (rank == 3 && last % count != 0)) return std::nullopt;
    const std::int64_t width = rank == 3 ? last / count : last;
    return Heads{rank, static_cast<std::size_t>(count), static_cast<std::size_t>(width)};
}

bool serves(std::size_t width) {
    return width % kAttentionStep == 0 && width <= kAttentionWidth;
}

// Whether a value comes in at run time, of this type and one of these ranks as the graph says.
bool declared(const ort::Api& api, const ort::ValueInfo* value, int type, std::size_t least,
              std::size_t most) {
    const std::optional<Shape> shape = declared_shape(api, value);
    return shape && constant(api, value) == nullptr && shape->type == type && shape->sizes.size() >= least &&
           shape->sizes.size() <= most;
}

const ort::ValueInfo* at_or_null(const std::vector<const ort::ValueInfo*>& values,
                                 std::size_t index) {
    return index < values.size() ? values[index] : nullptr;
}

// Looks through a RotaryEmbedding before `input`, when it is one that these kernels do and nobody
// else reads what it makes; returns what it turns.
const ort::ValueInfo* turned_from(const ort::Api& api, const ort::ValueInfo* input,
                                  const Heads& heads, Turning& turning,
                                  std::vector<const ort::Node*>& nodes) {
    const ort::Node* node = only_producer(api, input);
    if (node == nullptr || !is_operator(api, node, "", "RotaryEmbedding")) return input;
    const auto inputs = inputs_of(api, node);
    if (inputs.size() < 3 || at_or_null(inputs, 3) != nullptr) return input;
    if (attribute(api, node, "interleaved", std::int64_t{0}) != 0) return input;
    const std::int64_t given = attribute(api, node, "rotary_embedding_dim", std::int64_t{0});
    const std::size_t turned = given > 0 ? static_cast<std::size_t>(given) : heads.width;
    const std::int64_t count = attribute(api, node, "num_heads", std::int64_t{0});
    const std::optional<Heads> before = heads_of(api, inputs[0], count);
    if (!before || before->rank != heads.rank || before->count != heads.count ||
        before->width != heads.width || turned % 2 != 0 || turned > heads.width) {
        return input;
    }
    for (std::size_t i = 1; i < 3; ++i) {
        if (!declared(api, inputs[i], ort::kFloat, 3, 3)) return input;
    }
    turning = {name_of(api, inputs[1]), name_of(api, inputs[2]), turned / 2};
    nodes.push_back(node);
    return inputs[0];
}

struct Tensor {
    const void* data = nullptr;
    int type = 0;
    std::size_t rank = 0;
    std::int64_t sizes[kMaxRank] = {};
    std::size_t size(std::size_t axis) const { return static_cast<std::size_t>(sizes[axis]); }
};

Tensor input_of(const ort::Api& api, ort::KernelContext* context, int place) {
    const ort::Value* value = nullptr;
    check(api, api.KernelContext_GetInput(context, static_cast<std::size_t>(place), &value));
    ort::TensorInfo* info = nullptr;
    check(api, api.GetTensorTypeAndShape(value, &info));
    Tensor tensor;
    ort::Status* status = api.GetDimensionsCount(info, &tensor.rank);
    if (status == nullptr) status = api.GetTensorElementType(info, &tensor.type);
    if (status == nullptr && tensor.rank <= kMaxRank) {
        status = api.GetDimensions(info, tensor.sizes, tensor.rank);
    }
    api.ReleaseTensorInfo(info);
    check(api, status);
    if (tensor.rank > kMaxRank) throw std::runtime_error("an input with more than 4 axes");
    void* data = nullptr;
    check(api, api.GetTensorMutableData(const_cast<ort::Value*>(value), &data));
    tensor.data = data;
    return tensor;
}

float* output_of(const ort::Api& api, ort::KernelContext* context, int place,
                 const std::int64_t* sizes, std::size_t rank) {
    ort::Value* value = nullptr;
    check(api, api.KernelContext_GetOutput(context, static_cast<std::size_t>(place), sizes, rank,
                                           &value));
    void* data = nullptr;
    check(api, api.GetTensorMutableData(value, &data));
    return static_cast<float*>(data);
}

void expect(bool holds, const char* what) {
    if (!holds) throw std::runtime_error(std::string("attention: ") + what);
}

// One call: what comes in, checked.
class Reading {
  public:
    Reading(const CompiledAttention& node, ort::KernelContext* context)
        : node_(node), context_(context) {
        const AttentionNode& known = node.node;
        const Tensor q = read(node.at.q), k = read(node.at.k), v = read(node.at.v);
        call_.heads = known.heads;
        call_.groups = known.groups;
        call_.width = known.width;
        call_.value_width = known.value_width;
        call_.scale = known.scale;
        call_.causal = known.causal;
        call_.batches = q.size(0);
        const std::size_t token = known.flat ? 1 : 2;
        call_.queries = q.size(token);
        call_.added = k.size(token);
        call_.q = view(q, known.heads, known.width);
        call_.k = view(k, known.groups, known.width);
        call_.v = view(v, known.groups, known.value_width);
        expect(v.size(token) == call_.added && k.size(0) == call_.batches &&
                   v.size(0) == call_.batches,
               "queries, keys and values of different batches or lengths");
        Tensor mask;
        if (node.at.mask >= 0) mask = read(node.at.mask);
        read_past(mask);
        call_.turn_q = turning(node.at.cosines_q, node.at.sines_q, known.turn_q.half,
                               call_.queries);
        call_.turn_k = turning(node.at.cosines_k, node.at.sines_k, known.turn_k.half, call_.added);
        if (node.at.mask >= 0) call_.mask = mask_of(mask);
    }

    Attention take() {
        const AttentionNode& known = node_.node;
        const auto s64 = [](std::size_t size) { return static_cast<std::int64_t>(size); };
        const std::size_t keys = call_.past + call_.added;
        const std::size_t wide = known.heads * known.value_width;
        const std::size_t token = known.flat ? wide : known.value_width;
        const std::size_t head = known.flat ? known.value_width : call_.queries * known.value_width;
        call_.y_view = {nullptr, call_.queries * wide, token, head};
        if (node_.at.y < 0) {
            call_.y = scratch<float>(Scratch::unread, call_.batches * call_.queries * wide);
        } else if (known.flat) {
            const std::int64_t sizes[] = {s64(call_.batches), s64(call_.queries), s64(wide)};
            call_.y = output_of(node_.api, context_, node_.at.y, sizes, 3);
        } else {
            const std::int64_t sizes[] = {s64(call_.batches), s64(known.heads),
                                          s64(call_.queries), s64(known.value_width)};
            call_.y = output_of(node_.api, context_, node_.at.y, sizes, 4);
        }
        // What nobody wants to keep is made all the same.
        call_.room = known.shared ? call_.past_room : keys;
        const std::size_t rows = call_.batches * known.groups * call_.room;
        const std::size_t own_keys = node_.at.keys < 0 ? rows * known.width : 0;
        const std::size_t own_values = node_.at.values < 0 ? rows * known.value_width : 0;
        float* own = scratch<float>(Scratch::cache, own_keys + own_values);
        const auto kept = [&](int place, std::size_t width, float* otherwise) {
            if (place < 0) return otherwise;
            const std::int64_t sizes[] = {s64(call_.batches), s64(known.groups),
                                          s64(call_.room), s64(width)};
            return output_of(node_.api, context_, place, sizes, 4);
        };
        call_.keys = kept(node_.at.keys, known.width, own);
        call_.values = kept(node_.at.values, known.value_width, own + own_keys);
        const std::size_t bytes = rows * (known.width + known.value_width) * sizeof(float);
        // Old and new ones, of all layers: do they stay in the cache until the next token?
        const SessionReads& reads = *node_.reads;
        call_.bypass = 2 * bytes * reads.attentions + reads.weight_bytes > node_.cache_bytes;
        return call_;
    }

  private:
    Tensor read(int place) const { return input_of(node_.api, context_, place); }

    HeadsView view(const Tensor& tensor, std::size_t heads, std::size_t width) const {
        const bool flat = node_.node.flat;
        const std::size_t wide = heads * width;
        const bool fits = flat ? tensor.rank == 3 && tensor.size(2) == wide
                               : tensor.rank == 4 && tensor.size(1) == heads &&
                                     tensor.size(3) == width;
        expect(tensor.type == ort::kFloat && fits, "heads that are not as the graph declares");
        const auto* data = static_cast<const float*>(tensor.data);
        if (flat) return {data, tensor.size(1) * wide, wide, width};
        return {data, tensor.size(2) * wide, width, tensor.size(2) * width};
    }

    void read_past(const Tensor& mask) {
        if (node_.at.past_keys < 0) return;
        const Tensor keys = read(node_.at.past_keys), values = read(node_.at.past_values);
        const auto fits = [&](const Tensor& tensor, std::size_t width) {
            return tensor.type == ort::kFloat && tensor.rank == 4 &&
                   tensor.size(0) == call_.batches && tensor.size(1) == call_.groups &&
                   tensor.size(3) == width;
        };
        expect(fits(keys, call_.width) && fits(values, call_.value_width) &&
                   keys.size(2) == values.size(2),
               "a cache whose sizes do not fit");
        call_.past_room = keys.size(2);
        call_.past = call_.past_room;
        if (node_.node.shared) {
            const std::size_t all = mask.size(mask.rank - 1);
            expect(all >= call_.added && all <= call_.past_room,
                   "a mask for more keys than the cache has room for");
            call_.past = all - call_.added;
        }
        call_.past_keys = static_cast<const float*>(keys.data);
        call_.past_values = static_cast<const float*>(values.data);
    }

    Rotary turning(int cosines, int sines, std::size_t half, std::size_t tokens) const {
        if (cosines < 0) return {};
        const Tensor c = read(cosines), s = read(sines);
        const auto fits = [&](const Tensor& tensor) {
            return tensor.type == ort::kFloat && tensor.rank == 3 &&
                   (tensor.size(0) == call_.batches || tensor.size(0) == 1) &&
                   tensor.size(1) == tokens && tensor.size(2) == half;
        };
        expect(fits(c) && fits(s) && c.sizes[0] == s.sizes[0], "angles that do not fit the heads");
        return {static_cast<const float*>(c.data), static_cast<const float*>(s.data),
                c.size(0) == 1 ? 0 : tokens * half, half};
    }

    Mask mask_of(const Tensor& tensor) const {
        const std::size_t full[kMaxRank] = {call_.batches, call_.heads, call_.queries,
                                            call_.past + call_.added};
        std::size_t strides[kMaxRank] = {};
        std::size_t stride = 1;
        Mask mask;
        mask.keys = full[3];
        for (std::size_t i = 0; i < tensor.rank; ++i) {
            const std::size_t axis = kMaxRank - 1 - i;
            const std::size_t size = tensor.size(tensor.rank - 1 - i);
            const bool keys = axis == 3 && size < full[3] && size != 1;
            expect(size == full[axis] || size == 1 || keys, "a mask whose sizes do not fit");
            if (size != 1) strides[axis] = stride;
            if (keys) mask.keys = size;
            stride *= size;
        }
        // One key that there is, not one for all.
        if (full[3] == 1) strides[3] = 1;
        mask.batch = strides[0];
        mask.head = strides[1];
        mask.query = strides[2];
        mask.key = strides[3];
        expect(tensor.type == ort::kBool || tensor.type == ort::kFloat, "a mask of another type");
        if (tensor.type == ort::kBool) {
            mask.allowed = static_cast<const std::uint8_t*>(tensor.data);
        } else {
            mask.added = static_cast<const float*>(tensor.data);
        }
        return mask;
    }

    const CompiledAttention& node_;
    ort::KernelContext* context_;
    Attention call_;
};

}  // namespace

std::optional<AttentionNode> attention_of(const ort::Api& api, const ort::Node* node) {
    if (!is_operator(api, node, "", "Attention")) return std::nullopt;
    const auto inputs = inputs_of(api, node), outputs = outputs_of(api, node);
    if (inputs.size() < 3 || at_or_null(inputs, 6) != nullptr || outputs.empty() ||
        outputs[0] == nullptr || at_or_null(outputs, 3) != nullptr) {
        return std::nullopt;
    }
    const std::int64_t q_heads = attribute(api, node, "q_num_heads", std::int64_t{0});
    const std::int64_t k_heads = attribute(api, node, "kv_num_heads", std::int64_t{0});
    const auto q = heads_of(api, inputs[0], q_heads), k = heads_of(api, inputs[1], k_heads);
    const auto v = heads_of(api, inputs[2], k_heads);
    if (!q || !k || !v || q->rank != k->rank || q->rank != v->rank || k->count != v->count ||
        q->width != k->width || q->count % k->count != 0 || !serves(q->width) ||
        !serves(v->width)) {
        return std::nullopt;
    }
    if (attribute(api, node, "softcap", 0.0f) != 0.0f) return std::nullopt;
    const std::int64_t precision =
        attribute(api, node, "softmax_precision", std::int64_t{ort::kFloat});
    if (precision != ort::kFloat && precision != 0) return std::nullopt;
    AttentionNode made;
    if (const ort::ValueInfo* mask = at_or_null(inputs, 3)) {
        if (!declared(api, mask, ort::kBool, 2, 4) && !declared(api, mask, ort::kFloat, 2, 4)) {
            return std::nullopt;
        }
        made.mask = name_of(api, mask);
    }
    const ort::ValueInfo* past[] = {at_or_null(inputs, 4), at_or_null(inputs, 5)};
    if ((past[0] == nullptr) != (past[1] == nullptr)) return std::nullopt;
    if (past[0] != nullptr) {
        for (const ort::ValueInfo* each : past) {
            if (!declared(api, each, ort::kFloat, 4, 4)) return std::nullopt;
        }
        made.past_keys = name_of(api, past[0]);
        made.past_values = name_of(api, past[1]);
    }
    made.q = name_of(api, turned_from(api, inputs[0], *q, made.turn_q, made.nodes));
    made.k = name_of(api, turned_from(api, inputs[1], *k, made.turn_k, made.nodes));
    made.v = name_of(api, inputs[2]);
    made.y = name_of(api, outputs[0]);
    if (at_or_null(outputs, 1) != nullptr) made.keys = name_of(api, outputs[1]);
    if (at_or_null(outputs, 2) != nullptr) made.values = name_of(api, outputs[2]);
    made.nodes.push_back(node);
    made.flat = q->rank == 3;
    made.heads = q->count;
    made.groups = k->count;
    made.width = q->width;
    made.value_width = v->width;
    made.causal = attribute(api, node, "is_causal", std::int64_t{0}) != 0;
    const float scale = attribute(api, node, "scale", 0.0f);
    made.scale = scale != 0.0f ? scale : 1.0f / std::sqrt(static_cast<float>(q->width));
    return made;
}

bool can_share(const ort::Api& api, const ort::Node* attention,
               const std::vector<std::string>& graph_inputs) {
    const auto inputs = inputs_of(api, attention), outputs = outputs_of(api, attention);
    for (std::size_t i = 4; i < 6; ++i) {
        const ort::ValueInfo* past = at_or_null(inputs, i);
        std::size_t readers = 0;
        if (past == nullptr) return false;
        check(api, api.ValueInfo_GetValueNumConsumers(past, &readers));
        const std::string name = name_of(api, past);
        const auto end = graph_inputs.end();
        if (readers != 1 || std::find(graph_inputs.begin(), end, name) == end) return false;
    }
    for (std::size_t i = 1; i < 3; ++i) {
        const ort::ValueInfo* kept = at_or_null(outputs, i);
        std::size_t readers = 0;
        bool leaves = false;
        if (kept == nullptr) return false;
        check(api, api.ValueInfo_IsGraphOutput(kept, &leaves));
        check(api, api.ValueInfo_GetValueNumConsumers(kept, &readers));
        if (!leaves || readers != 0) return false;
    }
    const ort::ValueInfo* mask = at_or_null(inputs, 3);
    const std::optional<Shape> shape = mask ? declared_shape(api, mask) : std::nullopt;
    return shape && !shape->sizes.empty() && shape->sizes.back() != 1;
}

CompiledAttention::CompiledAttention(const ort::Api& api_, const AttentionNode& node_,
                                     const std::vector<std::string>& inputs,
                                     const std::vector<std::string>& outputs, Isa isa,
                                     std::shared_ptr<const SessionReads> reads_)
    : Compiled(api_),
      node(node_),
      kernels(kernels_for(isa)),
      reads(std::move(reads_)),
      cache_bytes(last_cache_bytes()) {
    const auto found = [](const std::vector<std::string>& names, const std::string& name) {
        const auto at = std::find(names.begin(), names.end(), name);
        return name.empty() || at == names.end() ? -1 : static_cast<int>(at - names.begin());
    };
    const auto place = [&](const std::vector<std::string>& names, const std::string& name) {
        const int index = found(names, name);
        if (index < 0 && !name.empty()) {
            throw std::logic_error("an attention without its input " + name);
        }
        return index;
    };
    at.q = place(inputs, node.q);
    at.k = place(inputs, node.k);
    at.v = place(inputs, node.v);
    at.mask = place(inputs, node.mask);
    at.past_keys = place(inputs, node.past_keys);
    at.past_values = place(inputs, node.past_values);
    at.cosines_q = place(inputs, node.turn_q.cosines);
    at.sines_q = place(inputs, node.turn_q.sines);
    at.cosines_k = place(inputs, node.turn_k.cosines);
    at.sines_k = place(inputs, node.turn_k.sines);
    // An output that nobody reads is none of the fused node.
    at.y = found(outputs, node.y);
    at.keys = found(outputs, node.keys);
    at.values = found(outputs, node.values);
}

void CompiledAttention::compute(ort::KernelContext* context) const {
    Pool pool{api, context};
    attend(Reading(*this, context).take(), kernels, pool.parallel());
}

}  // namespace elsa
