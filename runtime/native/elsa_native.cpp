// The C interface: no exception leaves it.
#include "elsa_native.h"

#include <cstring>
#include <exception>
#include <new>
#include <stdexcept>

#include "claims.h"
#include "cost.h"
#include "lanes.h"
#include "matmul.h"

struct elsa_weight {
    elsa::Owned owned;  // without memory when it is a view
    const elsa::Kernels* kernels;
};

namespace {

void say(const char* text, char* message, std::uint64_t size) {
    if (message == nullptr || size == 0) return;
    const std::size_t length = std::strlen(text);
    const std::size_t copied = length < size - 1 ? length : static_cast<std::size_t>(size - 1);
    std::memcpy(message, text, copied);
    message[copied] = '\0';
}

// Runs `work`; what it throws becomes a message and `failed`.
template <class Result, class Work>
Result guarded(Result failed, char* message, std::uint64_t size, const Work& work) {
    try {
        return work();
    } catch (const std::bad_alloc&) {
        say("out of memory", message, size);
    } catch (const std::exception& error) {
        say(error.what(), message, size);
    }
    return failed;
}

}  // namespace

extern "C" {

std::int32_t elsa_abi_version(void) { return ELSA_ABI_VERSION; }

std::uint64_t elsa_cpu_features(void) { return elsa::cpu_features(); }

const char* elsa_isa(void) {
    return guarded<const char*>(nullptr, nullptr, 0,
                                [] { return elsa::isa_name(elsa::isa_by_name(nullptr)); });
}

std::int64_t elsa_check_coo_indices(const std::int64_t* indices, std::int64_t count,
                                    std::int64_t size) {
    std::int64_t previous = -1;
    for (std::int64_t i = 0; i < count; ++i) {
        const std::int64_t index = indices[i];
        // Strictly increasing from -1 also excludes negative ones and duplicates.
        if (index <= previous || index >= size) return i;
        previous = index;
    }
    return -1;
}

elsa_weight* elsa_pack(const float* dense, std::int64_t rows, std::int64_t columns,
                       std::int64_t row_stride, std::int64_t column_stride, std::int32_t format,
                       std::int32_t type, const float* scales, char* message,
                       std::uint64_t message_size) {
    return guarded<elsa_weight*>(nullptr, message, message_size, [&] {
        if (format < 1 || format > 3 || type < 0 || type > 3) {
            throw std::invalid_argument("unknown format or value type");
        }
        if (rows < 0 || columns < 0 || row_stride < 0 || column_stride < 0) {
            throw std::invalid_argument("a negative size");
        }
        const elsa::Dense from{dense, static_cast<std::size_t>(rows),
                               static_cast<std::size_t>(columns),
                               static_cast<std::size_t>(row_stride),
                               static_cast<std::size_t>(column_stride)};
        const elsa::Kernels& kernels = elsa::kernels_for(elsa::isa_by_name(nullptr));
        elsa::Owned owned = elsa::pack(from, static_cast<elsa::Format>(format),
                                       static_cast<elsa::Type>(type), scales);
        elsa::add_lanes(owned, kernels);
        return new elsa_weight{std::move(owned), &kernels};
    });
}

elsa_weight* elsa_open(const void* bytes, std::uint64_t size, char* message,
                       std::uint64_t message_size) {
    return guarded<elsa_weight*>(nullptr, message, message_size, [&] {
        elsa::Owned owned;
        const std::string fault =
            elsa::validate(bytes, static_cast<std::size_t>(size), owned.view);
        if (!fault.empty()) throw std::invalid_argument("the packed weight " + fault);
        const elsa::Kernels& kernels = elsa::kernels_for(elsa::isa_by_name(nullptr));
        elsa::add_lanes(owned, kernels);
        return new elsa_weight{std::move(owned), &kernels};
    });
}

void elsa_close(elsa_weight* weight) { delete weight; }

const void* elsa_bytes(const elsa_weight* weight, std::uint64_t* size) {
    *size = weight->owned.view.size;
    return weight->owned.view.bytes;
}

std::int64_t elsa_describe(const elsa_weight* weight, std::int32_t what) {
    const elsa::Packed& view = weight->owned.view;
    switch (what) {
        case 0: return static_cast<std::int64_t>(view.rows);
        case 1: return static_cast<std::int64_t>(view.columns);
        case 2: return static_cast<std::int64_t>(view.format);
        case 3: return static_cast<std::int64_t>(view.type);
        case 4: return static_cast<std::int64_t>(view.nonzeros);
        case 5: return static_cast<std::int64_t>(weight->kernels->isa);
        case 6:
            return view.lanes != nullptr ? static_cast<std::int64_t>(view.lanes->offsets.back()) : 0;
        default: return -1;
    }
}

void elsa_unpack(const elsa_weight* weight, float* dense) {
    elsa::unpack(weight->owned.view, dense);
}

std::int32_t elsa_multiply(const elsa_weight* weight, const float* x, std::int64_t tokens,
                           float* y, const float* bias, std::int32_t rounded,
                           char* message, std::uint64_t message_size) {
    return guarded<std::int32_t>(1, message, message_size, [&]() -> std::int32_t {
        if (tokens < 0) throw std::invalid_argument("a negative number of tokens");
        elsa::Request request;
        request.x = x;
        request.tokens = static_cast<std::size_t>(tokens);
        request.rounded = rounded != 0;
        const elsa::Part part{&weight->owned.view, bias, y};
        elsa::multiply(&part, 1, *weight->kernels, request, elsa::Parallel{});
        return 0;
    });
}

std::int32_t elsa_choose(std::int64_t rows, std::int64_t columns, std::int64_t nonzeros,
                         std::int32_t type, std::int32_t whole, double* gain) {
    return guarded<std::int32_t>(0, nullptr, 0, [&]() -> std::int32_t {
        if (rows < 1 || columns < 1 || nonzeros < 0 || type < 0 || type > 3) return 0;
        const elsa::Choice choice = elsa::choose(
            static_cast<std::uint64_t>(rows), static_cast<std::uint64_t>(columns),
            static_cast<std::uint64_t>(nonzeros), static_cast<elsa::Type>(type),
            elsa::isa_by_name(nullptr), whole != 0, true);
        if (gain != nullptr) *gain = choice.gain;
        return choice.packed ? static_cast<std::int32_t>(choice.format) : 0;
    });
}

std::uint64_t elsa_claims(char* text, std::uint64_t size) {
    return guarded<std::uint64_t>(0, nullptr, 0, [&]() -> std::uint64_t {
        const std::string json = elsa::claims_as_json();
        say(json.c_str(), text, size);
        return json.size();
    });
}

std::uint64_t elsa_shared_caches(char* text, std::uint64_t size) {
    return guarded<std::uint64_t>(0, nullptr, 0, [&]() -> std::uint64_t {
        const std::string json = elsa::shared_caches_as_json();
        say(json.c_str(), text, size);
        return json.size();
    });
}

std::int32_t elsa_adam_step(float* weights, const float* gradients, std::int8_t* m,
                            float* m_scales, std::uint8_t* v, float* v_scales, const float* noise,
                            std::int64_t count, const float* settings) {
    return guarded<std::int32_t>(1, nullptr, 0, [&]() -> std::int32_t {
        if (count < 0) return 1;
        elsa::AdamStep step;
        step.weights = weights;
        step.gradients = gradients;
        step.m = m;
        step.m_scales = m_scales;
        step.v = v;
        step.v_scales = v_scales;
        step.noise = noise;
        step.count = static_cast<std::size_t>(count);
        step.fresh1 = settings[0];
        step.kept2 = settings[1];
        step.fresh2 = settings[2];
        step.eps = settings[3];
        step.correction = settings[4];
        step.rate = settings[5];
        elsa::kernels_for(elsa::isa_by_name(nullptr)).adam_step(step);
        return 0;
    });
}

}  // extern "C"
