// The provider's options, out of the session's.
#include <algorithm>
#include <cctype>
#include <cstdlib>
#include <initializer_list>
#include <stdexcept>

#include "provider.h"

namespace elsa {
namespace {

// A session option; empty when it is not set.
std::string entry(const ort::Api& api, const ort::SessionOptions* session, const std::string& key) {
    int there = 0;
    check(api, api.HasSessionConfigEntry(session, key.c_str(), &there));
    if (there == 0) return "";
    std::size_t size = 0;
    ort::Status* status = api.GetSessionConfigEntry(session, key.c_str(), nullptr, &size);
    if (status != nullptr) api.ReleaseStatus(status);
    std::vector<char> value(size + 1, '\0');
    check(api, api.GetSessionConfigEntry(session, key.c_str(), value.data(), &size));
    return value.data();
}

std::string option(const ort::Api& api, const ort::SessionOptions* session, const char* name) {
    std::string key = std::string("ep.") + kProviderName + "." + name;
    const std::string value = entry(api, session, key);
    if (!value.empty()) return value;
    // onnxruntime lower-cases the provider's name in the keys of its options.
    std::transform(key.begin(), key.end(), key.begin(), [](char c) {
        return static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
    });
    return entry(api, session, key);
}

// An option that is one of these; empty when it is not set.
std::string choice(const ort::Api& api, const ort::SessionOptions* session, const char* name,
                   std::initializer_list<const char*> known) {
    const std::string value = option(api, session, name);
    if (value.empty()) return value;
    std::string wanted;
    for (const char* each : known) {
        if (value == each) return value;
        wanted += (wanted.empty() ? "" : ", ") + std::string(each);
    }
    throw std::invalid_argument(std::string("option ") + name + " is '" + value +
                                "', wanted one of " + wanted);
}

}  // namespace

ProviderOptions read_options(const ort::Api& api, const ort::SessionOptions* session) {
    ProviderOptions options;
    options.isa = isa_by_name(nullptr);
    const std::string values =
        choice(api, session, "values", {"exact", "float32", "bfloat16", "float16", "int8"});
    options.narrow = values.empty() || values == "exact";
    if (values == "bfloat16") options.type = Type::bf16;
    if (values == "float16") options.type = Type::f16;
    if (values == "int8") options.type = Type::s8;
    const std::string format = choice(api, session, "format", {"bitmap", "sliced", "rows"});
    if (format == "bitmap") options.format = Format::bitmap;
    if (format == "sliced") options.format = Format::sliced;
    if (format == "rows") options.format = Format::rows;
    const std::string activations = choice(api, session, "activations", {"int16", "float32"});
    options.between = choice(api, session, "fuse", {"all", "products"}) != "products";
    options.shared_cache = choice(api, session, "cache", {"copied", "shared"}) == "shared";
    options.lanes = choice(api, session, "lanes", {"auto", "none"}) != "none";
    // onnxruntime's own switch for products of quantised weights, if ours does not say.
    const std::string level = entry(api, session, "session.qdq_matmulnbits_accuracy_level");
    options.rounded = activations.empty() ? level != "0" : activations == "int16";
    const std::string gain = option(api, session, "least_gain");
    if (!gain.empty()) {
        char* end = nullptr;
        options.least_gain = std::strtod(gain.c_str(), &end);
        if (end == gain.c_str() || *end != '\0' || !(options.least_gain >= 0.0)) {
            throw std::invalid_argument("option least_gain is '" + gain + "', wanted a number");
        }
    }
    return options;
}

}  // namespace elsa
