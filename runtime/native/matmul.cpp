#include "matmul.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "parallel.h"
#include "scratch.h"

namespace elsa {
namespace {

constexpr std::size_t kTaskBytes = 32 * 1024;  // of packed weight; a task costs about 1 us to start

Kind kind_of(const Packed& weight, const Request& request) {
    if (weight.type == Type::s8 && request.rounded) return Kind::s8_by_s16;
    return static_cast<Kind>(weight.type);
}

// Rows of `columns` floats, padded with zeros to `stride`.
const float* padded(const Request& request, std::size_t columns, std::size_t stride) {
    if (columns == stride) return request.x;
    float* to = scratch<float>(Scratch::padded, request.tokens * stride);
    for (std::size_t m = 0; m < request.tokens; ++m) {
        std::memcpy(to + m * stride, request.x + m * columns, columns * sizeof(float));
        std::memset(to + m * stride + columns, 0, (stride - columns) * sizeof(float));
    }
    return to;
}

const float* split(const float* x, std::size_t count) {
    float* to = scratch<float>(Scratch::split, count);
    for (std::size_t i = 0; i < count; i += 32) {
        for (std::size_t j = 0; j < 16; ++j) {
            to[i + j] = x[i + 2 * j];
            to[i + 16 + j] = x[i + 2 * j + 1];
        }
    }
    return to;
}

// What the first path needs of the activations, for all of its products at once.
struct Needs {
    bool values = false, split = false, words = false, bytes = false;
    std::int32_t levels = kMostLevels;

