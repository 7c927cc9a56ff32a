// y = x * W^T + bias for a packed W, by one of three paths of the same stored format:
//   few tokens   the weight is streamed once for up to four tokens (kernels' bitmap, sliced)
//   some tokens  four rows at a time get their zeros back, in the first cache (widen, four_rows)
//   many tokens  activations are transposed; each non-zero times 64 tokens at once (tile)
#pragma once

#include "kernels.h"
#include "parallel.h"

namespace elsa {

enum class Path { few, some, many };

struct Request {
    const float* x = nullptr;  // (tokens, columns)
    std::size_t tokens = 0;
    float* y = nullptr;           // (tokens, rows)
    const float* bias = nullptr;  // (rows), or missing
    // int8 weights: on the first path round the activations to int8 too, one scale a token. Sums
    // are exact then. On the other paths activations stay float32.
    bool s8_activations = false;
};

// The path expected to be fastest.
Path path_of(const Packed& weight, const Kernels& kernels, const Request& request);

void multiply(const Packed& weight, const Kernels& kernels, const Request& request,
              const Parallel& parallel);

// The last path alone, for any number of tokens.
void prefill(const Packed& weight, const Kernels& kernels, const Request& request,
             const Parallel& parallel);

}  // namespace elsa
