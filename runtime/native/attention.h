// Attention of queries over keys and values that are kept from token to token.
//
// One call computes, for every batch entry and every head, softmax(scale q k' + mask) v, and writes the
// keys and values of past and new tokens side by side, which is what onnxruntime's Attention does
// (ai.onnx, opset 23). A cache is read once: it is copied while it is in the first cache, and query
// heads that share keys and values are computed together.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels.h"
#include "parallel.h"

namespace elsa {

// Heads of some tokens: element e of head h of token t of batch entry b is at
// data[b * batch + t * token + h * head + e].
struct HeadsView {
    const float* data = nullptr;
    std::size_t batch = 0, token = 0, head = 0;
};

// Rotary position embedding: the first `half` elements of a head and the `half` behind them turn
// together; of token t of batch entry b by the angles at [b * batch + t * half].
struct Rotary {
    const float* cosines = nullptr;  // null: none
    const float* sines = nullptr;
    std::size_t batch = 0, half = 0;
};

// What is allowed, or added to the scores: of batch entry b, head h, query s and key t at
// b * batch + h * head + s * query + t * key. Strides of 0 repeat.
struct Mask {
    const std::uint8_t* allowed = nullptr;  // one byte each, 0: not allowed
    const float* added = nullptr;           // instead; both null: everything is allowed
    std::size_t batch = 0, head = 0, query = 0, key = 0;
    std::size_t keys = 0;  // that the mask knows; those behind them are not allowed
};

struct Attention {
    std::size_t batches = 0, heads = 0, groups = 0;  // groups: heads of keys; they divide heads
    std::size_t queries = 0, past = 0, added = 0;    // tokens; keys are past + added
    std::size_t width = 0, value_width = 0;          // of a head; multiples of kAttentionStep
    float scale = 1.0f;
    bool causal = false;  // query s sees keys up to past + s
    bool bypass = false;  // caches are too large to stay in the processor's: written past them
    HeadsView q, k, v;
    Rotary turn_q, turn_k;
    Mask mask;
    // (batches, groups, room, width), of which the first tokens are used. The first `past` of keys and
    // values are copied from the old ones, or are there already: the same memory.
    const float *past_keys = nullptr, *past_values = nullptr;
    float *keys = nullptr, *values = nullptr;
    std::size_t past_room = 0, room = 0;  // at least past, and past + added
    float* y = nullptr;                        // with the layout of y_view
    HeadsView y_view;                          // of y; its data is not read
};

constexpr std::size_t kAttentionStep = 16;
constexpr std::size_t kAttentionWidth = 512;  // most elements of a head

// Whether these kernels have what attention needs.
bool can_attend(const Kernels& kernels);

// Queries that see no key at all get zeros, as in onnxruntime and torch.
void attend(const Attention& call, const Kernels& kernels, const Parallel& parallel);

}  // namespace elsa
