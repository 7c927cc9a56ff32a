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
constexpr std::size_t kLineGroups = 4;  // 16 results fill a line of the cache
constexpr std::size_t kBlockTokens = 128;  // of a weight with all its values: in the second cache

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

bool has_lanes(const Packed& weight, Kind kind) {
    return weight.lanes != nullptr && kind != Kind::s8;
}

// What the first path needs of the activations, for all of its products at once.
struct Needs {
    bool values = false, split = false, planes = false, words = false, bytes = false;
    std::int32_t levels = kMostLevels;

    void add(const Packed& weight, const Kernels& kernels, const Request& request) {
        const Kind kind = kind_of(weight, request);
        const bool sliced = weight.format == Format::sliced;
        if (kind == Kind::s8_by_s16) {
            levels = std::min(levels, weight.levels);
            (!sliced && kernels.wants_shifted ? bytes : words) = true;
        } else if (has_lanes(weight, kind)) {
            planes = true;
        } else {
            values = true;
            split = split || (kind == Kind::bf16 && !sliced && kernels.wants_split);
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
    if (needs.planes) {
        auto* planes = scratch<std::uint8_t>(Scratch::planes, 4 * count);
        for (std::size_t m = 0; m < a.tokens; ++m) {
            kernels.split_bytes(request.x + m * columns, columns, planes + m * stride * 4, stride);
        }
        a.planes = planes;
    }
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

// How a weight is multiplied on the first path.
struct Route {
    Kernels::Decode decode = nullptr;
    std::size_t units = 0, tasks = 1;
};

Route route_of(const Packed& weight, const Kernels& kernels, Kind kind) {
    const int at = static_cast<int>(kind);
    Route route;
    route.units = weight.units;
    std::size_t bytes = weight.size;
    switch (weight.format) {
        case Format::sliced: route.decode = kernels.sliced[at]; break;
        case Format::rows: route.decode = kernels.rows[at]; break;
        case Format::bitmap:
            route.decode = kernels.bitmap[at];
            if (has_lanes(weight, kind)) {
                route.decode = kernels.lanes[at];
                route.units = weight.lanes->offsets.size() - 1;
                bytes = weight.lanes->offsets.back();
            }
    }
    route.tasks = std::max<std::size_t>(1, std::min(route.units, bytes / kTaskBytes));
    return route;
}

// The first path, for the products it is best for.
void decode(const std::vector<Part>& parts, const Kernels& kernels, const Request& request,
            const Parallel& parallel) {
    Needs needs;
    std::vector<Route> routes;
    std::size_t tasks = 0;
    for (const Part& part : parts) {
        needs.add(*part.weight, kernels, request);
        routes.push_back(route_of(*part.weight, kernels, kind_of(*part.weight, request)));
        tasks += routes.back().tasks;
    }
    const Packed& first = *parts.front().weight;
    const Activations a =
        prepared(needs, kernels, request, first.columns, first.chunks * kChunk);
    for_each(parallel, tasks, [&](std::size_t i) {
        std::size_t p = 0;
        for (; i >= routes[p].tasks; ++p) i -= routes[p].tasks;
        const Packed& weight = *parts[p].weight;
        const Route& route = routes[p];
        route.decode(weight, a, Output{parts[p].y, weight.rows, parts[p].bias},
                     route.units * i / route.tasks, route.units * (i + 1) / route.tasks);
    });
}

// Results of groups [first, last), at most kLineGroups, of which `sums` holds (tokens, 4) each: all of a
// token's in one go, since tokens lie far apart.
void write_results(const Part& part, std::size_t first, std::size_t last, std::size_t tokens,
                   const float* sums) {
    const Packed& weight = *part.weight;
    const std::size_t row = first * kGroupRows;
    const std::size_t count = std::min(last * kGroupRows, weight.rows) - row;
    float scale[kLineGroups * kGroupRows] = {}, bias[kLineGroups * kGroupRows] = {};
    for (std::size_t r = 0; r < count; ++r) {
        scale[r] = weight.scales != nullptr ? weight.scales[row + r] : 1.0f;
        bias[r] = part.bias != nullptr ? part.bias[row + r] : 0.0f;
    }
    for (std::size_t m = 0; m < tokens; ++m) {
        float* to = part.y + m * weight.rows + row;
        for (std::size_t r = 0; r < count; r += kGroupRows) {
            const float* from = sums + (r * tokens + m * kGroupRows);
            float four[kGroupRows];
            for (std::size_t i = 0; i < kGroupRows; ++i) {
                four[i] = from[i] * scale[r + i] + bias[r + i];
            }
            std::memcpy(to + r, four, std::min(kGroupRows, count - r) * sizeof(float));
        }
    }
}

void widened(const Part& part, const Kernels& kernels, const Request& request,
             const Parallel& parallel) {
    const Packed& weight = *part.weight;
    const std::size_t columns = weight.chunks * kChunk, tokens = request.tokens;
    const float* x = padded(request, weight.columns, columns);
    const bool as_stored = weight.format == Format::rows && weight.type == Type::f32;
    const std::size_t lines = (weight.units + kLineGroups - 1) / kLineGroups;
    const std::size_t tasks =
        std::max<std::size_t>(1, std::min(lines, weight.size / (kTaskBytes / 4)));
    for_each(parallel, tasks, [&](std::size_t i) {
        float* widened_rows = scratch<float>(Scratch::wide_rows, kGroupRows * columns);
        float* sums = scratch<float>(Scratch::wide_sums, kLineGroups * kGroupRows * tokens);
        for (std::size_t line = lines * i / tasks; line < lines * (i + 1) / tasks; ++line) {
            const std::size_t first = line * kLineGroups;
            const std::size_t last = std::min(weight.units, first + kLineGroups);
            for (std::size_t g = first; g < last; ++g) {
                const float* rows = widened_rows;
                if (as_stored) {
                    rows = reinterpret_cast<const float*>(weight.stream + weight.offsets[g]);
                } else {
                    kernels.widen[static_cast<int>(weight.type)](weight, g, widened_rows);
                }
                kernels.four_rows(rows, x, columns, tokens,
                                  sums + (g - first) * kGroupRows * tokens, as_stored);
            }
            write_results(part, first, last, tokens, sums);
        }
    });
}

}  // namespace

// Times in nanoseconds for 16 weights, fitted to 1536 x 576 and 2048 x 2048 at 50 to 80 % zeros,
// from memory, one thread of a Zen 4 (December 2026). Only which is the least matters. Slices: 3 tokens
// take the last path 2.0 ms, the first 2.8; 2 tokens the same on both. Lanes: 6144 x 576 and 2304 x 1536, int8, 80 to 95 %; of floats by the time of one
// token from the second cache.
Path path_of(const Packed& weight, const Kernels& kernels, const Request& request) {
    const bool rounded = kind_of(weight, request) == Kind::s8_by_s16;
    if (weight.format == Format::sliced) {
        return request.tokens <= (rounded ? 4 : 2) ? Path::few : Path::many;
    }
    if (request.tokens <= 4) return Path::few;
    if (weight.format == Format::rows) {
        return (rounded && kernels.wants_shifted) || request.tokens <= 8 ? Path::few : Path::some;
    }
    const auto tokens = static_cast<double>(request.tokens);
    const double vectors = request.tokens <= 8 ? 0.5 : std::ceil(tokens / 16.0);
    const double density = static_cast<double>(weight.nonzeros) /
                           (static_cast<double>(weight.rows) * static_cast<double>(weight.columns));
    const double bytes = density * static_cast<double>(value_bytes(weight.type));
    const double some = 0.7 + 0.33 * bytes + 0.34 * tokens;
    const double many = 1.55 + 4.7 * density + (0.2 + 5.4 * density) * vectors;
    const bool lanes = has_lanes(weight, kind_of(weight, request));
    double few = 0.2 + 0.245 * tokens;
    if (lanes) few = rounded ? 0.1 + (0.04 + 0.7 * density) * tokens : 0.1 + (0.07 + 0.9 * density) * tokens;
    const bool any_number = lanes || (rounded && kernels.wants_shifted);
    if (any_number && few < std::min(some, many)) return Path::few;
    return some < many ? Path::some : Path::many;
}

namespace {

// Weights with all their values, some tokens at a time.
void multiply_whole(const std::vector<Part>& parts, const Kernels& kernels, const Request& request,
                    const Parallel& parallel) {
    if (parts.empty()) return;
    const std::size_t blocks = (request.tokens + kBlockTokens - 1) / kBlockTokens;
    for (std::size_t b = 0; b < blocks; ++b) {
        const std::size_t start = request.tokens * b / blocks;
        Request some = request;
        some.tokens = request.tokens * (b + 1) / blocks - start;
        some.x += start * parts.front().weight->columns;
        std::vector<Part> few;
        for (Part part : parts) {
            part.y += start * part.weight->rows;
            if (path_of(*part.weight, kernels, some) == Path::few) {
                few.push_back(part);
            } else {
                widened(part, kernels, some, parallel);
            }
        }
        if (!few.empty()) decode(few, kernels, some, parallel);
    }
}

}  // namespace

void multiply(const Part* parts, std::size_t count, const Kernels& kernels, const Request& request,
              const Parallel& parallel) {
    if (request.tokens == 0) return;
    std::vector<Part> few, many, whole;
    for (std::size_t i = 0; i < count; ++i) {
        if (parts[i].weight->format == Format::rows) {
            whole.push_back(parts[i]);
            continue;
        }
        switch (path_of(*parts[i].weight, kernels, request)) {
            case Path::few: few.push_back(parts[i]); break;
            case Path::some: widened(parts[i], kernels, request, parallel); break;
            case Path::many: many.push_back(parts[i]); break;
        }
    }
    if (!few.empty()) decode(few, kernels, request, parallel);
    prefill(many, kernels, request, parallel);
    multiply_whole(whole, kernels, request, parallel);
}

}  // namespace elsa
