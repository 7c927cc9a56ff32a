// Compiled by nvcc, and by a host compiler against the emulation.
#include "product.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "launch.h"

namespace elsa {
namespace cuda {
namespace {

// Dense rows are of at most four bytes an element.
std::size_t dense_bytes(const DeviceWeight& weight) {
    return std::min<std::size_t>(weight.plan.group_rows, weight.rows) * weight.columns * 4;
}

template <Value value>
void launch_decode(const DecodeCall& call, std::size_t at_once, Stream stream) {
    const Plan& plan = call.weight.plan;
    const std::size_t slices = (call.weight.rows + kBlockRows - 1) / kBlockRows * kSlices;
    const Grid grid{static_cast<unsigned>(slices / plan.slices_per_block), plan.slabs};
    const unsigned threads = plan.warps() * kLanes;
    const std::size_t shared = decode_shared_bytes(plan, at_once);
    switch (at_once) {
        case 1: launch(decode<value, 1>, grid, threads, shared, stream, call); break;
        case 2: launch(decode<value, 2>, grid, threads, shared, stream, call); break;
        case 4: launch(decode<value, 4>, grid, threads, shared, stream, call); break;
        default: launch(decode<value, 8>, grid, threads, shared, stream, call); break;
    }
}

template <Value value>
void launch_expand(const ExpandCall& call, unsigned blocks, Stream stream) {
    launch(expand<value>, {blocks, call.weight.plan.slabs}, kExpandThreads, kExpandShared, stream,
           call);
}

// A kernel's limit is one for all weights: always the highest.
template <Value value>
void allow_shared(std::size_t most) {
    allow(decode<value, 1>, most);
    allow(decode<value, 2>, most);
    allow(decode<value, 4>, most);
    allow(decode<value, 8>, most);
}

unsigned groups(std::size_t count, std::size_t size) {
    return static_cast<unsigned>((count + size - 1) / size);
}

}  // namespace

std::size_t decode_tokens(const Plan& plan, const Device& device) {
    std::size_t tokens = 8;
    while (tokens > 1 && decode_shared_bytes(plan, tokens) > device.shared_bytes) tokens /= 2;
    if (decode_shared_bytes(plan, tokens) > device.shared_bytes) {
        throw std::runtime_error("this GPU has too little shared memory for a column slab");
    }
    return tokens;
}

Weight::Weight(const Sliced& sliced, const float* scales, const float* bias, const Device& device)
    : value_(sliced.value), at_once_(decode_tokens(sliced.plan, device)) {
    weight_.rows = sliced.rows;
    weight_.columns = sliced.columns;
    weight_.plan = sliced.plan;
    const auto bytes = [](const auto& list) { return list.size() * sizeof(list[0]); };
    weight_.stream = static_cast<const std::uint8_t*>(
        upload(stream_, sliced.stream.data(), bytes(sliced.stream)));
    weight_.starts = static_cast<const std::uint32_t*>(
        upload(starts_, sliced.starts.data(), bytes(sliced.starts)));
    weight_.bases = static_cast<const std::uint16_t*>(
        upload(bases_, sliced.bases.data(), bytes(sliced.bases)));
    weight_.order = static_cast<const std::uint16_t*>(
        upload(order_, sliced.order.data(), bytes(sliced.order)));
    if (scales != nullptr) {
        weight_.scales = static_cast<const float*>(upload(scales_, scales, sliced.rows * 4));
    }
    if (bias != nullptr) {
        bias_ = static_cast<const float*>(upload(bias_memory_, bias, sliced.rows * 4));
    }
    switch (value_) {
        case Value::f32: allow_shared<Value::f32>(device.shared_bytes); break;
        case Value::bf16: allow_shared<Value::bf16>(device.shared_bytes); break;
        case Value::f16: allow_shared<Value::f16>(device.shared_bytes); break;
        case Value::s8: allow_shared<Value::s8>(device.shared_bytes); break;
    }
}

const void* Weight::upload(Memory& memory, const void* from, std::size_t bytes) {
    memory.reset(allocate(bytes));
    copy_in(memory.get(), from, bytes);
    device_bytes_ += bytes;
    return memory.get();
}

std::size_t Weight::scratch_bytes() const {
    const std::size_t sums =
        weight_.plan.slabs > 1 ? weight_.plan.slabs * at_once_ * weight_.rows * 4 : 0;
    return std::max(sums, dense_bytes(weight_));
}

// Whether writing rows out in the activations' type rounds no more than a dense model would.
bool Weight::dense_is_exact(Element element) const {
    return element == Element::f32 || value_ == Value::s8 ||
           (element == Element::f16 && value_ == Value::f16) ||
           (element == Element::bf16 && value_ == Value::bf16);
}

void Weight::multiply(const Call& call) const {
    if (call.tokens > kMostDecodeTokens && dense_is_exact(call.element)) {
        multiply_expanded(call);
        return;
    }
    for (std::size_t first = 0; first < call.tokens; first += at_once_) {
        decode_some(call, first, std::min(at_once_, call.tokens - first));
    }
}

void Weight::decode_some(const Call& call, std::size_t first, std::size_t tokens) const {
    DecodeCall some;
    some.weight = weight_;
    some.x = static_cast<const std::uint8_t*>(call.x) +
             first * weight_.columns * bytes_of(call.element);
    some.y = static_cast<std::uint8_t*>(call.y) + first * weight_.rows * bytes_of(call.element);
    some.bias = bias_;
    some.sums = static_cast<float*>(call.scratch);
    some.element = call.element;
    some.tokens = static_cast<std::uint32_t>(tokens);
    const std::size_t at_once = tokens > 4 ? 8 : tokens > 2 ? 4 : tokens;
    switch (value_) {
        case Value::f32: launch_decode<Value::f32>(some, at_once, call.stream); break;
        case Value::bf16: launch_decode<Value::bf16>(some, at_once, call.stream); break;
        case Value::f16: launch_decode<Value::f16>(some, at_once, call.stream); break;
        case Value::s8: launch_decode<Value::s8>(some, at_once, call.stream); break;
    }
    if (weight_.plan.slabs == 1) return;
    launch(add_slabs, {groups(weight_.rows, kAddThreads), some.tokens}, kAddThreads, 0, call.stream,
           some);
}

void Weight::multiply_expanded(const Call& call) const {
    const std::size_t most = weight_.plan.group_rows, size = bytes_of(call.element);
    for (std::size_t first = 0; first < weight_.rows; first += most) {
        ExpandCall some{weight_, static_cast<std::uint32_t>(first / kBlockRows), call.scratch,
                        call.element};
        DenseCall dense;
        dense.rows = std::min(most, weight_.rows - first);
        const unsigned blocks = groups(dense.rows, kBlockRows);
        switch (value_) {
            case Value::f32: launch_expand<Value::f32>(some, blocks, call.stream); break;
            case Value::bf16: launch_expand<Value::bf16>(some, blocks, call.stream); break;
            case Value::f16: launch_expand<Value::f16>(some, blocks, call.stream); break;
            case Value::s8: launch_expand<Value::s8>(some, blocks, call.stream); break;
        }
        dense.x = call.x;
        dense.dense = call.scratch;
        dense.y = static_cast<std::uint8_t*>(call.y) + first * size;
        dense.bias = bias_ == nullptr ? nullptr : bias_ + first;
        dense.tokens = call.tokens;
        dense.columns = weight_.columns;
        dense.stride = weight_.rows;
        dense.element = call.element;
        if (call.product == nullptr) {
            launch(multiply_dense, {groups(dense.rows, kTile), groups(dense.tokens, kTile)},
                   kTileThreads, kDenseShared, call.stream, dense);
            continue;
        }
        if (dense.bias != nullptr) {
            launch(fill_bias,
                   {static_cast<unsigned>(dense.tokens), groups(dense.rows, kAddThreads)},
                   kAddThreads, 0, call.stream, dense);
        }
        call.product(call.library, dense, dense.bias != nullptr);
    }
}

}  // namespace cuda
}  // namespace elsa
