// Memory that a thread keeps between calls, aligned to 64 bytes. Contents are not kept.
#pragma once

#include "packed.h"

namespace elsa {

enum class Scratch : int {
    padded, split, planes, shifted, quantised, scales,           // of the caller, few tokens
    columns_first, rows_first,                           // of the caller, many tokens
    offset, value, pieces, sums,                         // of a worker, many tokens
    wide_rows, wide_sums,                                // of a worker, some tokens
    between,                                             // of the caller, a region
    cache, shares, ranges, unread,                       // of the caller, attention
    queries, scores, turned, blended,                    // of a worker, attention
    count
};

void* scratch_bytes(Scratch which, std::size_t bytes);

template <class T>
T* scratch(Scratch which, std::size_t count) {
    return static_cast<T*>(scratch_bytes(which, count * sizeof(T)));
}

}  // namespace elsa
