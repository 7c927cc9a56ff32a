// Every kernel against float64, in buffers of exactly the size it may touch. Meant to run under the
// address and undefined-behaviour sanitizers; tests/runtime/test_sparse_kernels.py asks for more.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "../lanes.h"
#include "../matmul.h"

namespace {

using namespace elsa;

std::mt19937 generator(1);

constexpr double kClumped = 0.05;  // a density

float normal() { return std::normal_distribution<float>()(generator); }

std::vector<float> weight_of(std::size_t rows, std::size_t columns, double density) {
    std::vector<float> weight(rows * columns, 0.0f);
    std::bernoulli_distribution kept(density);
    for (float& value : weight) value = kept(generator) ? normal() : 0.0f;
    if (density <= 0.0 || density > kClumped) return weight;
    // Full rows among nearly empty ones: not what kernels of few non-zeros expect.
    for (std::size_t n = 3; n < rows; n += 16) {
        for (std::size_t k = 0; k < columns; ++k) weight[n * columns + k] = normal();
    }
    return weight;
}

// Tasks one after the other, but in the wrong order, as another thread might take them.
void backwards(void*, std::size_t tasks, void (*task)(void*, std::size_t), void* data) {
    while (tasks > 0) task(data, --tasks);
}

// Largest difference from float64, in units of what rounding may do.
double worst(const std::vector<float>& dense, const std::vector<float>& x,
             const std::vector<float>& y, std::size_t rows, std::size_t columns,
             std::size_t tokens, double relative) {
    double most = 0.0;
    for (std::size_t m = 0; m < tokens; ++m) {
        for (std::size_t n = 0; n < rows; ++n) {
            double sum = 0.0, size = 1e-30, largest = 0.0;
            for (std::size_t k = 0; k < columns; ++k) {
                const double product = double{dense[n * columns + k]} * x[m * columns + k];
                sum += product;
                size += std::fabs(product);
                largest = std::max(largest, std::fabs(double{x[m * columns + k]}));
            }
            double weights = 0.0;
            for (std::size_t k = 0; k < columns; ++k) weights += std::fabs(dense[n * columns + k]);
            const double allowed = size * static_cast<double>(columns + 4) * 6e-8 +
                                   relative * largest * weights + 1e-30;
            most = std::max(most, std::fabs(y[m * rows + n] - sum) / allowed);
        }
    }
    return most;
}

int check(std::size_t rows, std::size_t columns, double density, Format format, Type type,
          const Kernels& kernels, bool lanes) {
    const std::vector<float> weight = weight_of(rows, columns, density);
    Owned made = pack({weight.data(), rows, columns, columns, 1}, format, type);
    if (lanes) add_lanes(made, kernels);
    if (lanes && rows == 98 && density == 0.1 && kernels.isa == Isa::avx512vnni && !made.lanes) {
        std::printf("98 x %zu type %d: no lanes\n", columns, static_cast<int>(type));
        return 1;
    }
    std::vector<float> dense(rows * columns);
    unpack(made.view, dense.data());
    int faults = 0;
    for (const std::size_t tokens : {1, 2, 5, 16, 35, 70}) {
        for (const bool rounded : {false, true}) {
            if (rounded && type != Type::s8) continue;
            std::vector<float> x(tokens * columns), y(tokens * rows, NAN);
            for (float& value : x) value = normal();
            Request request;
            request.x = x.data();
            request.tokens = tokens;
            request.rounded = rounded;
            const Part part{&made.view, nullptr, y.data()};
            multiply(&part, 1, kernels, request, Parallel{nullptr, backwards});
            // Rounding moves an activation by at most half a step of largest / levels.
            const double off =
                worst(dense, x, y, rows, columns, tokens, rounded ? 0.51 / made.view.levels : 0.0);
            if (off <= 1.0) continue;
            std::printf("%zu x %zu density %.2f format %d type %d %s tokens %zu: off by %.3g\n",
                        rows, columns, density, static_cast<int>(format), static_cast<int>(type),
                        isa_name(kernels.isa), tokens, off);
            ++faults;
        }
    }
    return faults;
}

// Tables as processors choose them, and one with every kernel, which some processors do without.
std::vector<Kernels> tables() {
    std::vector<Kernels> made;
    for (int isa = 0; isa <= static_cast<int>(best_isa()); ++isa) {
        made.push_back(kernels_for(static_cast<Isa>(isa)));
    }
#if defined(ELSA_HAVE_X86_KERNELS)
    if (best_isa() == Isa::avx512vnni) {
        made.push_back(made.back());
        add_avx512vnni(made.back());
    }
#endif
    return made;
}

}  // namespace

int main() {
    constexpr std::size_t shapes[][2] = {{1, 1},    {3, 63},   {17, 64},
                                         {33, 130}, {20, 700}, {70, 192}, {98, 130}};
    int faults = 0, cases = 0;
    for (const Kernels& kernels : tables()) {
        for (const Format format : {Format::bitmap, Format::sliced, Format::rows}) {
            for (const Type type : {Type::f32, Type::bf16, Type::f16, Type::s8}) {
                for (const double density : {0.0, kClumped, 0.1, 1.0}) {
                    for (const auto& shape : shapes) {
                        for (const bool lanes : {false, true}) {
                            if (lanes && format != Format::bitmap) continue;
                            faults += check(shape[0], shape[1], density, format, type, kernels, lanes);
                            ++cases;
                        }
                    }
                }
            }
        }
    }
    std::printf("%d cases up to %s, %d faults\n", cases, isa_name(best_isa()), faults);
    return faults == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
