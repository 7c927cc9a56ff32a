// The provider's options, out of the session's.
#include <algorithm>
#include <cctype>
#include <cstdlib>
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

}  // namespace

ProviderOptions read_options(const ort::Api& api, const ort::SessionOptions* session) {
    ProviderOptions options;
    options.isa = isa_by_name(nullptr);
    const std::string values = option(api, session, "values");
    if (values == "bfloat16") {
        options.type = Type::bf16;
    } else if (values == "float16") {
        options.type = Type::f16;
    } else if (values == "int8") {
        options.type = Type::s8;
    } else if (!values.empty() && values != "float32") {
        throw std::invalid_argument("option values is '" + values +
                                    "', wanted float32, bfloat16, float16 or int8");
    }
    const std::string format = option(api, session, "format");
    if (format == "bitmap") {
        options.format = Format::bitmap;
    } else if (format == "sliced") {
        options.format = Format::sliced;
    } else if (format == "rows") {
        options.format = Format::rows;
    } else if (!format.empty()) {
        throw std::invalid_argument("option format is '" + format +
                                    "', wanted bitmap, sliced or rows");
    }
    const std::string activations = option(api, session, "activations");
    if (!activations.empty() && activations != "int16" && activations != "float32") {
        throw std::invalid_argument("option activations is '" + activations +
                                    "', wanted int16 or float32");
    }
    const std::string fuse = option(api, session, "fuse");
    if (!fuse.empty() && fuse != "all" && fuse != "products") {
        throw std::invalid_argument("option fuse is '" + fuse + "', wanted all or products");
    }
    options.between = fuse != "products";
    const std::string cache = option(api, session, "cache");
    if (!cache.empty() && cache != "copied" && cache != "shared") {
        throw std::invalid_argument("option cache is '" + cache + "', wanted copied or shared");
    }
    options.shared_cache = cache == "shared";
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
