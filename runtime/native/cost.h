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
};

struct Choice {
    bool packed = false;  // otherwise dense
    Format format = Format::bitmap;
    double gain = 1.0;  // expected, one token
};

// Below this the gain is inside the noise, and products of 16 to 48 tokens may lose.
constexpr double kLeastGain = 1.15;
// Smaller matrices stay dense: a call costs more than it saves.
constexpr std::uint64_t kLeastElements = 16 * 1024;

const CostRow& cost_row(Isa isa, Type type);
Choice choose(std::uint64_t rows, std::uint64_t columns, std::uint64_t nonzeros, Type type,
              Isa isa);

}  // namespace elsa
