// The product for few tokens: y (tokens, rows) = x (tokens, columns) * W^T + bias.
//
// A lane is a row, so nothing is summed across lanes and no value waits for another: per value one
// byte is turned into an address, one activation fetched from shared memory, one value widened, one
// multiply-add done for each token. docs/cuda.md counts the instructions.
#pragma once

#include "values.h"

namespace elsa {
namespace cuda {

constexpr int kAhead = 4;  // packets in flight: 3 KB a warp of float16 values

// A weight in the GPU's memory.
struct DeviceWeight {
    const std::uint8_t* stream = nullptr;
    const std::uint32_t* starts = nullptr;
    const std::uint16_t* bases = nullptr;
    const std::uint16_t* order = nullptr;
    const float* scales = nullptr;  // (rows) of s8, else null
    std::size_t rows = 0, columns = 0;
    Plan plan;
};

struct DecodeCall {
    DeviceWeight weight;
    const void* x = nullptr;      // (tokens, columns)
    void* y = nullptr;            // (tokens, rows)
    const float* bias = nullptr;  // (rows) or null
    float* sums = nullptr;        // (slabs, tokens, rows) when there are several slabs
    Element element = Element::f32;  // of x and y
    std::uint32_t tokens = 1;        // at most the kernel's
};

constexpr std::size_t decode_shared_bytes(const Plan& plan, std::size_t tokens) {
    const std::size_t activations = plan.slab_columns * tokens;
    const std::size_t sums = plan.warps() * kLanes * tokens;
    return (activations > sums ? activations : sums) * sizeof(float);
}

// Where a lane reads its next packet.
template <Value value>
struct Lane {
    const std::uint8_t *columns, *values;

    ELSA_DEVICE Lane(const std::uint8_t* packet, unsigned lane)
        : columns(packet + lane * kPacket),
          values(packet + kIndexBytes + lane * kLaneBytes<value>) {}

    ELSA_DEVICE void advance(std::uint32_t packets) {
        columns += packets * kPacketBytes<value>;
        values += packets * kPacketBytes<value>;
    }
};

// once: the lanes of a warp read it together, and nobody again.
template <Value value, bool once>
struct Packet {
    uint2 columns;
    PacketValues<value> values;

    ELSA_DEVICE void load(const Lane<value>& from, std::uint32_t ahead) {
        columns = fetch<once>(
            reinterpret_cast<const uint2*>(from.columns + ahead * kPacketBytes<value>));
        values.template load<once>(from.values + ahead * kPacketBytes<value>);
    }

