// Memory of the GPU that products of one stream use one after the other.
#pragma once

#include <cstddef>
#include <map>
#include <mutex>
#include <vector>

#include "gpu.h"

namespace elsa {
namespace cuda {

class Scratch {
public:
    // A weight that needs so much was made, or is gone.
    void add(std::size_t bytes);
    void remove();

    // Enough for any weight there is. Allocates when a stream is seen for the first time or a
    // larger weight was made since: not while a graph is recorded if it ran once before.
    void* of(Stream stream);

    static Scratch& shared();

private:
    struct Memory {
        void* memory = nullptr;
        std::size_t bytes = 0;
    };

    std::mutex mutex_;
    std::size_t most_ = 0, weights_ = 0;
    std::map<Stream, Memory> of_;
    std::vector<void*> outgrown_;  // graphs recorded earlier still use them
};

}  // namespace cuda
}  // namespace elsa
