// Many tokens: each non-zero times up to 64 tokens at once.
//
// Tokens are cut into tiles of at most 64 and laid out columns first. A task takes some rows of the
// weight, turns them once into lists of (column, value), cut so that the activations of a cut stay
// in the first cache, and goes through all tiles with them. Slices, whose non-zeros are lists
// already, are multiplied as they are, tiles of 16 tokens.
#include <algorithm>
#include <cstring>
#include <vector>

#include "matmul.h"
#include "parallel.h"
#include "scratch.h"

namespace elsa {
namespace {

constexpr std::size_t kLeastTaskRows = 32, kMostTaskRows = 128;
constexpr std::size_t kCutBytes = 16 * 1024;  // of activations, beside sums and lists
constexpr std::size_t kLeastPiece = 16;
constexpr std::size_t kTransposeColumns = 512;  // of one task
constexpr std::size_t kPanelBytes = std::size_t{32} << 20;  // of tokens laid out columns first

// A row of sums -> results, still tokens side by side.
void finish_row(const Packed& w, const float* biases, std::size_t row, float* sums,
                std::size_t tokens) {
    const float scale = w.scales != nullptr ? w.scales[row] : 1.0f;
    const float bias = biases != nullptr ? biases[row] : 0.0f;
    for (std::size_t t = 0; t < tokens; ++t) sums[t] = sums[t] * scale + bias;
}

// As many columns as leave room in the first cache, but with fewer than some 16 non-zeros a row and
// cut loading and storing the sums costs more.
std::size_t cut_chunks(const Packed& w, std::size_t width) {
    const std::size_t bytes = width == kTile ? kCutBytes : 2 * kCutBytes, most = 1024 / width;
    std::size_t chunks = std::max<std::size_t>(1, bytes / (width * sizeof(float) * kChunk));
    while (chunks < most && chunks * kChunk * w.nonzeros < kLeastPiece * w.rows * w.columns) {
        chunks *= 2;
    }
    return chunks;
}

struct Panel {
    const Part& part;  // its y is that of this panel's tokens
    const Packed& weight;
    const Kernels& kernels;
    const Request& request;  // of this panel's tokens
    const Parallel& parallel;
    std::size_t width;  // of a tile
    std::size_t tiles;
    float* xt;  // (tiles, columns, width)
    float* yt;  // (tiles, rows, width), sliced only: its rows come in another order

