// A second form of bitmaps with few non-zeros, in memory only, for few tokens. A bitmap has every column
// looked at, whatever is there; this holds the non-zeros alone, and 64 of them are one step:
//
//   unit   96 rows; of cuts of up to 256 columns (int8) or 128 (floats), for each a head and steps
//   head   slices (1 byte) | whole steps of each | entries of one more step of each
//          | the 16 rows of each slice, of the unit | zeros, to whole lines
//   step   of 16 rows, four entries each: columns within the cut (64 bytes) | values; rows that have
//          fewer have values of 0; of the one more only the values that are there, to whole lines
//
// Rows with about as many non-zeros in a cut share a slice; one with far more than others is in several
// places, and each adds to its sum. Rows without any are nowhere.
//
// Activations of a cut stay in registers, as one table for each of their bytes, where one permutation
// finds the bytes at 64 columns. int8: a row has a lane of 32 bits, to which its four products are
// added; its entries lie side by side. Floats: four bytes from four tables are interleaved, so that of
// each 16 bytes the first four columns are first entries of four rows, the next four second ones, and so
// on; values are in order of entries, then rows.
#pragma once

#include "kernels.h"

namespace elsa {

constexpr std::size_t kLaneRows = 16;     // of a step
constexpr std::size_t kLaneEntries = 4;   // of a row in a step
constexpr std::size_t kLaneUnit = 96;     // rows; small, so that threads share a weight evenly
constexpr std::size_t kLaneColumns = 64;  // bytes of a step before its values

// Bytes of a head.
constexpr std::size_t lane_head(std::size_t slices) {
    return round_up(1 + slices * (2 + kLaneRows), kAlign);
}
constexpr std::size_t lane_cut(Type type) { return type == Type::s8 ? 256 : 128; }  // columns

// Gives a weight this form if the kernels have a use for it.
void add_lanes(Owned& weight, const Kernels& kernels);

}  // namespace elsa
