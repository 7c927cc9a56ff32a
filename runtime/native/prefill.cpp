// Many tokens: each non-zero times 64 tokens at once.
//
// Tokens are cut into tiles of 64 and laid out columns first. A task takes some rows of the weight,
// turns them once into lists of (column, value), cut so that the columns of a cut stay in the first
// cache, and goes through all tiles with them.
#include <algorithm>
#include <cstring>

#include "half.h"
#include "matmul.h"
#include "parallel.h"
#include "scratch.h"

namespace elsa {
namespace {

constexpr std::size_t kTaskRows = 32;
constexpr std::size_t kTransposeColumns = 512;  // of one task
constexpr std::size_t kPanelBytes = std::size_t{32} << 20;  // of tokens laid out columns first

float stored_value(const std::uint8_t* at, Type type) {
    std::uint16_t half;
    float value;
    switch (type) {
        case Type::f32: std::memcpy(&value, at, 4); return value;
        case Type::bf16: std::memcpy(&half, at, 2); return from_bf16(half);
        case Type::f16: std::memcpy(&half, at, 2); return from_f16(half);
        case Type::s8: break;
    }
    return static_cast<float>(static_cast<std::int8_t>(*at));
}

// Places of the rows' lists: bounds[row][0], with a gap behind each. Returns the length of all.
std::size_t place_lists(const Packed& w, std::size_t first, std::size_t last, WorkList& list) {
    const bool bitmap = w.format == Format::bitmap;
    const std::size_t unit_rows = bitmap ? kGroupRows : kSliceRows;
    list.rows = (last - first) * unit_rows;
    list.bounds = scratch<std::uint32_t>(Scratch::bounds, list.rows * (list.cuts + 1));
    std::size_t end = 0;
    for (std::size_t r = 0; r < list.rows; ++r) {
        list.bounds[r * (list.cuts + 1)] = static_cast<std::uint32_t>(end);
        const std::size_t unit = first + r / unit_rows;
        std::size_t count = 0;
        if (bitmap) {
            for (std::size_t c = 0; c < w.chunks; ++c) {
                std::uint64_t mask;
                const std::size_t at = (c * kGroupRows + r % kGroupRows) * 8;
                std::memcpy(&mask, w.stream + w.offsets[unit] + at, 8);
#if defined(__GNUC__) || defined(__clang__)
                count += static_cast<std::size_t>(__builtin_popcountll(mask));
#else
                for (; mask != 0; mask &= mask - 1) ++count;
#endif
            }
        } else {
            count = w.steps[unit];
        }
        end += count + kListGap;
    }
    return end;
}

void list_sliced(const Packed& w, std::size_t first, std::size_t last, WorkList& list) {
    const std::size_t bytes = value_bytes(w.type);
    for (std::size_t r = 0; r < (last - first) * kSliceRows; ++r) {
        const std::size_t s = first + r / kSliceRows, lane = r % kSliceRows, steps = w.steps[s];
        const std::uint8_t* delta = w.stream + w.offsets[s];
        const std::uint8_t* value = delta + round_up(steps * kSliceRows, kAlign) + lane * bytes;
        std::uint32_t* bounds = list.bounds + r * (list.cuts + 1);
        std::uint32_t next = bounds[0];
        std::size_t column = 0, cut = 0, cut_end = list.cut_chunks * kChunk;
        for (std::size_t t = 0; t < steps; ++t) {
            column += delta[t * kSliceRows + lane];
            for (; column >= cut_end; cut_end += list.cut_chunks * kChunk) bounds[++cut] = next;
            const float weight = stored_value(value + t * kSliceRows * bytes, w.type);
            if (weight == 0.0f) continue;  // a step that only moves on
            list.offset[next] = static_cast<std::uint32_t>(column * kTile);
            list.value[next++] = weight;
        }
        while (cut < list.cuts) bounds[++cut] = next;
    }
}

// A row of sums -> results, still tokens side by side.
void finish_row(const Packed& w, const float* biases, std::size_t row, const float* sums,
                float* to) {
    const float scale = w.scales != nullptr ? w.scales[row] : 1.0f;
    const float bias = biases != nullptr ? biases[row] : 0.0f;
    for (std::size_t t = 0; t < kTile; ++t) to[t] = sums[t] * scale + bias;
}

struct Panel {
    const Part& part;  // its y is that of this panel's tokens
    const Packed& weight;
    const Kernels& kernels;
    const Request& request;  // of this panel's tokens
    const Parallel& parallel;
    std::size_t tiles;
    float* xt;  // (tiles, columns, 64)
    float* yt;  // (tiles, rows, 64), sliced only: its rows come in another order

