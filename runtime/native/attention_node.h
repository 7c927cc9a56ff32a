// Attention nodes of a graph, with the rotary embeddings before them, and such a node at run time.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "attention.h"
#include "provider.h"

namespace elsa {

// Names of the values that a RotaryEmbedding turns heads by; empty: heads come turned.
struct Turning {
    std::string cosines, sines;
    std::size_t half = 0;
};

struct AttentionNode {
    std::vector<const ort::Node*> nodes;  // the attention last
    std::string q, k, v, mask, past_keys, past_values;  // values; empty where there is none
    std::string y, keys, values;
    Turning turn_q, turn_k;
    bool flat = false;  // (batch, tokens, heads * width), otherwise (batch, heads, tokens, width)
    std::size_t heads = 0, groups = 0, width = 0, value_width = 0;
    float scale = 0.0f;
    bool causal = false;
    // Old and new keys are one piece of memory with room for more; the mask says how many there are.
    bool shared = false;
};

// Whether the caches of an attention can be such: the old ones are inputs of the graph that nobody else
// reads, what is kept is an output of the graph, and there is a mask. Not in a graph with graphs inside,
// whose readers are not seen.
bool can_share(const ort::Api& api, const ort::Node* attention,
               const std::vector<std::string>& graph_inputs);

// The attention a node does, as far as these kernels do it; none otherwise.
std::optional<AttentionNode> attention_of(const ort::Api& api, const ort::Node* node);

// What a session reads for every token beside a cache.
struct SessionReads {
    std::size_t attentions = 0;  // that are ours
    std::size_t weight_bytes = 0;
};

// One fused attention at run time.
struct CompiledAttention : Compiled {
    // `inputs` and `outputs` are those of the fused node; `reads` may still grow.
    CompiledAttention(const ort::Api& api, const AttentionNode& node,
                      const std::vector<std::string>& inputs,
                      const std::vector<std::string>& outputs, Isa isa,
                      std::shared_ptr<const SessionReads> reads);
    void compute(ort::KernelContext* context) const override;

    // Places of inputs and outputs, -1 where there is none.
    struct Places {
        int q = -1, k = -1, v = -1, mask = -1, past_keys = -1, past_values = -1;
        int cosines_q = -1, sines_q = -1, cosines_k = -1, sines_k = -1;
        int y = -1, keys = -1, values = -1;
    };
    AttentionNode node;
    const Kernels& kernels;
    Places at;
    std::shared_ptr<const SessionReads> reads;
    std::size_t cache_bytes;  // of this processor
};

}  // namespace elsa
