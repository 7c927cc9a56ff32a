// The product for many tokens: rows of the weight are written out dense, a part that the second
// cache holds at a time, and multiplied by a dense product: that of cuBLAS, or `multiply_dense`.
#pragma once

#include "decode.h"

namespace elsa {
namespace cuda {

constexpr std::uint32_t kWindowWords = 64;  // of a row in shared memory, written out together
constexpr std::uint32_t kExpandThreads = kSlices * kLanes;
// A word more a row: lanes that write the same column meet different banks.
constexpr std::size_t kExpandShared = kExpandThreads * (kWindowWords + 1) * 4;

struct ExpandCall {
    DeviceWeight weight;
    std::uint32_t first_block = 0;  // of a group of rows
    void* dense = nullptr;          // (rows of the group, columns)
    Element element = Element::f32;
};

// Where a lane stands in its row. Two packets are held: the one in use and the one on its way.
template <Value value>
struct Cursor {
    Packet<value, false> now, next;
    Lane<value> from;    // of `next`
    std::uint32_t left;  // packets from `now` on
    std::uint32_t base;  // column before `now`

    ELSA_DEVICE Cursor(const std::uint8_t* stream, std::uint32_t packets, unsigned lane)
        : from(stream, lane), left(packets), base(0) {
        now.load_if(left > 0, from, 0);
        from.advance(1);
        next.load_if(left > 1, from, 0);
    }

