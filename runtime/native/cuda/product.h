// A packed weight on the GPU, and its product with activations, enqueued on a stream: no waiting
// and no allocation there, so that CUDA graphs can record it.
#pragma once

#include <memory>
#include <string>

#include "prefill.h"

namespace elsa {
namespace cuda {

// The GPU in use. Every function throws std::runtime_error with CUDA's own message.
struct Device {
    std::size_t multiprocessors = 0;
    std::size_t shared_bytes = 0;  // that a thread block may ask for

    static Device current();
};

void* allocate(std::size_t bytes);
void release(void* memory) noexcept;
void copy_in(void* to, const void* from, std::size_t bytes);
void copy_out(void* to, const void* from, std::size_t bytes);  // waits

// As many tokens as the decode kernel takes at once, at most 8.
std::size_t decode_tokens(const Plan& plan, const Device& device);

constexpr std::size_t kMostDecodeTokens = 16;  // from more on, rows are written out dense

// y (n, m) column-major = W^T x (+ y): what cuBLAS does. `adds` keeps what y holds.
using DenseProduct = void (*)(void* library, const DenseCall& call, bool adds);

struct Call {
    const void* x = nullptr;
    void* y = nullptr;
    std::size_t tokens = 0;
    Element element = Element::f32;
    void* scratch = nullptr;  // scratch_bytes(); no other product may use it at the same time
    Stream stream = nullptr;
    DenseProduct product = nullptr;  // null: our own
    void* library = nullptr;         // what it is given
};

class Weight {
public:
    // scales: (rows) of s8, bias: (rows); either may be null. They are copied.
    Weight(const Sliced& sliced, const float* scales, const float* bias, const Device& device);

    void multiply(const Call& call) const;

    std::size_t scratch_bytes() const;
    std::size_t device_bytes() const { return device_bytes_; }
    std::size_t rows() const { return weight_.rows; }
    std::size_t columns() const { return weight_.columns; }

private:
    struct Release {
        void operator()(void* memory) const noexcept { release(memory); }
    };
    using Memory = std::unique_ptr<void, Release>;

    const void* upload(Memory& memory, const void* from, std::size_t bytes);
    bool dense_is_exact(Element element) const;
    void decode_some(const Call& call, std::size_t first, std::size_t tokens) const;
    void multiply_expanded(const Call& call) const;

    DeviceWeight weight_;
    Value value_;
    const float* bias_ = nullptr;
    Memory stream_, starts_, bases_, order_, scales_, bias_memory_;
    std::size_t at_once_ = 8, device_bytes_ = 0;
};

}  // namespace cuda
}  // namespace elsa
