// Weights as files hold them packed: sound ones come out right in every format, damaged ones are
// refused or survived. Under the sanitizers a read too far ends the program.
//
//   fuzz_bitmask [inputs] [seed]
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "../bitmask.h"

namespace {

using namespace elsa;

std::mt19937_64 generator;

std::size_t below(std::size_t limit) { return static_cast<std::size_t>(generator() % limit); }

struct Weight {
    std::size_t rows, columns;
    std::vector<float> dense;
    std::vector<std::uint8_t> mask, values;
};

Weight sound(std::size_t rows, std::size_t columns, std::size_t tenths) {
    Weight made{rows, columns, {}, std::vector<std::uint8_t>((rows * columns + 7) / 8, 0), {}};
    std::vector<float> list{0.0f};
    for (std::size_t i = 0; i < rows * columns; ++i) {
        const bool kept = below(10) < tenths;
        made.dense.push_back(kept ? static_cast<float>(below(200)) + 0.5f : 0.0f);
        if (!kept) continue;
        made.mask[i / 8] |= static_cast<std::uint8_t>(1u << i % 8);
        list.push_back(made.dense.back());
    }
    made.values.resize(list.size() * 4);
    std::memcpy(made.values.data(), list.data(), made.values.size());
    return made;
}

Bitmask view_of(const Weight& weight) {
    Bitmask view;
    view.mask = weight.mask.data();
    view.mask_bytes = weight.mask.size();
    view.values = weight.values.data();
    view.count = weight.values.size() / 4;
    view.value_bytes = 4;
    view.rows = weight.rows;
    view.columns = weight.columns;
    return view;
}

// Rows one by one, the two formats of the kernels, and the types of other widths.
bool right(const Weight& weight) {
    const Bitmask view = view_of(weight);
    if (!validate(view).empty() || !fills_with_zero(view)) return false;
    const auto starts = row_starts(view);
    std::vector<float> dense(weight.dense.size());
    for (std::size_t row = 0; row < weight.rows; ++row) {
        read_row(view, row, starts[row],
                 reinterpret_cast<std::uint8_t*>(&dense[row * weight.columns]));
    }
    if (dense != weight.dense) return false;
    for (const Format format : {Format::bitmap, Format::sliced}) {
        const Owned packed = pack(view, format, Type::f32, nullptr);
        std::fill(dense.begin(), dense.end(), -1.0f);
        unpack(packed.view, dense.data());
        if (dense != weight.dense) return false;
    }
    return true;
}

void damage(Weight& weight) {
    for (std::size_t times = 1 + below(3); times > 0; --times) {
        std::vector<std::uint8_t>& part = below(2) == 0 ? weight.mask : weight.values;
        switch (below(6)) {
            case 0:
                if (!part.empty()) part[below(part.size())] ^= static_cast<std::uint8_t>(1u << below(8));
                break;
            case 1: part.resize(part.size() + below(5)); break;
            case 2: part.resize(part.size() - std::min<std::size_t>(part.size(), below(5))); break;
            case 3: weight.rows += below(3) - std::min<std::size_t>(weight.rows, 1); break;
            case 4: weight.columns = below(3) == 0 ? below(100) : weight.columns; break;
            default:
                if (weight.mask.size() > 1) std::swap(weight.mask[0], weight.mask[1]);
                break;
        }
    }
    if (below(1000) == 0) weight.rows = ~std::size_t{0} >> below(40);
}

void use(const Bitmask& view) {
    const auto starts = row_starts(view);
    std::vector<std::uint8_t> row(view.columns * view.value_bytes);
    for (std::size_t n = 0; n < view.rows; ++n) read_row(view, n, starts[n], row.data());
    if (!fills_with_zero(view) || view.rows == 0 || view.columns == 0) return;
    pack(view, below(2) == 0 ? Format::bitmap : Format::sliced, Type::f32, nullptr);
}

}  // namespace

int main(int count, char** arguments) {
    const unsigned long inputs = count > 1 ? std::strtoul(arguments[1], nullptr, 10) : 200000;
    generator.seed(count > 2 ? std::strtoull(arguments[2], nullptr, 10) : 1);
    std::vector<Weight> made;
    constexpr std::size_t shapes[][2] = {{1, 1}, {5, 70}, {18, 300}, {4, 64}, {33, 20}, {7, 129}};
    for (const auto& shape : shapes) {
        for (const std::size_t tenths : {0, 3, 10}) {
            made.push_back(sound(shape[0], shape[1], tenths));
            if (!right(made.back())) {
                std::printf("%zu x %zu comes out wrong\n", shape[0], shape[1]);
                return EXIT_FAILURE;
            }
        }
    }
    unsigned long accepted = 0;
    for (unsigned long i = 0; i < inputs; ++i) {
        Weight weight = made[below(made.size())];
        damage(weight);
        weight.mask.shrink_to_fit();
        weight.values.shrink_to_fit();
        if (!validate(view_of(weight)).empty()) continue;
        ++accepted;
        use(view_of(weight));
    }
    std::printf("%lu inputs, %lu accepted\n", inputs, accepted);
    return accepted > inputs / 100 && accepted < inputs ? EXIT_SUCCESS : EXIT_FAILURE;
}