    ELSA_DEVICE void advance(std::uint32_t to) {
        base = to;
        now = next;
        from.advance(1);
        left -= 1;
        next.load_if(left > 1, from, 0);
    }
};

template <Value value, int i>
ELSA_DEVICE void put(const Packet<value, false>& packet, std::uint32_t base, float scale,
                     std::uint32_t begin, std::uint32_t end, Element element, unsigned char* row,
                     bool& used_up) {
    const std::uint32_t step = byte_of<i % 4>(i < 4 ? packet.columns.x : packet.columns.y);
    const std::uint32_t column = i == 0 ? base : base + step;
    const float found = packet.values.template get<i>();
    if (found == 0.0f || column < begin) return;  // padding, or in the window before
    if (column >= end) {
        used_up = false;
    } else {
        write_element(row, element, column - begin, found * scale);
    }
}

// Values of columns [begin, end) of the lane's row.
template <Value value>
ELSA_DEVICE void fill_window(Cursor<value>& cursor, float scale, std::uint32_t begin,
                             std::uint32_t end, Element element, unsigned char* row) {
    while (cursor.left > 0) {
        const std::uint32_t base = cursor.base + byte_of<0>(cursor.now.columns.x);
        bool used_up = true;
        put<value, 0>(cursor.now, base, scale, begin, end, element, row, used_up);
        put<value, 1>(cursor.now, base, scale, begin, end, element, row, used_up);
        put<value, 2>(cursor.now, base, scale, begin, end, element, row, used_up);
        put<value, 3>(cursor.now, base, scale, begin, end, element, row, used_up);
        put<value, 4>(cursor.now, base, scale, begin, end, element, row, used_up);
        put<value, 5>(cursor.now, base, scale, begin, end, element, row, used_up);
        put<value, 6>(cursor.now, base, scale, begin, end, element, row, used_up);
        put<value, 7>(cursor.now, base, scale, begin, end, element, row, used_up);
        if (!used_up) return;
        cursor.advance(base);
    }
}

// Grid: (blocks of rows, slabs); a warp is a slice.
template <Value value>
ELSA_KERNEL ELSA_THREADS(kExpandThreads, 1) expand(const ExpandCall call) {
    ELSA_SHARED(shared);
    const DeviceWeight& weight = call.weight;
    const unsigned lane = threadIdx.x % kLanes, slice = threadIdx.x / kLanes;
    const std::uint32_t block = call.first_block + blockIdx.x, slab = blockIdx.y;
    const std::uint32_t unit = (block * weight.plan.slabs + slab) * kSlices + slice;
    const std::uint16_t* const order = weight.order + std::size_t{unit} * kLanes;
    const std::size_t group = group_start(weight.plan, block);
    const std::size_t own = group + read(order + lane);
    const float scale =
        weight.scales != nullptr && own < weight.rows ? read(weight.scales + own) : 1.0f;
    const std::uint32_t window = kWindowWords * 4 / (call.element == Element::f32 ? 4 : 2);
    const std::size_t first = std::size_t{slab} * weight.plan.slab_columns;
    const std::size_t remain = weight.columns - first;
    const auto columns = static_cast<std::uint32_t>(
        remain < weight.plan.slab_columns ? remain : weight.plan.slab_columns);

    constexpr std::uint32_t kRowBytes = (kWindowWords + 1) * 4;
    unsigned char* const tile = shared + slice * kLanes * kRowBytes;
    const std::uint32_t start = read(weight.starts + unit);
    Cursor<value> cursor(weight.stream + std::size_t{start} * kPacketBytes<value>,
                         read(weight.starts + unit + 1) - start, lane);
    for (std::uint32_t begin = 0; begin < columns; begin += window) {
        const std::uint32_t end = begin + window < columns ? begin + window : columns;
        for (std::uint32_t i = lane; i < kLanes * (kWindowWords + 1); i += kLanes) {
            reinterpret_cast<std::uint32_t*>(tile)[i] = 0;
        }
        wait_for_block();
        fill_window<value>(cursor, scale, begin, end, call.element, tile + lane * kRowBytes);
        wait_for_block();
        for (std::uint32_t other = 0; other < kLanes; ++other) {
            const std::size_t row = read(order + other);
            if (group + row >= weight.rows) continue;
            const std::size_t to = row * weight.columns + first + begin;
            for (std::uint32_t i = lane; i < end - begin; i += kLanes) {
                if (call.element == Element::f32) {
                    static_cast<std::uint32_t*>(call.dense)[to + i] =
                        reinterpret_cast<const std::uint32_t*>(tile + other * kRowBytes)[i];
                } else {
                    static_cast<std::uint16_t*>(call.dense)[to + i] =
                        reinterpret_cast<const std::uint16_t*>(tile + other * kRowBytes)[i];
                }
            }
        }
        wait_for_block();
    }
}

struct DenseCall {
    const void* x = nullptr;      // (tokens, columns)
    const void* dense = nullptr;  // (rows, columns)
    void* y = nullptr;            // first of the rows' results; `stride` elements a token
    const float* bias = nullptr;  // of the first row, or null
    std::size_t tokens = 0, rows = 0, columns = 0, stride = 0;
    Element element = Element::f32;  // of all three
};

constexpr std::uint32_t kTile = 64, kDepth = 16, kTileThreads = 256;
constexpr std::size_t kDenseShared = 2 * kDepth * (kTile + 1) * sizeof(float);

// Rows [first, first + kTile) of a matrix, columns [begin, begin + kDepth), transposed to floats;
// zeros outside.
ELSA_DEVICE void load_tile(const void* from, Element element, std::size_t first, std::size_t rows,
                           std::size_t begin, std::size_t columns, float* tile) {
    for (std::uint32_t i = threadIdx.x; i < kTile * kDepth; i += kTileThreads) {
        const std::uint32_t row = i / kDepth, column = i % kDepth;
        const bool inside = first + row < rows && begin + column < columns;
        tile[column * (kTile + 1) + row] =
            inside ? read_element(from, element, (first + row) * columns + begin + column) : 0.0f;
    }
}

// Where there is no cuBLAS. Grid: (rows / kTile, tokens / kTile); a thread has 4 x 4 results.
ELSA_PLAIN_KERNEL ELSA_THREADS(kTileThreads, 1) multiply_dense(const DenseCall call) {
    ELSA_SHARED(shared);
    float* const weights = reinterpret_cast<float*>(shared);
    float* const activations = weights + kDepth * (kTile + 1);
    const std::size_t row = std::size_t{blockIdx.x} * kTile;
    const std::size_t token = std::size_t{blockIdx.y} * kTile;
    const std::uint32_t across = threadIdx.x % 16, down = threadIdx.x / 16;
    float acc[4][4] = {};
    for (std::size_t begin = 0; begin < call.columns; begin += kDepth) {
        load_tile(call.dense, call.element, row, call.rows, begin, call.columns, weights);
        load_tile(call.x, call.element, token, call.tokens, begin, call.columns, activations);
        wait_for_block();
        for (std::uint32_t k = 0; k < kDepth; ++k) {
            const float* const w = weights + k * (kTile + 1) + across;
            const float* const a = activations + k * (kTile + 1) + down;
            for (int m = 0; m < 4; ++m) {
                for (int n = 0; n < 4; ++n) acc[m][n] = fused(a[m * 16], w[n * 16], acc[m][n]);
            }
        }
        wait_for_block();
    }
    for (int m = 0; m < 4; ++m) {
        for (int n = 0; n < 4; ++n) {
            const std::size_t to = token + down + m * 16, at = row + across + n * 16;
            if (to >= call.tokens || at >= call.rows) continue;
            const float bias = call.bias == nullptr ? 0.0f : read(call.bias + at);
            write_element(call.y, call.element, to * call.stride + at, acc[m][n] + bias);
        }
    }
}

// y = bias in every token, for a product that adds. Grid: (tokens, rows / kAddThreads).
ELSA_PLAIN_KERNEL ELSA_THREADS(kAddThreads, 1) fill_bias(const DenseCall call) {
    const std::size_t row = std::size_t{blockIdx.y} * kAddThreads + threadIdx.x;
    if (row >= call.rows) return;
    write_element(call.y, call.element, blockIdx.x * call.stride + row, read(call.bias + row));
}

}  // namespace cuda
}  // namespace elsa
