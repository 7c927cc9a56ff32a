// y = x * W^T + bias for packed W, by one of three paths of the same stored format:
//   few tokens   the weight is streamed once for up to four tokens (kernels' bitmap, sliced, rows)
//   some tokens  four rows at a time get their zeros back, in the first cache (widen, four_rows)
//   many tokens  activations are transposed; each non-zero times 64 tokens at once (tile)
#pragma once

#include <vector>

#include "kernels.h"
#include "parallel.h"

namespace elsa {

enum class Path { few, some, many };

// One product.
struct Part {
    const Packed* weight = nullptr;
    const float* bias = nullptr;  // (rows), or missing
    float* y = nullptr;           // (tokens, rows)
};

// What the products of a call share.
struct Request {
    const float* x = nullptr;  // (tokens, columns)
    std::size_t tokens = 0;
    // int8 weights: on the first path round activations to integers of up to 16 bits (the weight's
    // `levels`), one scale a token. Sums are exact then. On the other paths they stay float32.
    bool rounded = false;
};

// The path expected to be fastest.
Path path_of(const Packed& weight, const Kernels& kernels, const Request& request);

// All products, whose weights have the same number of columns.
void multiply(const Part* parts, std::size_t count, const Kernels& kernels, const Request& request,
              const Parallel& parallel);

// The last path alone, for any number of tokens; of products whose weights have the same number of
// columns.
void prefill(const std::vector<Part>& parts, const Kernels& kernels, const Request& request,
             const Parallel& parallel);

}  // namespace elsa
