// The GPU's kernels, emulated, against float64, in buffers of exactly the size they may touch.
// Meant to run under the address and undefined-behaviour sanitizers.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "../launch.h"
#include "../product.h"

namespace {

using namespace elsa;
using namespace elsa::cuda;

std::mt19937 generator(1);

float normal() { return std::normal_distribution<float>()(generator); }

struct Released {
    void operator()(void* memory) const { release(memory); }
};
using Memory = std::unique_ptr<void, Released>;

Memory filled(const void* from, std::size_t bytes) {
    Memory memory(allocate(bytes));
    if (from != nullptr) copy_in(memory.get(), from, bytes);
    return memory;
}

// Values as they are stored, and what they are worth.
struct Matrix {
    std::size_t rows, columns;
    Value value;
    std::vector<std::uint8_t> bytes;
    std::vector<double> worth;
    std::vector<float> scales;

    void set(std::size_t row, std::size_t column, float given) {
        const std::size_t at = row * columns + column, size = bytes_of(value);
        std::uint32_t bits = bits_of(given);
        worth[at] = given;
        if (value == Value::f16) {
            bits = to_f16(given);
            worth[at] = from_f16(static_cast<std::uint16_t>(bits));
        } else if (value == Value::bf16) {
            bits = to_bf16(given);
            worth[at] = from_bf16(static_cast<std::uint16_t>(bits));
        } else if (value == Value::s8) {
            const int whole = static_cast<int>(std::lround(given * 40.0f)) % 128;
            bits = static_cast<std::uint8_t>(static_cast<std::int8_t>(whole));
            worth[at] = double{scales[row]} * whole;
        }
        std::memcpy(bytes.data() + at * size, &bits, size);
    }
};

enum class Kind { random, none, all, one_column, uneven, last_column };

bool kept(Kind kind, std::size_t row, std::size_t column, std::size_t columns, double density) {
    switch (kind) {
        case Kind::none: return false;
        case Kind::all: return true;
        case Kind::one_column: return column == 0;
        case Kind::last_column: return column + 1 == columns && row % 2 == 1;
        case Kind::uneven: density = row % 3 == 0 ? 0.0 : row % 7 == 0 ? 1.0 : density / 4; break;
        case Kind::random: break;
    }
    return std::bernoulli_distribution(density)(generator);
}

Matrix matrix(std::size_t rows, std::size_t columns, Value value, Kind kind, double density) {
    Matrix made{rows, columns, value, {}, {}, {}};
    made.bytes.assign(rows * columns * bytes_of(value), 0);
    made.worth.assign(rows * columns, 0.0);
    for (std::size_t row = 0; row < rows && value == Value::s8; ++row) {
        made.scales.push_back(0.01f + 0.001f * static_cast<float>(row % 5));
    }
    for (std::size_t row = 0; row < rows; ++row) {
        for (std::size_t column = 0; column < columns; ++column) {
            if (kept(kind, row, column, columns, density)) made.set(row, column, normal());
        }
    }
    return made;
}

Sliced sliced_of(const Matrix& weight, const Plan& plan) {
    const std::size_t row_bytes = weight.columns * bytes_of(weight.value);
    return slice(weight.rows, weight.columns, weight.value, plan,
                 [&](std::size_t row, std::uint8_t* out) {
                     std::memcpy(out, weight.bytes.data() + row * row_bytes, row_bytes);
                 });
}

std::vector<float> to_floats(const std::vector<std::uint8_t>& bytes, Element element) {
    std::vector<float> made(bytes.size() / bytes_of(element));
    for (std::size_t i = 0; i < made.size(); ++i) {
        if (element == Element::f32) {
            std::memcpy(&made[i], bytes.data() + i * 4, 4);
        } else {
            std::uint16_t bits;
            std::memcpy(&bits, bytes.data() + i * 2, 2);
            made[i] = element == Element::f16 ? from_f16(bits) : from_bf16(bits);
        }
    }
    return made;
}

std::vector<std::uint8_t> random_elements(std::size_t count, Element element) {
    std::vector<std::uint8_t> made(count * bytes_of(element));
    for (std::size_t i = 0; i < count; ++i) {
        const float value = normal();
        const std::uint32_t bits = element == Element::f32   ? bits_of(value)
                                   : element == Element::f16 ? to_f16(value)
                                                             : to_bf16(value);
        std::memcpy(made.data() + i * bytes_of(element), &bits, bytes_of(element));
    }
    return made;
}

// A dense product as cuBLAS does it, in float64: columns of column-major matrices.
void as_cublas(void* calls, const DenseCall& call, bool adds) {
    ++*static_cast<int*>(calls);
    const auto value = [&](const void* from, std::size_t at) {
        return double{read_element(from, call.element, at)};
    };
    for (std::size_t m = 0; m < call.tokens; ++m) {
        for (std::size_t n = 0; n < call.rows; ++n) {
            double sum = adds ? value(call.y, m * call.stride + n) : 0.0;
            for (std::size_t k = 0; k < call.columns; ++k) {
                const double activation = value(call.x, m * call.columns + k);
                sum += value(call.dense, n * call.columns + k) * activation;
            }
            write_element(call.y, call.element, m * call.stride + n, static_cast<float>(sum));
        }
    }
}

struct Case {
    std::size_t tokens;
    Element element;
    bool bias, cublas;
    emulation::Order order;
};

// Largest difference from float64, in units of what rounding may do.
double worst(const Matrix& weight, const std::vector<float>& x, const std::vector<float>& y,
             const std::vector<float>& bias, const Case& run) {
    // Rounding of the result, and of values that are written out dense.
    const double unit = run.element == Element::f16    ? 0x1p-11
                        : run.element == Element::bf16 ? 0x1p-8
                                                       : 0.0;
    double most = 0.0;
    for (std::size_t m = 0; m < run.tokens; ++m) {
        for (std::size_t n = 0; n < weight.rows; ++n) {
            double sum = bias.empty() ? 0.0 : bias[n], size = std::fabs(sum);
            for (std::size_t k = 0; k < weight.columns; ++k) {
                const double product =
                    weight.worth[n * weight.columns + k] * x[m * weight.columns + k];
                sum += product;
                size += std::fabs(product);
            }
            const double steps = static_cast<double>(weight.columns + 16) * 0x1p-24;
            const double allowed = size * (steps + 2 * unit) + 1e-30;
            const double off = std::fabs(y[m * weight.rows + n] - sum) / allowed;
            most = off <= most ? most : off;  // NaN counts
        }
    }
    return most;
}

// The result as bytes; `said` says when it is wrong.
std::vector<std::uint8_t> multiply(const Matrix& weight, const Plan& plan, const Case& run,
                                   int& faults) {
    emulated_order = run.order;
    const Sliced sliced = sliced_of(weight, plan);
    std::vector<float> bias;
    for (std::size_t row = 0; run.bias && row < weight.rows; ++row) bias.push_back(normal());
    const Weight product(sliced, weight.scales.empty() ? nullptr : weight.scales.data(),
                         bias.empty() ? nullptr : bias.data(), Device::current());
    const auto x = random_elements(run.tokens * weight.columns, run.element);
    std::vector<std::uint8_t> y(run.tokens * weight.rows * bytes_of(run.element));
    std::memset(y.data(), 0xff, y.size());  // NaN
    const Memory x_memory = filled(x.data(), x.size()), y_memory = filled(y.data(), y.size());
    const Memory scratch = filled(nullptr, product.scratch_bytes());
    std::memset(scratch.get(), 0xff, product.scratch_bytes());
    int calls = 0;
    Call call;
    call.x = x_memory.get();
    call.y = y_memory.get();
    call.tokens = run.tokens;
    call.element = run.element;
    call.scratch = scratch.get();
    call.product = run.cublas ? as_cublas : nullptr;
    call.library = &calls;
    product.multiply(call);
    copy_out(y.data(), y_memory.get(), y.size());
    const std::vector<float> given = to_floats(x, run.element);
    const double off = worst(weight, given, to_floats(y, run.element), bias, run);
    if (!(off <= 1.0)) {
        ++faults;
        std::printf("%zu x %zu, value %d, %zu tokens, element %d, bias %d, cublas %d, "
                    "plan %u %u %u %u: off by %.3g\n",
                    weight.rows, weight.columns, static_cast<int>(weight.value), run.tokens,
                    static_cast<int>(run.element), run.bias, run.cublas, plan.slabs,
                    plan.slab_columns, plan.parts, plan.slices_per_block, off);
    }
    return y;
}

int check_plan(const Matrix& weight, const Plan& plan, int turn) {
    int faults = 0;
    for (const Element element : {Element::f32, Element::f16, Element::bf16}) {
        for (const std::size_t tokens : {1, 2, 3, 4, 5, 6, 7, 8, 17}) {
            // Everything with everything would take hours: types and numbers of tokens take turns.
            const bool always = tokens == 1 || tokens == 17;
            if (!always && (static_cast<int>(tokens) + turn) % 2 == 0) continue;
            if (element != Element::f32 && static_cast<int>(tokens) % 4 != turn % 4) continue;
            Case run{tokens, element, tokens % 2 == 1, false, emulation::Order::forward};
            multiply(weight, plan, run, faults);
            run.order = emulation::Order::reverse;
            run.cublas = true;
            multiply(weight, plan, run, faults);
        }
    }
    return faults;
}

// Whichever thread is first: the sums are the same, to the bit.
int check_deterministic() {
    int faults = 0;
    const Matrix weight = matrix(70, 1500, Value::f16, Kind::random, 0.3);
    const Plan plan{3, 504, 4, 2};
    std::vector<std::vector<std::uint8_t>> found;
    for (const auto order : {emulation::Order::forward, emulation::Order::reverse}) {
        generator.seed(5);
        found.push_back(multiply(weight, plan, {4, Element::f32, true, false, order}, faults));
    }
    if (found[0] == found[1]) return faults;
    std::printf("the order of threads changes the sums\n");
    return faults + 1;
}

int check_refusals() {
    const Matrix weight = matrix(3, 40, Value::f16, Kind::random, 0.5);
    int faults = 0;
    for (const Plan& plan : {Plan{1, 32, 1, 1}, Plan{2, 40, 1, 1}, Plan{1, 40, 0, 1},
                             Plan{1, 40, 17, 1}, Plan{1, 40, 8, 4}, Plan{1, 40, 1, 3},
                             Plan{0, 40, 1, 1}, Plan{1, 8192, 1, 1},
                             Plan{1, 40, 1, 1, 100}, Plan{1, 40, 1, 1, 65536}}) {
        try {
            sliced_of(weight, plan);
            std::printf("a plan that does not fit was taken\n");
            ++faults;
        } catch (const std::invalid_argument&) {
        }
    }
    return faults;
}

int check_plans() {
    int faults = 0;
    for (const std::size_t rows : {1, 33, 1024, 4096, 128256}) {
        for (const std::size_t columns : {1, 255, 4096, 4097, 14336}) {
            for (const std::size_t most : {4, 132}) {
                for (const double density : {0.0, 0.1, 0.5}) {
                    const auto nonzeros = static_cast<std::size_t>(
                        density * static_cast<double>(rows * columns));
                    const Plan plan = plan_for(rows, columns, nonzeros, most);
                    const std::size_t covered = std::size_t{plan.slabs} * plan.slab_columns;
                    if (covered >= columns && covered - columns < plan.slab_columns &&
                        plan.slab_columns <= kSlabColumns && plan.warps() <= kMostWarps) {
                        continue;
                    }
                    std::printf("%zu x %zu: a plan that does not cover it\n", rows, columns);
                    ++faults;
                }
            }
        }
    }
    return faults;
}

}  // namespace

