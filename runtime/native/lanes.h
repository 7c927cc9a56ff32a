// A second form of int8 bitmaps with few non-zeros, in memory only, for few tokens. A bitmap has every
// column looked at, whatever is there; this holds the non-zeros alone, so that 64 of them are one step:
//
//   unit   96 rows; of cuts of up to 256 columns, for each a head and steps
//   head   rows of the unit, those with most non-zeros in this cut first (96 bytes)
//          | steps of each 16 of them (6 bytes) | zeros, to 128 bytes
//   step   of 16 rows, four entries each: columns within the cut (64 bytes) | values (64 bytes)
//
// Activations of a cut stay in registers, where a permutation finds those of 64 columns; a row has a
// lane of 32 bits, to which its four products are added. What is missing of four has the value 0.
#pragma once

#include "kernels.h"

namespace elsa {

constexpr std::size_t kLaneRows = 16;     // of a step
constexpr std::size_t kLaneEntries = 4;   // of a row in a step
constexpr std::size_t kLaneUnit = 96;     // rows; small, so that threads share a weight evenly
constexpr std::size_t kLaneSlices = kLaneUnit / kLaneRows;
constexpr std::size_t kLaneCut = 256;     // columns: one byte
constexpr std::size_t kLaneHead = 128;    // bytes
constexpr std::size_t kLaneStep = 128;    // bytes

// Gives a weight this form if the kernels have a use for it.
void add_lanes(Owned& weight, const Kernels& kernels);

}  // namespace elsa
