// onnxruntime's plugin interface: CreateEpFactories and ReleaseEpFactory.
#include "provider.h"

#include <algorithm>
#include <cstdio>
#include <map>
#include <memory>
#include <new>
#include <set>
#include <stdexcept>
#include <utility>
#include <vector>

#include "attention_node.h"
#include "claims.h"
#include "elsa_native.h"
#include "lanes.h"
#include "lookup.h"
#include "region.h"

namespace elsa {
namespace {

struct Factory : ort::EpFactory {
    ort::Api api{};
};

struct Provider : ort::Ep {
    const ort::Api& api;
    ProviderOptions options;
    std::set<std::string> shared_caches;  // by the old keys
    std::shared_ptr<SessionReads> reads = std::make_shared<SessionReads>();

    Provider(const ort::Api& api_, const ProviderOptions& options_);
};

template <class Work>
ort::Status* guarded(const ort::Api& api, const Work& work) {
    try {
        work();
        return nullptr;
    } catch (const std::bad_alloc&) {
        return api.CreateStatus(ort::kEpFail, "elsa-compile's kernels: out of memory");
    } catch (const std::exception& error) {
        char text[512];
        std::snprintf(text, sizeof text, "elsa-compile's kernels: %s", error.what());
        return api.CreateStatus(ort::kEpFail, text);
    }
}

// onnxruntime multiplies int8 weights some three times as fast as float32 ones, one token.
constexpr double kDenseS8Gain = 3.0;

const char* name_of_format(Format format) {
    return format == Format::bitmap ? "bitmap" : format == Format::sliced ? "sliced" : "rows";
}

const char* name_of_type(Type type) {
    switch (type) {
        case Type::f32: return "float32";
        case Type::bf16: return "bfloat16";
        case Type::f16: return "float16";
        case Type::s8: break;
    }
    return "int8";
}

// What no kernel multiplies; empty when one does.
std::string refusal(const Product& product, Type type) {
    const std::size_t most = type == Type::s8 ? kMaxColumnsS8 : kMaxColumns;
    if (product.rows > kMaxRows || product.columns > most) return "too large";
    if (type == Type::s8 && !all_finite(product)) return "a weight that is not finite cannot be int8";
    return "";
}

// The cost model's choice. float32 values go into two bytes where that loses nothing and gains.
Choice choose_for(const Product& product, std::uint64_t nonzeros, const ProviderOptions& options,
                  Type& type) {
    const auto chosen = [&](Type of) {
        return choose(product.rows, product.columns, nonzeros, of, options.isa, !product.packed,
                      options.lanes_of(of));
    };
    Choice choice = chosen(type);
    if (type != Type::f32 || !options.narrow) return choice;
    const Type narrow = narrowest_type(product);
    const Choice narrowed = chosen(narrow);
    if (narrowed.gain <= choice.gain) return choice;
    type = narrow;
    return narrowed;
}

// How a product is kept; remembers why when it stays with onnxruntime.
std::optional<Form> decide(const Product& product, const ProviderOptions& options, std::string why,
                           Claim& claim) {
    Form form;
    form.type = options.type_of(product);
    claim.node = product.node;
    claim.op = product.op;
    claim.rows = product.rows;
    claim.columns = product.columns;
    claim.format = "dense";
    claim.why = std::move(why);
    bool taken = false;
    if (claim.why.empty()) claim.why = refusal(product, form.type);
    if (claim.why.empty()) {
        claim.nonzeros = count_nonzeros(product);
        Choice choice = choose_for(product, claim.nonzeros, options, form.type);
        if (!product.scales.empty()) choice.gain /= kDenseS8Gain;
        taken = choice.packed && choice.gain >= options.least_gain;
        // What the file holds packed stays packed: the dense copy would cost more than time.
        if (options.least_gain == 0.0 || product.packed) {
            taken = product.rows > 0 && product.columns > 0;
        }
        claim.gain = choice.gain;
        form.format = options.format.value_or(choice.format);
        if (form.format == Format::rows && product.packed) form.format = choice.format;
        if (taken) {
            claim.format = name_of_format(form.format);
            claim.type = name_of_type(form.type);
        } else {
            claim.why = product.rows * product.columns < kLeastElements
                            ? "too small to gain"
                        : choice.prompts_lose ? "too few zeros: prompts would lose"
                            : "onnxruntime's dense product is as fast";
        }
    }
    remember(claim);
    return taken ? std::optional<Form>(form) : std::nullopt;
}

// What regions want to know of a node that is no lookup and not damaged.
Candidate candidate_of(Provider& provider, const ort::Node* node) {
    const ort::Api& api = provider.api;
    Candidate made;
    made.node = node;
    const auto inputs = inputs_of(api, node);
    for (const ort::ValueInfo* input : inputs) {
        if (input != nullptr && constant(api, input) == nullptr) {
            made.inputs.push_back(name_of(api, input));
        }
    }
    for (const ort::ValueInfo* output : outputs_of(api, node)) {
        if (output != nullptr) made.outputs.push_back(name_of(api, output));
    }
    const bool first_moves =
        !inputs.empty() && inputs[0] != nullptr && constant(api, inputs[0]) == nullptr;
    const bool attention = is_operator(api, node, "", "Attention") &&
                           attribute(api, node, "q_num_heads", std::int64_t{0}) > 0;
    if (first_moves && (attention || is_operator(api, node, "", "RotaryEmbedding"))) {
        made.rows_of = 0;
    }
    std::string why;
    const std::optional<Product> product = product_of(api, node, why);
    Claim claim;
    if (product) {
        made.rows_of = 0;
        made.product = decide(*product, provider.options, why, claim).has_value();
    } else if ((made.row = row_node_of(api, node))) {
        made.rows_of = 0;
    }
    if (!made.product) return made;
    made.inputs = {product->input};
    if (product->packed) made.helpers.push_back(product->packed->node);
    if (product->widening != nullptr) made.helpers.push_back(product->widening);
    return made;
}

using Values = ort::Status* (*)(const ort::Graph*, const ort::ValueInfo**, std::size_t);

std::vector<std::string> names_of(const ort::Api& api, const ort::Graph* graph,
                                  ort::Status* (*count_of)(const ort::Graph*, std::size_t*),
                                  Values values_of) {
    std::size_t count = 0;
    check(api, count_of(graph, &count));
    std::vector<const ort::ValueInfo*> values(count, nullptr);
    check(api, values_of(graph, values.data(), count));
    std::vector<std::string> names;
    for (const ort::ValueInfo* value : values) names.push_back(name_of(api, value));
    return names;
}

bool has_graphs_inside(const ort::Api& api, const ort::Graph* graph) {
    for (const ort::Node* node : nodes_of(api, graph)) {
        for (const char* op : {"If", "Loop", "Scan"}) {
            if (is_operator(api, node, "", op)) return true;
        }
    }
    return false;
}

std::optional<AttentionNode> attention_taken(const Provider& provider, const ort::Node* node) {
    const ProviderOptions& options = provider.options;
    if (!options.between || !can_attend(kernels_for(options.isa))) return std::nullopt;
    return attention_of(provider.api, node);
}

ort::Status* get_capability(ort::Ep* self, const ort::Graph* graph, ort::GraphSupportInfo* info) {
    auto& provider = *static_cast<Provider*>(self);
    const ort::Api& api = provider.api;
    return guarded(api, [&] {
        const ort::NodeFusionOptions fusion{ort::kApiVersion, true};
        std::vector<Candidate> nodes;
        std::size_t attentions = 0;
        const auto inputs = names_of(api, graph, api.Graph_GetNumInputs, api.Graph_GetInputs);
        const bool sharing = provider.options.shared_cache && !has_graphs_inside(api, graph);
        for (const ort::Node* node : nodes_of(api, graph)) {
            if (const auto attention = attention_taken(provider, node)) {
                check(api, api.AddNodesToFuse(info, attention->nodes.data(),
                                              attention->nodes.size(), &fusion));
                ++attentions;
                if (sharing && can_share(api, node, inputs)) {
                    provider.shared_caches.insert(attention->past_keys);
                }
            }
            if (!damage_of(api, node).empty()) {
                // What fails here is only logged; what fails in `compile` ends the session.
                check(api, api.AddNodesToFuse(info, &node, 1, &fusion));
                continue;
            }
            if (const std::optional<Lookup> lookup = lookup_of(api, node)) {
                const ort::Node* fused[] = {lookup->table.node, node};
                check(api, api.AddNodesToFuse(info, fused, 2, &fusion));
                continue;
            }
            nodes.push_back(candidate_of(provider, node));
        }
        provider.reads->attentions = std::max(provider.reads->attentions, attentions);
        for (const auto& region : find_regions(std::move(nodes), provider.options.between)) {
            check(api, api.AddNodesToFuse(info, region.data(), region.size(), &fusion));
        }
    });
}

std::unique_ptr<Compiled> compile_lookup(const ort::Api& api, const Lookup& lookup) {
    auto made = std::make_unique<CompiledLookup>(api, lookup);
    Claim claim;
    claim.node = lookup.node;
    claim.op = "Gather";
    claim.rows = made->table.rows;
    claim.columns = made->table.columns;
    claim.nonzeros = made->table.count - 1;
    claim.bytes = made->mask.size() + made->values.size() + made->starts.size() * 4;
    claim.format = "bitmask";
    remember(claim);
    return made;
}

// Adds a product to the step of its input.
void add_product(Provider& provider, const Product& product, std::string why,
                 std::vector<Step>& steps, std::map<std::string, std::size_t>& step_of) {
    Claim claim;
    const std::optional<Form> form = decide(product, provider.options, std::move(why), claim);
    if (!form) throw std::logic_error("a product was claimed that cannot be compiled");
    const auto [found, fresh] = step_of.emplace(product.input, steps.size());
    if (fresh) {
        steps.emplace_back();
        steps.back().inputs = {product.input};
    }
    Step& step = steps[found->second];
    step.members.push_back(packed_product(product, *form));
    Owned& weight = step.members.back().weight;
    const ProviderOptions& options = provider.options;
    if (options.lanes_of(weight.view.type)) add_lanes(weight, kernels_for(options.isa));
    step.outputs.push_back(product.output);
    claim.nonzeros = weight.view.nonzeros;
    claim.bytes = weight.view.size;
    if (weight.lanes != nullptr) claim.lane_bytes = weight.lanes->offsets.back();
    provider.reads->weight_bytes += weight.lanes != nullptr ? claim.lane_bytes : claim.bytes;
    remember(claim);
}

std::unique_ptr<Compiled> compile_one(Provider& provider, const ort::Graph* graph) {
    const ort::Api& api = provider.api;
    std::vector<Step> steps;
    std::map<std::string, std::size_t> step_of;
    const auto inputs = names_of(api, graph, api.Graph_GetNumInputs, api.Graph_GetInputs);
    const auto outputs = names_of(api, graph, api.Graph_GetNumOutputs, api.Graph_GetOutputs);
    for (const ort::Node* node : nodes_of(api, graph)) {
        if (auto attention = attention_of(api, node)) {
            attention->shared = provider.shared_caches.count(attention->past_keys) > 0;
            if (attention->shared) {
                remember_shared_cache(attention->past_keys);
                remember_shared_cache(attention->past_values);
            }
            return std::make_unique<CompiledAttention>(api, *attention, inputs, outputs,
                                                       provider.options.isa, provider.reads);
        }
        const std::string damage = damage_of(api, node);
        if (!damage.empty()) throw std::runtime_error("a packed weight " + damage);
        if (const auto lookup = lookup_of(api, node)) return compile_lookup(api, *lookup);
        std::string why;
        if (const std::optional<Product> product = product_of(api, node, why)) {
            add_product(provider, *product, why, steps, step_of);
        } else if (std::optional<RowNode> row = row_node_of(api, node)) {
            steps.emplace_back();
            steps.back().inputs = row->inputs;
            steps.back().outputs = {row->output};
            steps.back().row = std::move(row);
        }  // else the DequantizeLinear before a product
    }
    if (step_of.empty()) throw std::logic_error("a graph without products was claimed");
    Plan plan = make_plan(std::move(steps), inputs, outputs);
    return std::make_unique<CompiledNode>(api, std::move(plan), provider.options);
}

ort::Status* compile(ort::Ep* self, const ort::Graph** graphs, const ort::Node**,
                     std::size_t count, ort::NodeComputeInfo** infos, ort::Node**) {
    auto& provider = *static_cast<Provider*>(self);
    return guarded(provider.api, [&] {
        std::vector<std::unique_ptr<Compiled>> made;
        for (std::size_t i = 0; i < count; ++i) made.push_back(compile_one(provider, graphs[i]));
        for (std::size_t i = 0; i < count; ++i) infos[i] = made[i].release();
    });
}

void release_infos(ort::Ep*, ort::NodeComputeInfo** infos, std::size_t count) {
    for (std::size_t i = 0; i < count; ++i) delete static_cast<Compiled*>(infos[i]);
}

}  // namespace

Compiled::Compiled(const ort::Api& api_) : ort::NodeComputeInfo{}, api(api_) {
    version = ort::kApiVersion;
    CreateState = [](ort::NodeComputeInfo* self, ort::ComputeContext*, void** state) -> ort::Status* {
        *state = self;
        return nullptr;
    };
    Compute = [](ort::NodeComputeInfo* self, void*, ort::KernelContext* context) -> ort::Status* {
        const auto& node = *static_cast<const Compiled*>(self);
        try {
            node.compute(context);
            return nullptr;
        } catch (const std::bad_alloc&) {
            return node.api.CreateStatus(ort::kFail, "out of memory");
        } catch (const std::exception& error) {
            return node.api.CreateStatus(ort::kFail, error.what());
        }
    };
    ReleaseState = [](ort::NodeComputeInfo*, void*) {};
}

Type ProviderOptions::type_of(const Product& product) const {
    if (product.packed) return packed_type(*product.packed);
    return product.integers != nullptr ? Type::s8 : type;
}

namespace {

Provider::Provider(const ort::Api& api_, const ProviderOptions& options_)
    : ort::Ep{}, api(api_), options(options_) {
    version = ort::kApiVersion;
    GetName = [](const ort::Ep*) { return kProviderName; };
    GetCapability = get_capability;
    Compile = compile;
    ReleaseNodeComputeInfos = release_infos;
}

ort::Status* supported_devices(ort::EpFactory* self, const ort::HardwareDevice* const* devices,
                               std::size_t count, ort::EpDevice** made, std::size_t most,
                               std::size_t* made_count) {
    const ort::Api& api = static_cast<Factory*>(self)->api;
    *made_count = 0;
    for (std::size_t i = 0; i < count && *made_count < most; ++i) {
        if (api.HardwareDevice_Type(devices[i]) != ort::kDeviceCpu) continue;
        ort::Status* status =
            api.CreateEpDevice(self, devices[i], nullptr, nullptr, &made[*made_count]);
        if (status != nullptr) return status;
        ++*made_count;
    }
    return nullptr;
}

ort::Status* create_provider(ort::EpFactory* self, const ort::HardwareDevice* const*,
                             const ort::KeyValuePairs* const*, std::size_t,
                             const ort::SessionOptions* session, const ort::Logger*,
                             ort::Ep** made) {
    const ort::Api& api = static_cast<Factory*>(self)->api;
    *made = nullptr;
    return guarded(api, [&] {
        forget_claims();
        *made = new Provider(api, read_options(api, session));
    });
}

void fill(Factory& factory) {
    factory.version = ort::kApiVersion;
    factory.GetName = [](const ort::EpFactory*) { return kProviderName; };
    factory.GetVendor = [](const ort::EpFactory*) { return "elsa-compile"; };
    factory.GetVendorId = [](const ort::EpFactory*) { return std::uint32_t{0xE15A}; };
    factory.GetVersion = [](const ort::EpFactory*) { return "0.1.0"; };
    factory.GetSupportedDevices = supported_devices;
    factory.CreateEp = create_provider;
    factory.ReleaseEp = [](ort::EpFactory*, ort::Ep* ep) { delete static_cast<Provider*>(ep); };
    factory.CreateDataTransfer = [](ort::EpFactory*, void** transfer) -> ort::Status* {
        *transfer = nullptr;
        return nullptr;
    };
    factory.CreateAllocator = [](ort::EpFactory*, const void*, const ort::KeyValuePairs*,
                                 void** allocator) -> ort::Status* {
        *allocator = nullptr;  // the CPU's
        return nullptr;
    };
    factory.ReleaseAllocator = [](ort::EpFactory*, void*) {};
    factory.IsStreamAware = [](const ort::EpFactory*) { return false; };
    factory.CreateSyncStreamForDevice = [](ort::EpFactory*, const void*,
                                           const ort::KeyValuePairs*,
                                           void** stream) -> ort::Status* {
        *stream = nullptr;
        return nullptr;
    };
}

}  // namespace
}  // namespace elsa