int main(int count, char** arguments) {
    const bool quick = count > 1 && std::string(arguments[1]) == "quick";
    constexpr std::size_t shapes[][2] = {{1, 1},     {5, 255},   {33, 257},
                                         {130, 700}, {129, 300}, {64, 1040}};
    constexpr Kind kinds[] = {Kind::random, Kind::none,   Kind::all,
                              Kind::one_column, Kind::uneven, Kind::last_column};
    int faults = check_deterministic() + check_refusals() + check_plans(), cases = 0, turn = 0;
    for (const auto& shape : shapes) {
        for (const Value value : {Value::f16, Value::bf16, Value::s8, Value::f32}) {
            for (const Kind kind : kinds) {
                const double density = turn % 3 == 0 ? 0.02 : turn % 3 == 1 ? 0.1 : 0.5;
                const Matrix weight = matrix(shape[0], shape[1], value, kind, density);
                const auto slab = static_cast<std::uint32_t>((shape[1] + 7) / 8 * 8);
                const auto half = static_cast<std::uint32_t>((shape[1] / 2 + 8) / 8 * 8);
                const Plan plans[] = {
                    plan_for(shape[0], shape[1], shape[0] * shape[1] / 4, 4),
                    {1, slab, 2, 1}, {1, slab, 1, 4}, {1, slab, 4, 2, 256},
                    {half < shape[1] ? 2u : 1u, half < shape[1] ? half : slab, 3, 1}};
                const std::size_t only = static_cast<std::size_t>(turn) % std::size(plans);
                if (!quick || turn % 4 == 0) {
                    faults += check_plan(weight, plans[only], turn);
                    ++cases;
                }
                ++turn;
            }
        }
    }
    std::printf("%d weights, %d faults\n", cases, faults);
    return faults == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
