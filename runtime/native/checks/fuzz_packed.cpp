// Damaged packed weights, by the million: `validate` must refuse them, or the kernels must survive
// them. Under the address and undefined-behaviour sanitizers a read too far ends the program.
//
//   fuzz_packed [inputs] [seed]
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "../lanes.h"
#include "../matmul.h"

namespace {

using namespace elsa;

constexpr std::size_t kMostElements = 1 << 16;  // beyond, an accepted weight is not multiplied with

std::mt19937_64 generator;

std::size_t below(std::size_t limit) { return static_cast<std::size_t>(generator() % limit); }

std::vector<std::vector<std::uint8_t>> sound_weights() {
    std::vector<std::vector<std::uint8_t>> made;
    constexpr std::size_t shapes[][2] = {{1, 1}, {5, 70}, {18, 300}, {4, 64}, {33, 20}, {98, 130}};
    for (const auto& shape : shapes) {
        for (const Format format : {Format::bitmap, Format::sliced}) {
            for (const Type type : {Type::f32, Type::bf16, Type::f16, Type::s8}) {
                std::vector<float> weight(shape[0] * shape[1], 0.0f);
                const std::size_t kept = shape[0] > 90 ? 1 : 3;  // few enough for lanes
                for (float& value : weight) {
                    value = below(10) < kept ? static_cast<float>(below(200)) - 99.5f : 0.0f;
                }
                const Owned owned =
                    pack({weight.data(), shape[0], shape[1], shape[1], 1}, format, type);
                made.emplace_back(owned.view.bytes, owned.view.bytes + owned.view.size);
            }
        }
    }
    return made;
}

// Numbers that tend to slip past a comparison.
std::uint64_t odd_number() {
    constexpr std::uint64_t odd[] = {0, 1, 63, 64, 65, 255, 256, 0x7fffffff, 0x80000000, 0xffffffff,
                                     std::uint64_t{1} << 32, ~std::uint64_t{0},
                                     ~std::uint64_t{63}, std::uint64_t{1} << 63};
    return odd[below(sizeof odd / sizeof odd[0])] + below(3) - 1;
}

void damage(std::vector<std::uint8_t>& bytes) {
    for (std::size_t times = 1 + below(4); times > 0 && !bytes.empty(); --times) {
        // The first 256 bytes hold the header and the offsets: half of the hits go there.
        const std::size_t reach = below(2) == 0 ? std::min<std::size_t>(bytes.size(), 256)
                                                : bytes.size();
        const std::size_t at = below(reach);
        const std::uint64_t number = odd_number();
        switch (below(8)) {
            case 0: bytes[at] = static_cast<std::uint8_t>(generator()); break;
            case 1: bytes[at] ^= static_cast<std::uint8_t>(1u << below(8)); break;
            case 2: bytes[at] = static_cast<std::uint8_t>(bytes[at] + 1); break;
            case 3: {
                const std::size_t width = std::size_t{1} << below(4), place = at / width * width;
                if (place + width <= bytes.size()) std::memcpy(&bytes[place], &number, width);
                break;
            }
            case 4: {
                std::uint64_t value;
                const std::size_t place = at / 8 * 8;
                if (place + 8 > bytes.size()) break;
                std::memcpy(&value, &bytes[place], 8);
                value += (below(2) == 0 ? std::uint64_t{64} : ~std::uint64_t{63}) * (1 + below(3));
                std::memcpy(&bytes[place], &value, 8);
                break;
            }
            case 5: bytes.resize(below(4) == 0 ? at : bytes.size() / 64 * 64); break;
            case 6: bytes.resize(bytes.size() + 64 * (1 + below(2)), 0); break;
            default: {
                const std::size_t from = below(bytes.size());
                const std::size_t most = bytes.size() - std::max(at, from);
                std::memmove(&bytes[at], &bytes[from], std::min(most, 1 + below(16)));
                break;
            }
        }
    }
}

void use(Owned& owned) {
    const Packed& weight = owned.view;
    if (weight.rows * weight.columns > kMostElements) return;
    std::vector<float> dense(weight.rows * weight.columns);
    unpack(weight, dense.data());
    const Isa isa = static_cast<Isa>(below(static_cast<std::size_t>(best_isa()) + 1));
    const std::size_t tokens = below(4) == 0 ? 17 : 1 + below(5);
    std::vector<float> x(tokens * weight.columns, 1.0f), y(tokens * weight.rows);
    Request request;
    request.x = x.data();
    request.tokens = tokens;
    request.rounded = below(2) == 0;
    const Part part{&weight, nullptr, y.data()};
    add_lanes(owned, kernels_for(isa));
    multiply(&part, 1, kernels_for(isa), request, Parallel{});
}

}  // namespace

int main(int count, char** arguments) {
    const unsigned long inputs = count > 1 ? std::strtoul(arguments[1], nullptr, 10) : 1000000;
    generator.seed(count > 2 ? std::strtoull(arguments[2], nullptr, 10) : 1);
    const auto sound = sound_weights();
    unsigned long accepted = 0, used = 0;
    std::vector<std::uint8_t> bytes;
    for (unsigned long i = 0; i < inputs; ++i) {
        bytes = sound[below(sound.size())];
        damage(bytes);
        // Exactly as long as the input, so that a read behind it is seen.
        void* memory = ::operator new(std::max<std::size_t>(bytes.size(), 1), std::align_val_t{64});
        if (!bytes.empty()) std::memcpy(memory, bytes.data(), bytes.size());
        Owned weight;
        if (validate(memory, bytes.size(), weight.view).empty()) {
            ++accepted;
            if (accepted % 8 == 0) {
                use(weight);
                ++used;
            }
        }
        ::operator delete(memory, std::align_val_t{64});
    }
    std::printf("%lu inputs, %lu accepted, %lu multiplied with\n", inputs, accepted, used);
    // Were all refused, or none, the mutations would test nothing.
    return accepted > inputs / 100 && accepted < inputs ? EXIT_SUCCESS : EXIT_FAILURE;
}