extern "C" {

ELSA_EXPORT elsa::ort::Status* CreateEpFactories(const char*, const elsa::ort::ApiBase* base,
                                                 const elsa::ort::Logger*,
                                                 elsa::ort::EpFactory** factories,
                                                 std::size_t most, std::size_t* count) {
    *count = 0;
    std::unique_ptr<elsa::Factory> factory(new (std::nothrow) elsa::Factory());
    if (factory == nullptr) return nullptr;  // nothing can be reported; no factory is made then
    if (!factory->api.load(*base)) {
        if (factory->api.CreateStatus == nullptr) return nullptr;
        const char* version = base->GetVersionString();
        char text[256];
        std::snprintf(text, sizeof text,
                      "elsa-compile's kernels know onnxruntime 1.23 and later versions of 1, this "
                      "is %s; install another onnxruntime or newer kernels",
                      version != nullptr ? version : "unknown");
        return factory->api.CreateStatus(elsa::ort::kNotImplemented, text);
    }
    if (most < 1) {
        return factory->api.CreateStatus(elsa::ort::kInvalidArgument, "no room for a factory");
    }
    elsa::fill(*factory);
    factories[0] = factory.release();
    *count = 1;
    return nullptr;
}

ELSA_EXPORT elsa::ort::Status* ReleaseEpFactory(elsa::ort::EpFactory* factory) {
    delete static_cast<elsa::Factory*>(factory);
    return nullptr;
}

}  // extern "C"
