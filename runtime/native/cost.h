// Which format a weight is packed in, or that it stays dense: from a small table of measured times.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace elsa {

constexpr int kCostPoints = 5;
// Sparsities the table is measured at; in between it is interpolated over density.
constexpr double kCostSparsity[kCostPoints] = {0.5, 0.7, 0.8, 0.9, 0.95};

struct CostRow {
    // Speed-up over onnxruntime's dense float32 product, one token, weights beyond the caches.
    double bitmap[kCostPoints];
    double sliced[kCostPoints];
    double rows = 0.0;  // whatever the zeros; 0: not measured, never taken
    double lanes[kCostPoints] = {};  // of a bitmap that may have lanes; 0: as without
};

struct Choice {
    bool packed = false;  // otherwise dense
    Format format = Format::bitmap;
    double gain = 1.0;  // expected, one token
    bool prompts_lose = false;  // which is why it stays dense
};

// Below this the gain is inside the noise.
constexpr double kLeastGain = 1.15;
// Smaller matrices stay dense: a call costs more than it saves.
constexpr std::uint64_t kLeastElements = 16 * 1024;

const CostRow& cost_row(Isa isa, Type type);
// With fewer zeros one token still gains, but prompts lose: each value costs them more than a dense one.
// int8 weights compete with onnxruntime's int8 product, which is slower.
constexpr double kMostDensity = 0.59;
// Other weights than int8 are kept with all their values only if they look like an output head: prompts
// bring it one token, and with many onnxruntime's product is a tenth faster. Layers of an MLP have up to
// 8 outputs for each input.
constexpr std::uint64_t kLeastHeadElements = std::uint64_t{4} << 20;  // more than caches hold
constexpr std::uint64_t kLeastHeadRatio = 12;

// `whole`: it may also be kept with all its values; `lanes`: bitmaps get lanes.
Choice choose(std::uint64_t rows, std::uint64_t columns, std::uint64_t nonzeros, Type type, Isa isa,
              bool whole, bool lanes);

}  // namespace elsa