    std::size_t tokens_of(std::size_t tile) const {
        return std::min(kTile, request.tokens - tile * kTile);
    }
    void lay_out_tokens() const;
    void rows(std::size_t first, std::size_t last) const;
    void lay_out_results() const;
};

void Panel::lay_out_tokens() const {
    const std::size_t columns = weight.columns;
    const std::size_t parts = (columns + kTransposeColumns - 1) / kTransposeColumns;
    for_each(parallel, tiles * parts, [&](std::size_t i) {
        const std::size_t tile = i / parts, start = i % parts * kTransposeColumns;
        const std::size_t count = std::min(kTransposeColumns, columns - start);
        const std::size_t tokens = tokens_of(tile), wide = round_up(tokens, 16);
        float* to = xt + (tile * columns + start) * kTile;
        kernels.transpose(request.x + tile * kTile * columns + start, columns, to, kTile, tokens,
                          count);
        for (std::size_t k = 0; k < count && tokens < wide; ++k) {
            std::memset(to + k * kTile + tokens, 0, (wide - tokens) * sizeof(float));
        }
    });
}

void Panel::rows(std::size_t first, std::size_t last) const {
    const Packed& w = weight;
    const bool bitmap = w.format == Format::bitmap;
    const std::size_t elements = w.rows * w.columns;
    WorkList list;
    // Fewer than some 16 non-zeros a row and cut, and loading and storing the sums costs more.
    const std::uint64_t tenths = 10 * w.nonzeros / elements;
    list.cut_chunks = tenths >= 3 ? 1 : tenths >= 1 ? 2 : 4;
    list.cuts = (w.chunks + list.cut_chunks - 1) / list.cut_chunks;
    const std::size_t length = place_lists(w, first, last, list);
    list.offset = scratch<std::uint32_t>(Scratch::offset, length);
    list.value = scratch<float>(Scratch::value, length);
    if (bitmap) {
        kernels.list_bitmap[static_cast<int>(w.type)](w, first, last, list);
    } else {
        list_sliced(w, first, last, list);
    }
    const std::size_t start = first * (bitmap ? kGroupRows : kSliceRows);
    const std::size_t count = std::min(list.rows, w.rows - start);
    float* sums = scratch<float>(Scratch::sums, list.rows * kTile);
    for (std::size_t tile = 0; tile < tiles; ++tile) {
        const std::size_t vectors = round_up(tokens_of(tile), 16) / 16;
        for (std::size_t cut = 0; cut < list.cuts; ++cut) {
            kernels.tile(list, cut, xt + tile * w.columns * kTile, sums, vectors);
        }
        if (bitmap) {
            if (w.scales != nullptr || part.bias != nullptr) {
                for (std::size_t r = 0; r < count; ++r) {
                    finish_row(w, part.bias, start + r, sums + r * kTile, sums + r * kTile);
                }
            }
            kernels.transpose(sums, kTile, part.y + tile * kTile * w.rows + start, w.rows, count,
                              tokens_of(tile));
        } else {
            for (std::size_t r = 0; r < count; ++r) {
                const std::size_t row = w.order[start + r];
                finish_row(w, part.bias, row, sums + r * kTile,
                           yt + (tile * w.rows + row) * kTile);
            }
        }
    }
}

void Panel::lay_out_results() const {
    const std::size_t parts = (weight.rows + kTile - 1) / kTile;
    for_each(parallel, tiles * parts, [&](std::size_t i) {
        const std::size_t tile = i / parts, row = i % parts * kTile;
        kernels.transpose(yt + (tile * weight.rows + row) * kTile, kTile,
                          part.y + tile * kTile * weight.rows + row, weight.rows,
                          std::min(kTile, weight.rows - row), tokens_of(tile));
    });
}

}  // namespace

void prefill(const Part& part, const Kernels& kernels, const Request& request,
             const Parallel& parallel) {
    const Packed& weight = *part.weight;
    const bool bitmap = weight.format == Format::bitmap;
    const std::size_t widest = bitmap ? weight.columns : std::max(weight.columns, weight.rows);
    const std::size_t most = std::max<std::size_t>(1, kPanelBytes / (widest * kTile * 4));
    const std::size_t units = kTaskRows / (bitmap ? kGroupRows : kSliceRows);
    const std::size_t tasks = (weight.units + units - 1) / units;
    for (std::size_t done = 0; done < request.tokens; done += most * kTile) {
        Request some = request;
        some.tokens = std::min(most * kTile, request.tokens - done);
        some.x += done * weight.columns;
        Part of_them = part;
        of_them.y += done * weight.rows;
        const std::size_t tiles = (some.tokens + kTile - 1) / kTile;
        float* xt = scratch<float>(Scratch::columns_first, tiles * weight.columns * kTile);
        float* yt = bitmap ? nullptr
                           : scratch<float>(Scratch::rows_first, tiles * weight.rows * kTile);
        const Panel panel{of_them, weight, kernels, some, parallel, tiles, xt, yt};
        panel.lay_out_tokens();
        for_each(parallel, tasks, [&](std::size_t i) {
            panel.rows(i * units, std::min(weight.units, (i + 1) * units));
        });
        if (!bitmap) panel.lay_out_results();
    }
}

}  // namespace elsa