    void add(const Packed& weight, const Kernels& kernels, const Request& request) {
        const Kind kind = kind_of(weight, request);
        const bool bitmap = weight.format == Format::bitmap;
        if (kind == Kind::s8_by_s16) {
            levels = std::min(levels, weight.levels);
            (bitmap && kernels.wants_shifted ? bytes : words) = true;
        } else {
            values = true;
            split = split || (kind == Kind::bf16 && bitmap && kernels.wants_split);
        }
    }
};

Activations prepared(const Needs& needs, const Kernels& kernels, const Request& request,
                     std::size_t columns, std::size_t stride) {
    Activations a;
    a.tokens = request.tokens;
    a.stride = stride;
    const std::size_t count = a.tokens * stride;
    if (needs.values) a.values = padded(request, columns, stride);
    if (needs.split) a.split = split(a.values, count);
    if (!needs.words && !needs.bytes) return a;
    float* scales = scratch<float>(Scratch::scales, a.tokens);
    auto* words = needs.words ? scratch<std::int32_t>(Scratch::quantised, count) : nullptr;
    auto* bytes = needs.bytes ? scratch<std::uint8_t>(Scratch::shifted, 2 * count) : nullptr;
    for (std::size_t m = 0; m < a.tokens; ++m) {
        scales[m] = kernels.quantise(request.x + m * columns, columns, stride, needs.levels,
                                     words != nullptr ? words + m * stride : nullptr,
                                     bytes != nullptr ? bytes + m * stride * 2 : nullptr);
    }
    a.scales = scales;
    a.quantised = words;
    a.shifted = bytes;
    return a;
}

std::size_t tasks_of(const Packed& weight) {
    return std::max<std::size_t>(1, std::min(weight.units, weight.size / kTaskBytes));
}

// The first path, for the products it is best for.
void decode(const std::vector<Part>& parts, const Kernels& kernels, const Request& request,
            const Parallel& parallel) {
    Needs needs;
    std::size_t tasks = 0;
    for (const Part& part : parts) {
        needs.add(*part.weight, kernels, request);
        tasks += tasks_of(*part.weight);
    }
    const Packed& first = *parts.front().weight;
    const Activations a =
        prepared(needs, kernels, request, first.columns, first.chunks * kChunk);
    for_each(parallel, tasks, [&](std::size_t i) {
        const Part* part = parts.data();
        for (; i >= tasks_of(*part->weight); ++part) i -= tasks_of(*part->weight);
        const Packed& weight = *part->weight;
        const auto& kernels_of =
            weight.format == Format::bitmap ? kernels.bitmap : kernels.sliced;
        const std::size_t count = tasks_of(weight);
        kernels_of[static_cast<int>(kind_of(weight, request))](
            weight, a, Output{part->y, weight.rows, part->bias}, weight.units * i / count,
            weight.units * (i + 1) / count);
    });
}

void widened(const Part& part, const Kernels& kernels, const Request& request,
             const Parallel& parallel) {
    const Packed& weight = *part.weight;
    const std::size_t columns = weight.chunks * kChunk;
    const float* x = padded(request, weight.columns, columns);
    const std::size_t tasks =
        std::max<std::size_t>(1, std::min(weight.units, weight.size / (kTaskBytes / 4)));
    for_each(parallel, tasks, [&](std::size_t i) {
        float* rows = scratch<float>(Scratch::wide_rows, kGroupRows * columns);
        float* sums = scratch<float>(Scratch::wide_sums, kGroupRows * request.tokens);
        const std::size_t last = weight.units * (i + 1) / tasks;
        for (std::size_t g = weight.units * i / tasks; g < last; ++g) {
            kernels.widen[static_cast<int>(weight.type)](weight, g, rows);
            kernels.four_rows(rows, x, columns, request.tokens, sums);
            const std::size_t row = g * kGroupRows;
            const std::size_t count = std::min(kGroupRows, weight.rows - row);
            float scale[kGroupRows], bias[kGroupRows];
            for (std::size_t r = 0; r < count; ++r) {
                scale[r] = weight.scales != nullptr ? weight.scales[row + r] : 1.0f;
                bias[r] = part.bias != nullptr ? part.bias[row + r] : 0.0f;
            }
            for (std::size_t m = 0; m < request.tokens; ++m) {
                float* to = part.y + m * weight.rows + row;
                for (std::size_t r = 0; r < count; ++r) {
                    to[r] = sums[m * kGroupRows + r] * scale[r] + bias[r];
                }
            }
        }
    });
}

}  // namespace

// Times in nanoseconds for 16 weights, fitted to the weights of SmolLM2-135M at 50 to 90 % zeros,
// from memory, one thread of a Zen 4 (November 2026). Only which is the least matters. Slices: 3 tokens
// take the last path 2.0 ms, the first 2.8; 2 tokens the same on both.
Path path_of(const Packed& weight, const Kernels& kernels, const Request& request) {
    const bool rounded = kind_of(weight, request) == Kind::s8_by_s16;
    if (weight.format == Format::sliced) {
        return request.tokens <= (rounded ? 4 : 2) ? Path::few : Path::many;
    }
    if (request.tokens <= 4) return Path::few;
    const auto tokens = static_cast<double>(request.tokens);
    const double vectors = request.tokens <= 8 ? 0.5 : std::ceil(tokens / 16.0);
    const double density = static_cast<double>(weight.nonzeros) /
                           (static_cast<double>(weight.rows) * static_cast<double>(weight.columns));
    const double bytes = density * static_cast<double>(value_bytes(weight.type));
    const double some = 1.0 + 1.3 * bytes + 0.34 * tokens;
    const double many = 1.0 + 1.2 * bytes + 7.8 * density + (0.3 + 6.8 * density) * vectors;
    if (rounded && kernels.wants_shifted && 0.2 + 0.33 * tokens < std::min(some, many)) {
        return Path::few;
    }
    return some < many ? Path::some : Path::many;
}

void multiply(const Part* parts, std::size_t count, const Kernels& kernels, const Request& request,
              const Parallel& parallel) {
    if (request.tokens == 0) return;
    std::vector<Part> few, many;
    for (std::size_t i = 0; i < count; ++i) {
        switch (path_of(*parts[i].weight, kernels, request)) {
            case Path::few: few.push_back(parts[i]); break;
            case Path::some: widened(parts[i], kernels, request, parallel); break;
            case Path::many: many.push_back(parts[i]); break;
        }
    }
    if (!few.empty()) decode(few, kernels, request, parallel);
    prefill(many, kernels, request, parallel);
}

}  // namespace elsa
