#include "claims.h"

#include <cstdio>
#include <map>
#include <mutex>
#include <set>

namespace elsa {
namespace {

std::mutex mutex;

std::map<std::string, Claim>& claims() {
    static std::map<std::string, Claim> all;
    return all;
}

std::set<std::string>& caches() {
    static std::set<std::string> all;
    return all;
}

std::string quoted(const std::string& text) {
    std::string out = "\"";
    for (const char c : text) {
        const auto byte = static_cast<unsigned char>(c);
        if (c == '"' || c == '\\') {
            out += '\\';
            out += c;
        } else if (byte < 0x20) {
            char escaped[8];
            std::snprintf(escaped, sizeof escaped, "\\u%04x", static_cast<unsigned>(byte));
            out += escaped;
        } else {
            out += c;
        }
    }
    return out + '"';
}

}  // namespace

void forget_claims() {
    const std::lock_guard<std::mutex> lock(mutex);
    claims().clear();
    caches().clear();
}

void remember_shared_cache(const std::string& value) {
    const std::lock_guard<std::mutex> lock(mutex);
    caches().insert(value);
}

std::string shared_caches_as_json() {
    const std::lock_guard<std::mutex> lock(mutex);
    std::string out = "[";
    for (const std::string& value : caches()) out += (out.size() > 1 ? ", " : "") + quoted(value);
    return out + "]";
}

void remember(const Claim& claim) {
    const std::lock_guard<std::mutex> lock(mutex);
    claims()[claim.node] = claim;
}

std::string claims_as_json() {
    const std::lock_guard<std::mutex> lock(mutex);
    std::string out = "[";
    for (const auto& [name, claim] : claims()) {
        char gain[32];
        std::snprintf(gain, sizeof gain, "%.3f", claim.gain);
        if (out.size() > 1) out += ", ";
        out += "{\"node\": " + quoted(name) + ", \"op\": " + quoted(claim.op) +
               ", \"rows\": " + std::to_string(claim.rows) +
               ", \"columns\": " + std::to_string(claim.columns) +
               ", \"nonzeros\": " + std::to_string(claim.nonzeros) +
               ", \"bytes\": " + std::to_string(claim.bytes) +
               ", \"lane_bytes\": " + std::to_string(claim.lane_bytes) +
               ", \"format\": " + quoted(claim.format) + ", \"type\": " + quoted(claim.type) +
               ", \"why\": " + quoted(claim.why) +
               ", \"gain\": " + gain + "}";
    }
    return out + "]";
}

}  // namespace elsa
