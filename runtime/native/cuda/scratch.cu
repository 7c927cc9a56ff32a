#include "scratch.h"

#include <algorithm>

#include "product.h"

namespace elsa {
namespace cuda {

Scratch& Scratch::shared() {
    static Scratch* const only = new Scratch;  // outlives the library that unloads the GPU's driver
    return *only;
}

void Scratch::add(std::size_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    most_ = std::max(most_, bytes);
    ++weights_;
}

void Scratch::remove() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (--weights_ != 0) return;
    for (const auto& [stream, memory] : of_) release(memory.memory);
    for (void* memory : outgrown_) release(memory);
    of_.clear();
    outgrown_.clear();
    most_ = 0;
}

void* Scratch::of(Stream stream) {
    const std::lock_guard<std::mutex> lock(mutex_);
    Memory& memory = of_[stream];
    if (memory.bytes < most_ || memory.memory == nullptr) {
        void* const larger = allocate(most_);
        if (memory.memory != nullptr) outgrown_.push_back(memory.memory);
        memory = {larger, most_};
    }
    return memory.memory;
}

}  // namespace cuda
}  // namespace elsa
