// Attention against float64, in buffers of exactly the size it may touch. Meant to run under the
// address and undefined-behaviour sanitizers; tests/runtime/test_attention.py asks for more.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "../attention.h"

namespace {

using namespace elsa;
using Floats = std::vector<float>;

std::mt19937 generator(1);

Floats normal(std::size_t count) {
    std::normal_distribution<float> draw;
    Floats made(count);
    for (float& value : made) value = draw(generator);
    return made;
}

// Tasks one after the other, but in the wrong order, as another thread might take them.
void backwards(void*, std::size_t tasks, void (*task)(void*, std::size_t), void* data) {
    while (tasks > 0) task(data, --tasks);
}

struct Sizes {
    std::size_t batches, heads, groups, width, value_width, queries, past;
};

// Largest difference from float64, over the largest value.
double worst(const Sizes& n, const Attention& call, const Floats& y) {
    const std::size_t total = n.past + n.queries, shared = n.heads / n.groups;
    double most = 0.0, largest = 1e-30;
    for (std::size_t b = 0; b < n.batches; ++b) {
        for (std::size_t h = 0; h < n.heads; ++h) {
            const float* keys = call.keys + (b * n.groups + h / shared) * call.room * n.width;
            const float* values =
                call.values + (b * n.groups + h / shared) * call.room * n.value_width;
            for (std::size_t s = 0; s < n.queries; ++s) {
                const float* q = call.q.data + b * call.q.batch + s * call.q.token + h * call.q.head;
                std::vector<double> sums(n.value_width, 0.0);
                double weights = 0.0;
                for (std::size_t t = 0; t < total; ++t) {
                    double score = 0.0;
                    for (std::size_t e = 0; e < n.width; ++e) {
                        score += double{q[e]} * keys[t * n.width + e];
                    }
                    const std::uint8_t* allowed = call.mask.allowed;
                    if (call.causal && t > n.past + s) continue;
                    if (allowed != nullptr && allowed[(b * n.queries + s) * total + t] == 0) continue;
                    const double weight = std::exp(score * double{call.scale});
                    weights += weight;
                    for (std::size_t e = 0; e < n.value_width; ++e) {
                        sums[e] += weight * values[t * n.value_width + e];
                    }
                }
                for (std::size_t e = 0; e < n.value_width; ++e) {
                    const double wanted = weights == 0.0 ? 0.0 : sums[e] / weights;
                    const double found =
                        y[(b * n.queries + s) * n.heads * n.value_width + h * n.value_width + e];
                    most = std::max(most, std::fabs(found - wanted));
                    largest = std::max(largest, std::fabs(wanted));
                }
            }
        }
    }
    return most / largest;
}

// `shared`: old and new keys are one piece of memory with room for more.
int check(const Sizes& n, bool causal, bool masked, bool bypass, bool shared,
          const Kernels& kernels) {
    const std::size_t total = n.past + n.queries, pairs = n.batches * n.groups;
    const std::size_t room = shared ? total + 3 : total;
    const Floats q = normal(n.batches * n.queries * n.heads * n.width);
    const Floats k = normal(n.batches * n.queries * n.groups * n.width);
    const Floats v = normal(n.batches * n.queries * n.groups * n.value_width);
    const Floats past_keys = normal(pairs * n.past * n.width);
    const Floats past_values = normal(pairs * n.past * n.value_width);
    Floats keys(pairs * room * n.width, NAN), values(pairs * room * n.value_width, NAN);
    for (std::size_t pair = 0; pair < pairs && shared; ++pair) {
        const std::size_t kept = n.past * n.width, values_kept = n.past * n.value_width;
        std::copy_n(past_keys.data() + pair * kept, kept, keys.data() + pair * room * n.width);
        std::copy_n(past_values.data() + pair * values_kept, values_kept,
                    values.data() + pair * room * n.value_width);
    }
    Floats y(n.batches * n.queries * n.heads * n.value_width);
    std::vector<std::uint8_t> allowed(n.batches * n.queries * total);
    for (std::uint8_t& each : allowed) each = generator() % 4 != 0;
    Attention call;
    call.batches = n.batches;
    call.heads = n.heads;
    call.groups = n.groups;
    call.queries = call.added = n.queries;
    call.past = n.past;
    call.width = n.width;
    call.value_width = n.value_width;
    call.scale = 0.2f;
    call.causal = causal;
    call.bypass = bypass;
    call.q = {q.data(), n.queries * n.heads * n.width, n.heads * n.width, n.width};
    call.k = {k.data(), n.queries * n.groups * n.width, n.groups * n.width, n.width};
    call.v = {v.data(), n.queries * n.groups * n.value_width, n.groups * n.value_width,
              n.value_width};
    if (masked) {
        call.mask.allowed = allowed.data();
        call.mask.batch = n.queries * total;
        call.mask.query = total;
        call.mask.key = 1;
        call.mask.keys = total;
    }
    call.past_keys = shared ? keys.data() : past_keys.data();
    call.past_values = shared ? values.data() : past_values.data();
    call.past_room = shared ? room : n.past;
    call.keys = keys.data();
    call.values = values.data();
    call.room = room;
    call.y = y.data();
    call.y_view = {nullptr, n.queries * n.heads * n.value_width, n.heads * n.value_width,
                   n.value_width};
    attend(call, kernels, Parallel{nullptr, backwards});
    int faults = 0;
    const double off = worst(n, call, y);
    for (std::size_t pair = 0; pair < pairs; ++pair) {
        const float* at = keys.data() + pair * room * n.width;
        faults += !std::equal(at, at + n.past * n.width, past_keys.data() + pair * n.past * n.width);
    }
    if (off > 3e-6) ++faults;
    if (faults > 0) {
        std::printf("%zu batches, %zu heads, %zu groups, %zu + %zu tokens, %s: off by %.3g\n",
                    n.batches, n.heads, n.groups, n.past, n.queries, isa_name(kernels.isa), off);
    }
    return faults;
}

}  // namespace

int main() {
    constexpr Sizes sizes[] = {
        {1, 3, 1, 16, 16, 1, 0},  {1, 3, 3, 32, 16, 1, 5},   {2, 6, 2, 64, 64, 1, 130},
        {1, 4, 2, 48, 80, 3, 61}, {2, 4, 1, 16, 32, 6, 600}, {1, 9, 3, 64, 64, 40, 0},
        {1, 2, 1, 80, 48, 70, 3}, {1, 5, 5, 32, 32, 97, 40},
    };
    int faults = 0, cases = 0;
    for (int isa = 0; isa <= static_cast<int>(best_isa()); ++isa) {
        const Kernels& kernels = kernels_for(static_cast<Isa>(isa));
        if (!can_attend(kernels)) continue;
        for (const Sizes& each : sizes) {
            for (int how = 0; how < 16; ++how) {
                faults += check(each, (how & 1) != 0, (how & 2) != 0, (how & 4) != 0, (how & 8) != 0,
                                kernels);
                ++cases;
            }
        }
    }
    std::printf("%d cases up to %s, %d faults\n", cases, isa_name(best_isa()), faults);
    return faults == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
