// Reading onnxruntime's tables of functions, for both libraries.
#pragma once

#include <cstddef>
#include <cstring>

#include "ort_api.h"

namespace elsa {
namespace ort {

template <class Function>
void take(const void* table, std::size_t slot, Function& function) {
    using Slot = void (*)();
    static_assert(sizeof(Function) == sizeof(Slot), "a table of function pointers");
    std::memcpy(&function, static_cast<const Slot*>(table) + slot, sizeof function);
}

// The table of an onnxruntime that we know, else null. All other functions of `api` are cleared;
// CreateStatus is taken from the oldest table, to tell an unknown onnxruntime what is wrong.
template <class Functions>
const void* find_table(const ApiBase& base, Functions& api) {
    api = Functions{};
    const void* oldest = base.GetApi(1);
    if (oldest != nullptr) take(oldest, 0, api.CreateStatus);
    const char* version = base.GetVersionString();
    // The table only grows within version 1; what 2 would do is not known.
    if (version == nullptr || std::strncmp(version, "1.", 2) != 0) return nullptr;
    const void* table = base.GetApi(kApiVersion);
    if (table != nullptr) take(table, 0, api.CreateStatus);
    return table;
}

}  // namespace ort
}  // namespace elsa
