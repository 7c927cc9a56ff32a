// Which nodes of a graph become one of ours: products, and what stands between them.
//
// A region holds only nodes that treat every token alone, so it is run for some hundred tokens at a
// time, with everything between its inputs and outputs in the cache, and onnxruntime sees one node.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "provider.h"
#include "rowwise.h"

namespace elsa {

// A node of a graph as regions see it.
struct Candidate {
    const ort::Node* node = nullptr;
    std::vector<const ort::Node*> helpers;  // that make a product's weight, and go with it
    std::vector<std::string> inputs, outputs;  // values that are not constant
    bool product = false;                   // one that is ours to compute
    std::optional<RowNode> row;
    // The leading sizes of every output are those of this input; -1 when that is not known.
    int rows_of = -1;
};

// The nodes of each region. With `between` false regions are products of one input alone.
std::vector<std::vector<const ort::Node*>> find_regions(std::vector<Candidate> nodes, bool between);

// One thing a region does: products of one input, or a node between products.
struct Step {
    std::vector<Member> members;  // of products; empty otherwise
    std::optional<RowNode> row;
    std::vector<std::string> inputs, outputs;  // outputs of products in the order of members
    std::vector<std::size_t> from, to;         // the same as values of the plan
};

// A value of a plan: an input or output of the region, or one that only it sees.
struct Slot {
    std::size_t width = 0;   // of the last axis
    std::size_t offset = 0;  // of one that only the region sees: floats a token before it
    int input = -1, output = -1;
};

// A region ready to run: steps in order.
struct Plan {
    std::vector<Step> steps;
    std::vector<Slot> values;
    std::size_t floats = 0;  // a token, of all values that only the region sees
};

// Throws std::logic_error when a step reads what nobody makes.
Plan make_plan(std::vector<Step> steps, const std::vector<std::string>& inputs,
               const std::vector<std::string>& outputs);

// One fused node at run time.
struct CompiledNode : Compiled {
    CompiledNode(const ort::Api& api, Plan plan, const ProviderOptions& options);
    void compute(ort::KernelContext* context) const override;

    Plan plan;
    const Kernels& kernels;
    bool rounded;
};

}  // namespace elsa
