// Which products of a session run on our kernels, and why the others do not.
#pragma once

#include <cstdint>
#include <string>

namespace elsa {

struct Claim {
    std::string node, op;
    std::uint64_t rows = 0, columns = 0, nonzeros = 0, bytes = 0;
    std::uint64_t lane_bytes = 0;  // of the second form that few tokens read instead; 0: none
    std::string format;  // "bitmap", "sliced", "rows", or "dense": left to onnxruntime
    std::string type;    // of the values kept: "float32", "bfloat16", "float16" or "int8"; else empty
    std::string why;     // of "dense"
    double gain = 1.0;
};

void forget_claims();  // and caches
void remember(const Claim& claim);  // a later one of the same node replaces it
std::string claims_as_json();

// A value of past keys or values that is kept in one piece of memory with room (cache: shared).
void remember_shared_cache(const std::string& value);
std::string shared_caches_as_json();

}  // namespace elsa
