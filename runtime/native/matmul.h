// y = x * W^T + bias for a packed W, by one of two paths of the same stored format:
//   few tokens   the weight is streamed once for up to four tokens (kernels' bitmap, sliced)
//   many tokens  activations are transposed; each non-zero times 64 tokens at once (kernels' tile)
#pragma once

#include "kernels.h"
#include "parallel.h"

namespace elsa {

// From here on the second path is taken.
constexpr std::size_t kPrefillTokens = 16;

struct Request {
    const float* x = nullptr;  // (tokens, columns)
    std::size_t tokens = 0;
    float* y = nullptr;           // (tokens, rows)
    const float* bias = nullptr;  // (rows), or missing
    // int8 weights, few tokens: round the activations to int8 too, one scale a token. Sums are
    // exact then. Otherwise, and on the second path always, activations stay float32.
    bool s8_activations = false;
};

void multiply(const Packed& weight, const Kernels& kernels, const Request& request,
              const Parallel& parallel);

// The second path alone, for any number of tokens.
void prefill(const Packed& weight, const Kernels& kernels, const Request& request,
             const Parallel& parallel);

}  // namespace elsa