    // Beyond the end: zeros, which change nothing.
    ELSA_DEVICE void load_if(bool inside, const Lane<value>& from, std::uint32_t ahead) {
        columns = {0, 0};
        values.clear();
        if (inside) load(from, ahead);
    }
};

// acc[m] += value * x[column][m], the tokens of a column side by side.
template <int tokens>
ELSA_DEVICE void add_product(float (&acc)[tokens], float value, const float* x) {
    if constexpr (tokens % 4 == 0) {
        for (int m = 0; m < tokens; m += 4) {
            const uint4 four = *reinterpret_cast<const uint4*>(x + m);
            acc[m] = fused(value, float_bits(four.x), acc[m]);
            acc[m + 1] = fused(value, float_bits(four.y), acc[m + 1]);
            acc[m + 2] = fused(value, float_bits(four.z), acc[m + 2]);
            acc[m + 3] = fused(value, float_bits(four.w), acc[m + 3]);
        }
    } else if constexpr (tokens == 2) {
        const uint2 two = *reinterpret_cast<const uint2*>(x);
        acc[0] = fused(value, float_bits(two.x), acc[0]);
        acc[1] = fused(value, float_bits(two.y), acc[1]);
    } else {
        acc[0] = fused(value, x[0], acc[0]);
    }
}

template <Value value, int tokens, int i>
ELSA_DEVICE void add_value(float (&acc)[tokens], const Packet<value, true>& packet,
                           const float* base) {
    const std::uint32_t step = byte_of<i % 4>(i < 4 ? packet.columns.x : packet.columns.y);
    add_product<tokens>(acc, packet.values.template get<i>(), base + step * tokens);
}

// base: where the lane stands; it goes on to the packet's first value.
template <Value value, int tokens>
ELSA_DEVICE void add_packet(float (&acc)[tokens], const Packet<value, true>& packet,
                            const float*& base) {
    base += byte_of<0>(packet.columns.x) * tokens;
    add_product<tokens>(acc, packet.values.template get<0>(), base);
    add_value<value, tokens, 1>(acc, packet, base);
    add_value<value, tokens, 2>(acc, packet, base);
    add_value<value, tokens, 3>(acc, packet, base);
    add_value<value, tokens, 4>(acc, packet, base);
    add_value<value, tokens, 5>(acc, packet, base);
    add_value<value, tokens, 6>(acc, packet, base);
    add_value<value, tokens, 7>(acc, packet, base);
}

// The slab's activations as float, the tokens of a column side by side; tokens that are not there
// are zero.
template <int tokens>
ELSA_DEVICE void load_activations(const DecodeCall& call, std::size_t first, std::uint32_t columns,
                                  float* x) {
    for (int m = 0; m < tokens; ++m) {
        const bool there = static_cast<std::uint32_t>(m) < call.tokens;
        const std::size_t row = static_cast<std::size_t>(m) * call.weight.columns + first;
        for (std::uint32_t i = threadIdx.x; i < columns; i += blockDim.x) {
            x[i * tokens + m] = there ? read_element(call.x, call.element, row + i) : 0.0f;
        }
    }
}

// First row of the group that a block of rows belongs to.
ELSA_DEVICE std::size_t group_start(const Plan& plan, std::uint32_t block) {
    return std::size_t{block} * kBlockRows / plan.group_rows * plan.group_rows;
}

// What a lane has summed up, of which row, for all tokens.
template <int tokens>
ELSA_DEVICE void write_sums(const DecodeCall& call, std::uint32_t unit, std::uint32_t slab,
                            unsigned lane, const float (&acc)[tokens]) {
    const DeviceWeight& weight = call.weight;
    const std::uint32_t block = unit / (weight.plan.slabs * kSlices);
    const std::size_t row = group_start(weight.plan, block) +
                            read(weight.order + std::size_t{unit} * kLanes + lane);
    if (row >= weight.rows) return;
    const float scale = weight.scales == nullptr ? 1.0f : read(weight.scales + row);
    const float bias = call.bias == nullptr ? 0.0f : read(call.bias + row);
    for (int m = 0; m < tokens; ++m) {
        if (static_cast<std::uint32_t>(m) >= call.tokens) break;
        if (weight.plan.slabs > 1) {
            const std::size_t token = std::size_t{slab} * call.tokens + m;
            call.sums[token * weight.rows + row] = acc[m] * scale;
        } else {
            write_element(call.y, call.element, m * weight.rows + row,
                          fused(acc[m], scale, bias));
        }
    }
}

// Grid: (slices / slices_per_block, slabs); threads: 32 * warps.
template <Value value, int tokens>
ELSA_KERNEL ELSA_THREADS(kMostWarps* kLanes, tokens < 8 ? 2 : 1) decode(const DecodeCall call) {
    ELSA_SHARED(shared);
    const DeviceWeight& weight = call.weight;
    const Plan& plan = weight.plan;
    float* const x = reinterpret_cast<float*>(shared);
    const unsigned lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
    const std::uint32_t part = warp % plan.parts, slab = blockIdx.y;
    const std::uint32_t slice = blockIdx.x * plan.slices_per_block + warp / plan.parts;
    const std::uint32_t unit =
        (slice / kSlices * plan.slabs + slab) * kSlices + slice % kSlices;
    const std::uint32_t start = read(weight.starts + unit);
    const std::uint32_t packets = read(weight.starts + unit + 1) - start;
    std::uint32_t left = packets * (part + 1) / plan.parts - packets * part / plan.parts;
    Lane<value> from(weight.stream + (std::size_t{start} + packets * part / plan.parts) *
                                         kPacketBytes<value>,
                     lane);

    // The first packets are on their way before the activations are waited for.
    Packet<value, true> ahead[kAhead];
    ELSA_UNROLL
    for (int i = 0; i < kAhead; ++i) {
        ahead[i].load_if(static_cast<std::uint32_t>(i) < left, from, i);
    }
    const std::size_t first = std::size_t{slab} * plan.slab_columns;
    const std::size_t remain = weight.columns - first;
    load_activations<tokens>(
        call, first,
        static_cast<std::uint32_t>(remain < plan.slab_columns ? remain : plan.slab_columns), x);
    const float* base =
        x + read(weight.bases + (std::size_t{unit} * plan.parts + part) * kLanes + lane) * tokens;
    wait_for_block();

    float acc[tokens] = {};
    // Each packet makes room for the one that lies kAhead behind it: without asking whether there
    // is one while there are, which a fifth of the instructions would be spent on.
    for (; left >= 2 * kAhead; left -= kAhead) {
        ELSA_UNROLL
        for (int i = 0; i < kAhead; ++i) {
            add_packet<value, tokens>(acc, ahead[i], base);
            ahead[i].load(from, kAhead + i);
        }
        from.advance(kAhead);
    }
    for (; left > 0; left = left > kAhead ? left - kAhead : 0) {
        ELSA_UNROLL
        for (int i = 0; i < kAhead; ++i) {
            add_packet<value, tokens>(acc, ahead[i], base);
            ahead[i].load_if(static_cast<std::uint32_t>(kAhead + i) < left, from, kAhead + i);
        }
        from.advance(kAhead);
    }

    if (plan.parts == 1) {
        write_sums<tokens>(call, unit, slab, lane, acc);
        return;
    }
    // The parts of a slice are added in their order, whichever warp is done first.
    wait_for_block();
    for (int m = 0; m < tokens; ++m) x[(warp * tokens + m) * kLanes + lane] = acc[m];
    wait_for_block();
    if (part != 0) return;
    for (std::uint32_t other = 1; other < plan.parts; ++other) {
        for (int m = 0; m < tokens; ++m) {
            acc[m] += x[((warp + other) * tokens + m) * kLanes + lane];
        }
    }
    write_sums<tokens>(call, unit, slab, lane, acc);
}

constexpr unsigned kAddThreads = 256;

// y = the sums of all slabs, in their order, + bias. Grid: (rows / kAddThreads, tokens).
ELSA_PLAIN_KERNEL ELSA_THREADS(kAddThreads, 1) add_slabs(const DecodeCall call) {
    const std::size_t rows = call.weight.rows;
    const std::size_t row = std::size_t{blockIdx.x} * kAddThreads + threadIdx.x;
    if (row >= rows) return;
    float sum = call.bias == nullptr ? 0.0f : read(call.bias + row);
    for (std::uint32_t slab = 0; slab < call.weight.plan.slabs; ++slab) {
        sum += call.sums[(std::size_t{slab} * call.tokens + blockIdx.y) * rows + row];
    }
    write_element(call.y, call.element, blockIdx.y * rows + row, sum);
}

}  // namespace cuda
}  // namespace elsa
