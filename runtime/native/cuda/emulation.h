// A block of GPU threads on one host thread. Every thread is a fibre that runs until it waits for
// its block; the order in which they run can be turned round, so that a forgotten wait shows
// whichever way the data flow. Shared memory is as large as asked for and filled with NaN.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

namespace elsa {
namespace cuda {
namespace emulation {

struct Index {
    unsigned x = 0, y = 0, z = 0;
};

extern thread_local Index threadIdx, blockIdx, blockDim, gridDim;

// Reverse: blocks and threads run from the last to the first.
enum class Order { forward, reverse };

// Runs `kernel` in every thread of grid.x * grid.y blocks.
// Throws std::logic_error when a thread leaves while others of its block wait.
void run(Index grid, unsigned threads, std::size_t shared_bytes, Order order,
         const std::function<void()>& kernel);

// Of the thread that runs.
unsigned char* shared_memory();
void wait();

}  // namespace emulation
}  // namespace cuda
}  // namespace elsa
