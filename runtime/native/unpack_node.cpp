#include "unpack_node.h"

namespace elsa {
namespace {

constexpr const char* kDomain = "elsa";
constexpr std::size_t kMaxRank = 32;

std::size_t size_of_type(int type) {
    switch (type) {
        case ort::kUint8:
        case ort::kInt8: return 1;
        case ort::kFloat16:
        case ort::kBfloat16: return 2;
        case ort::kFloat: return 4;
        default: return 0;
    }
}

// Whether a node is one of ours; int4 is left to the functions' bodies.
bool is_unpack(const ort::Api& api, const ort::Node* node, bool& transposed) {
    const auto is = [&](const char* op) { return is_operator(api, node, kDomain, op); };
    transposed = is("UnpackTransposed") || is("UnpackCutTransposed");
    return transposed || is("Unpack") || is("UnpackCut");
}

// The node's weight, and what is wrong with its bytes; nothing where the body must do.
std::optional<Unpacking> read(const ort::Api& api, const ort::Node* node, std::string& fault) {
    Unpacking found;
    found.node = node;
    if (!is_unpack(api, node, found.transposed)) return std::nullopt;
    const auto inputs = inputs_of(api, found.node);
    const ort::Value* mask = inputs.size() == 2 ? constant(api, inputs[0]) : nullptr;
    const ort::Value* values = inputs.size() == 2 ? constant(api, inputs[1]) : nullptr;
    if (mask == nullptr || values == nullptr) return std::nullopt;
    const Shape bytes = shape_of(api, mask), list = shape_of(api, values);
    const auto sizes = attribute_list(api, found.node, "shape", kMaxRank);
    found.type = list.type;
    found.bits.value_bytes = size_of_type(list.type);
    // Other types are left to the function's body.
    if (bytes.type != ort::kUint8 || found.bits.value_bytes == 0 || sizes.empty()) {
        return std::nullopt;
    }
    std::size_t columns = 1;
    for (std::size_t i = 0; i < sizes.size(); ++i) {
        constexpr std::int64_t most = std::int64_t{1} << 31;
        if (sizes[i] < 1 || sizes[i] > most) return std::nullopt;
        if (i > 0) columns *= static_cast<std::size_t>(sizes[i]);
        if (columns > static_cast<std::size_t>(most)) return std::nullopt;
    }
    found.bits.rows = static_cast<std::size_t>(sizes[0]);
    found.bits.columns = columns;
    found.bits.mask = static_cast<const std::uint8_t*>(data_of(api, mask));
    found.bits.mask_bytes = elements(bytes);
    found.bits.values = static_cast<const std::uint8_t*>(data_of(api, values));
    found.bits.count = elements(list);
    fault = validate(found.bits);
    return found;
}

}  // namespace

std::optional<Unpacking> unpacking_of(const ort::Api& api, const ort::ValueInfo* input) {
    const ort::Node* node = only_producer(api, input);
    if (node == nullptr) return std::nullopt;
    std::string fault;
    const std::optional<Unpacking> found = read(api, node, fault);
    return fault.empty() ? found : std::nullopt;
}

std::string damage_of(const ort::Api& api, const ort::Node* node) {
    std::string fault;
    read(api, node, fault);
    return fault;
}

}  // namespace elsa