    std::size_t tokens_of(std::size_t tile) const {
        return std::min(width, request.tokens - tile * width);
    }
    void lay_out_tokens() const;
    WorkList listed(std::size_t first, std::size_t last) const;
    void groups(std::size_t first, std::size_t last) const;
    void slices(std::size_t first, std::size_t last) const;
    void lay_out_results() const;
    void all_rows() const;
};

void Panel::lay_out_tokens() const {
    const std::size_t columns = weight.columns;
    const std::size_t parts = (columns + kTransposeColumns - 1) / kTransposeColumns;
    for_each(parallel, tiles * parts, [&](std::size_t i) {
        const std::size_t tile = i / parts, start = i % parts * kTransposeColumns;
        const std::size_t count = std::min(kTransposeColumns, columns - start);
        const std::size_t tokens = tokens_of(tile), wide = std::min(width, round_up(tokens, 16));
        float* to = xt + (tile * columns + start) * width;
        kernels.transpose(request.x + tile * width * columns + start, columns, to, width, tokens,
                          count);
        for (std::size_t k = 0; k < count && tokens < wide; ++k) {
            std::memset(to + k * width + tokens, 0, (wide - tokens) * sizeof(float));
        }
    });
}

WorkList Panel::listed(std::size_t first, std::size_t last) const {
    const Packed& w = weight;
    WorkList list;
    list.width = width;
    list.rows = (last - first) * kGroupRows;
    list.cut_chunks = cut_chunks(w, width);
    list.cuts = (w.chunks + list.cut_chunks - 1) / list.cut_chunks;
    const std::size_t masks = (last - first) * w.chunks * kMaskBytes;
    const std::size_t most =
        (w.offsets[last] - w.offsets[first] - masks) / value_bytes(w.type) + kListGap;
    list.offset = scratch<std::uint16_t>(Scratch::offset, most);
    list.value = scratch<float>(Scratch::value, most);
    list.pieces = scratch<Piece>(Scratch::pieces, list.rows * list.cuts);
    kernels.list_bitmap[static_cast<int>(w.type)](w, first, last, list);
    return list;
}

void Panel::groups(std::size_t first, std::size_t last) const {
    const Packed& w = weight;
    const WorkList list = listed(first, last);
    const std::size_t start = first * kGroupRows;
    const std::size_t count = std::min(list.rows, w.rows - start);
    float* sums = scratch<float>(Scratch::sums, list.rows * width);
    for (std::size_t tile = 0; tile < tiles; ++tile) {
        const std::size_t tokens = tokens_of(tile);
        for (std::size_t cut = 0; cut < list.cuts; ++cut) {
            const std::size_t column = cut * list.cut_chunks * kChunk;
            kernels.tile(list, list.pieces + cut * list.rows, cut == 0,
                         xt + (tile * w.columns + column) * width, sums, (tokens + 7) / 8);
        }
        if (w.scales != nullptr || part.bias != nullptr) {
            for (std::size_t r = 0; r < count; ++r) {
                finish_row(w, part.bias, start + r, sums + r * width, tokens);
            }
        }
        kernels.transpose(sums, width, part.y + tile * width * w.rows + start, w.rows, count,
                          tokens);
    }
}

void Panel::slices(std::size_t first, std::size_t last) const {
    const Packed& w = weight;
    for (std::size_t s = first; s < last; ++s) {
        const std::size_t steps = w.steps[s], start = s * kSliceRows;
        const std::size_t count = std::min(kSliceRows, w.rows - start);
        auto* offset = scratch<std::uint32_t>(Scratch::offset, steps * kSliceRows);
        float* value = scratch<float>(Scratch::value, steps * kSliceRows);
        kernels.list_slice[static_cast<int>(w.type)](w, s, width, offset, value);
        for (std::size_t tile = 0; tile < tiles; ++tile) {
            float* sums = yt + tile * w.rows * width;
            kernels.slice(offset, value, steps, w.order + start, count,
                          xt + tile * w.columns * width, sums, width);
            if (w.scales == nullptr && part.bias == nullptr) continue;
            for (std::size_t r = start; r < start + count; ++r) {
                finish_row(w, part.bias, w.order[r], sums + w.order[r] * width, tokens_of(tile));
            }
        }
    }
}

void Panel::lay_out_results() const {
    const std::size_t parts = (weight.rows + kTile - 1) / kTile;
    for_each(parallel, tiles * parts, [&](std::size_t i) {
        const std::size_t tile = i / parts, row = i % parts * kTile;
        kernels.transpose(yt + (tile * weight.rows + row) * width, width,
                          part.y + tile * width * weight.rows + row, weight.rows,
                          std::min(kTile, weight.rows - row), tokens_of(tile));
    });
}

void Panel::all_rows() const {
    const bool bitmap = weight.format == Format::bitmap;
    const std::size_t most =
        std::clamp(round_up(weight.rows / 8, kSliceRows), kLeastTaskRows, kMostTaskRows);
    const std::size_t units = most / (bitmap ? kGroupRows : kSliceRows);
    for_each(parallel, (weight.units + units - 1) / units, [&](std::size_t i) {
        const std::size_t last = std::min(weight.units, (i + 1) * units);
        bitmap ? groups(i * units, last) : slices(i * units, last);
    });
    if (!bitmap) lay_out_results();
}

std::size_t width_for(std::size_t tokens, std::size_t most) {
    std::size_t width = 8;
    while (width < most && width < tokens) width *= 2;
    return width;
}

}  // namespace

void prefill(const std::vector<Part>& parts, const Kernels& kernels, const Request& request,
             const Parallel& parallel) {
    if (parts.empty()) return;
    const std::size_t columns = parts.front().weight->columns;
    std::size_t widest = columns;
    for (const Part& part : parts) {
        if (part.weight->format == Format::sliced) widest = std::max(widest, part.weight->rows);
    }
    const std::size_t most = std::max<std::size_t>(1, kPanelBytes / (widest * kTile * 4)) * kTile;
    for (std::size_t done = 0; done < request.tokens; done += most) {
        Request some = request;
        some.tokens = std::min(most, request.tokens - done);
        some.x += done * columns;
        std::size_t laid_out = 0;  // tiles of this width
        for (const Part& part : parts) {
            const Packed& weight = *part.weight;
            const bool bitmap = weight.format == Format::bitmap;
            const std::size_t width = width_for(some.tokens, bitmap ? kTile : kSliceTile);
            const std::size_t tiles = (some.tokens + width - 1) / width;
            Part of_them = part;
            of_them.y += done * weight.rows;
            float* xt = scratch<float>(Scratch::columns_first, tiles * columns * width);
            float* yt = bitmap ? nullptr
                               : scratch<float>(Scratch::rows_first, tiles * weight.rows * width);
            const Panel panel{of_them, weight, kernels, some, parallel, width, tiles, xt, yt};
            if (laid_out != width) panel.lay_out_tokens();
            laid_out = width;
            panel.all_rows();
        }
    }
}

}  // namespace elsa
