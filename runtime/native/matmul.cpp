#include "matmul.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <limits>

#include "parallel.h"
#include "scratch.h"

namespace elsa {
namespace {

constexpr std::size_t kTaskBytes = 32 * 1024;  // of packed weight; a task costs about 1 us to start

Kind kind_of(const Packed& weight, const Request& request) {
    if (weight.type == Type::s8 && request.s8_activations) return Kind::s8_by_s8;
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

// One scale a token, its largest magnitude over 127. A token that is not finite gets scale NaN.
void quantise(const float* x, std::size_t columns, std::size_t stride, Activations& a,
              bool shifted) {
    float* scales = scratch<float>(Scratch::scales, a.tokens);
    auto* bytes = scratch<std::uint8_t>(Scratch::shifted, shifted ? a.tokens * stride : 0);
    auto* words = scratch<std::int32_t>(Scratch::quantised, shifted ? 0 : a.tokens * stride);
    for (std::size_t m = 0; m < a.tokens; ++m) {
        const float* row = x + m * columns;
        float largest = 0.0f;
        int strange = 0;  // a loop without branches is one of vectors
        for (std::size_t k = 0; k < columns; ++k) {
            const float size = std::fabs(row[k]);
            strange |= size <= FLT_MAX ? 0 : 1;
            largest = largest < size ? size : largest;
        }
        const bool finite = strange == 0;
        const float inverse = finite && largest > 1e-37f ? 127.0f / largest : 0.0f;
        scales[m] = !finite         ? std::numeric_limits<float>::quiet_NaN()
                    : inverse > 0.0f ? largest / 127.0f
                                     : 0.0f;
        for (std::size_t k = 0; k < columns; ++k) {
            // Adding and taking off 1.5 * 2^23 rounds to nearest, ties to even, without a call.
            const float rounded = ((finite ? row[k] : 0.0f) * inverse + 12582912.0f) - 12582912.0f;
            const auto value = static_cast<std::int32_t>(rounded);
            if (shifted) {
                bytes[m * stride + k] = static_cast<std::uint8_t>(value + 128);
            } else {
                words[m * stride + k] = value & 0xffff;
            }
        }
        for (std::size_t k = columns; k < stride; ++k) {
            if (shifted) {
                bytes[m * stride + k] = 128;
            } else {
                words[m * stride + k] = 0;
            }
        }
    }
    a.scales = scales;
    a.shifted = bytes;
    a.quantised = words;
}

void decode(const Packed& weight, const Kernels& kernels, const Request& request,
            const Parallel& parallel) {
    const Kind kind = kind_of(weight, request);
    const bool bitmap = weight.format == Format::bitmap;
    Activations a;
    a.tokens = request.tokens;
    a.stride = weight.chunks * kChunk;
    if (kind == Kind::s8_by_s8) {
        quantise(request.x, weight.columns, a.stride, a, bitmap && kernels.wants_shifted);
    } else {
        a.values = padded(request, weight.columns, a.stride);
        if (kind == Kind::bf16 && bitmap && kernels.wants_split) {
            a.split = split(a.values, a.tokens * a.stride);
        }
    }
    const Output out{request.y, weight.rows, request.bias};
    const auto kernel = (bitmap ? kernels.bitmap : kernels.sliced)[static_cast<int>(kind)];
    const std::size_t tasks =
        std::max<std::size_t>(1, std::min(weight.units, weight.size / kTaskBytes));
    for_each(parallel, tasks, [&](std::size_t i) {
        kernel(weight, a, out, weight.units * i / tasks, weight.units * (i + 1) / tasks);
    });
}

void widened(const Packed& weight, const Kernels& kernels, const Request& request,
             const Parallel& parallel) {
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
            for (std::size_t r = 0; r < kGroupRows && g * kGroupRows + r < weight.rows; ++r) {
                const std::size_t row = g * kGroupRows + r;
                const float scale = weight.scales != nullptr ? weight.scales[row] : 1.0f;
                const float bias = request.bias != nullptr ? request.bias[row] : 0.0f;
                for (std::size_t m = 0; m < request.tokens; ++m) {
                    request.y[m * weight.rows + row] = sums[m * kGroupRows + r] * scale + bias;
                }
            }
        }
    });
}

}  // namespace

// Times in nanoseconds for 16 weights, fitted to 1536 x 576 and 2048 x 2048 at 50 to 90 % zeros,
// one thread of a Zen 4 (November 2026). Only which is the least matters.
Path path_of(const Packed& weight, const Kernels& kernels, const Request& request) {
    const bool rounded = kind_of(weight, request) == Kind::s8_by_s8;
    if (weight.format == Format::sliced) return request.tokens < 6 ? Path::few : Path::many;
    if (request.tokens <= 4) return Path::few;
    const auto tokens = static_cast<double>(request.tokens);
    const double vectors = std::ceil(tokens / 16.0);
    const double density = static_cast<double>(weight.nonzeros) /
                           (static_cast<double>(weight.rows) * static_cast<double>(weight.columns));
    const double some = 2.5 + 0.38 * tokens;
    const double many = 2.0 + 0.35 * vectors + density * (19.0 + 4.9 * vectors);
    if (rounded && kernels.wants_shifted && 0.2 * tokens < std::min(some, many)) return Path::few;
    return some < many ? Path::some : Path::many;
}

void multiply(const Packed& weight, const Kernels& kernels, const Request& request,
              const Parallel& parallel) {
    if (request.tokens == 0) return;
    switch (path_of(weight, kernels, request)) {
        case Path::few: decode(weight, kernels, request, parallel); break;
        case Path::some: widened(weight, kernels, request, parallel); break;
        case Path::many: prefill(weight, kernels, request, parallel); break;
    }
}

}  // namespace elsa
