// What the kernels read and write: the values of a packet, activations and results of any type.
#pragma once

#include "gpu.h"
#include "sliced32.h"

namespace elsa {
namespace cuda {

enum class Element : std::uint8_t { f32 = 0, bf16 = 1, f16 = 2 };
constexpr std::size_t bytes_of(Element element) { return element == Element::f32 ? 4 : 2; }

template <Value value>
constexpr std::uint32_t kPacketBytes = packet_bytes(value);

// What a lane reads of a packet at once: its eight values, or 16 bytes of each half of them.
template <Value value>
constexpr std::uint32_t kLaneBytes = value == Value::s8 ? 8 : 16;

// The eight values of a lane in registers. Values of padding are zero.
template <Value value>
struct PacketValues;

// Eight values of 16 bits, two to a word.
struct PacketPairs {
    uint4 words;

    ELSA_DEVICE void clear() { words = {0, 0, 0, 0}; }
    template <bool once>
    ELSA_DEVICE void load(const std::uint8_t* from) {
        words = fetch<once>(reinterpret_cast<const uint4*>(from));
    }
    template <int i>
    ELSA_DEVICE std::uint32_t pair() const {
        return i == 0 ? words.x : i == 1 ? words.y : i == 2 ? words.z : words.w;
    }
};

template <>
struct PacketValues<Value::f16> : PacketPairs {
    template <int i>
    ELSA_DEVICE float get() const {
        const std::uint32_t word = pair<i / 2>();
        return i % 2 == 0 ? low_f16(word) : high_f16(word);
    }
};

template <>
struct PacketValues<Value::bf16> : PacketPairs {
    template <int i>
    ELSA_DEVICE float get() const {
        const std::uint32_t word = pair<i / 2>();
        return float_bits(i % 2 == 0 ? word << 16 : word & 0xffff0000u);
    }
};

template <>
struct PacketValues<Value::s8> {
    uint2 words;

    ELSA_DEVICE void clear() { words = {0, 0}; }
    template <bool once>
    ELSA_DEVICE void load(const std::uint8_t* from) {
        words = fetch<once>(reinterpret_cast<const uint2*>(from));
    }
    template <int i>
    ELSA_DEVICE float get() const {
        const std::uint32_t word = i < 4 ? words.x : words.y;
        return static_cast<float>(static_cast<std::int8_t>(byte_of<i % 4>(word)));
    }
};

template <>
struct PacketValues<Value::f32> {
    uint4 low, high;

    ELSA_DEVICE void clear() { low = high = {0, 0, 0, 0}; }
    template <bool once>
    ELSA_DEVICE void load(const std::uint8_t* from) {
        low = fetch<once>(reinterpret_cast<const uint4*>(from));
        high = fetch<once>(reinterpret_cast<const uint4*>(from) + kLanes);
    }
    template <int i>
    ELSA_DEVICE float get() const {
        const uint4& half = i < 4 ? low : high;
        constexpr int at = i % 4;
        return float_bits(at == 0 ? half.x : at == 1 ? half.y : at == 2 ? half.z : half.w);
    }
};

ELSA_DEVICE float read_element(const void* from, Element element, std::size_t at) {
    if (element == Element::f32) return read(static_cast<const float*>(from) + at);
    const std::uint16_t bits = read(static_cast<const std::uint16_t*>(from) + at);
    return element == Element::f16 ? f16_bits(bits)
                                   : float_bits(static_cast<std::uint32_t>(bits) << 16);
}

ELSA_DEVICE void write_element(void* to, Element element, std::size_t at, float value) {
    if (element == Element::f32) {
        static_cast<float*>(to)[at] = value;
    } else {
        static_cast<std::uint16_t*>(to)[at] =
            element == Element::f16 ? bits_f16(value) : bits_bf16(value);
    }
}

}  // namespace cuda
}  // namespace elsa
