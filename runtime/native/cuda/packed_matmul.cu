// The operator elsa.PackedMatMul of the CUDA execution provider (docs/cuda.md).
//
//   y (..., rows) = PackedMatMul(x (..., columns), mask, values, scales?, bias?)
//
// mask and values are those of the packed form (docs/packed-format.md) and stay on the host, where
// they are turned into the GPU's layout once, when the session is made.
#include <cmath>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "../bitmask.h"
#include "../half.h"
#include "cublas.h"
#include "ort_custom_op.h"
#include "scratch.h"

namespace elsa {
namespace cuda {
namespace {

enum Input : std::size_t { kX, kMask, kValues, kScales, kBias, kInputs };
constexpr int kCublasHandle = 10002, kResourceVersion = 3;  // of onnxruntime's CUDA provider

Api api;

std::string number(std::int64_t value) { return std::to_string(value); }

Value value_of(int type) {
    switch (type) {
        case ort::kFloat: return Value::f32;
        case ort::kBfloat16: return Value::bf16;
        case ort::kFloat16: return Value::f16;
        case ort::kInt8: return Value::s8;
        default:
            throw std::invalid_argument("values of type " + number(type) +
                                        ", wanted float32, float16, bfloat16 or int8");
    }
}

Element element_of(int type) {
    switch (type) {
        case ort::kFloat: return Element::f32;
        case ort::kBfloat16: return Element::bf16;
        case ort::kFloat16: return Element::f16;
        default:
            throw std::runtime_error("x of type " + number(type) +
                                     ", wanted float32, float16 or bfloat16");
    }
}

std::size_t size_attribute(const KernelInfo* info, const char* name) {
    std::int64_t value = 0;
    check(api, api.KernelInfoGetAttribute_int64(info, name, &value));
    if (value < 1 || value > std::int64_t{1} << 31) {
        throw std::invalid_argument(std::string(name) + " is " + number(value) +
                                    ", wanted 1 to 2^31");
    }
    return static_cast<std::size_t>(value);
}

// One number for each row, or one for all, as floats.
std::vector<float> row_numbers(const Constant& given, std::size_t rows, const char* what) {
    const std::size_t count = given.shape.elements;
    if (count != rows && count != 1) {
        throw std::invalid_argument(std::string(what) + " of " + number(std::int64_t(count)) +
                                    " numbers, wanted 1 or " + number(std::int64_t(rows)));
    }
    std::vector<float> made(rows);
    for (std::size_t row = 0; row < rows; ++row) {
        const std::size_t at = count == 1 ? 0 : row;
        if (given.shape.type == ort::kFloat) {
            made[row] = static_cast<const float*>(given.data)[at];
        } else {
            const std::uint16_t bits = static_cast<const std::uint16_t*>(given.data)[at];
            made[row] = element_of(given.shape.type) == Element::f16 ? from_f16(bits)
                                                                     : from_bf16(bits);
        }
        if (!std::isfinite(made[row])) {
            throw std::invalid_argument(std::string(what) + " that are not finite");
        }
    }
    return made;
}

Bitmask bits_of_node(const KernelInfo* info, const Constant& mask, const Constant& values) {
    if (mask.data == nullptr || values.data == nullptr) {
        throw std::invalid_argument("mask or values that are not constant");
    }
    if (mask.shape.type != ort::kUint8) throw std::invalid_argument("a mask that is not uint8");
    Bitmask bits;
    bits.rows = size_attribute(info, "rows");
    bits.columns = size_attribute(info, "columns");
    bits.mask = static_cast<const std::uint8_t*>(mask.data);
    bits.mask_bytes = mask.shape.elements;
    bits.values = static_cast<const std::uint8_t*>(values.data);
    bits.count = values.shape.elements;
    bits.value_bytes = bytes_of(value_of(values.shape.type));
    const std::string fault = validate(bits);
    if (!fault.empty()) throw std::invalid_argument("the packed weight " + fault);
    if (!fills_with_zero(bits)) {
        throw std::invalid_argument("a packed weight filled with something else than zero");
    }
    return bits;
}

class Kernel {
public:
    explicit Kernel(const KernelInfo* info) {
        const Constant mask = constant(api, info, kMask), values = constant(api, info, kValues);
        const Bitmask bits = bits_of_node(info, mask, values);
        const Value value = value_of(values.shape.type);
        const Constant given_scales = constant(api, info, kScales);
        const Constant given_bias = constant(api, info, kBias);
        if ((value == Value::s8) != (given_scales.data != nullptr)) {
            throw std::invalid_argument("int8 values have constant scales, others have none");
        }
        std::vector<float> scales, bias;
        if (given_scales.data != nullptr) scales = row_numbers(given_scales, bits.rows, "scales");
        if (given_bias.data != nullptr) bias = row_numbers(given_bias, bits.rows, "bias");
        const Device device = Device::current();
        const Plan plan =
            plan_for(bits.rows, bits.columns, bits.count - 1, device.multiprocessors);
        const std::vector<std::uint32_t> starts = row_starts(bits);
        const Sliced sliced =
            slice(bits.rows, bits.columns, value, plan, [&](std::size_t row, std::uint8_t* out) {
                read_row(bits, row, starts[row], out);
            });
        weight_ = std::make_unique<Weight>(sliced, scales.empty() ? nullptr : scales.data(),
                                           bias.empty() ? nullptr : bias.data(), device);
        Scratch::shared().add(weight_->scratch_bytes());
    }

    ~Kernel() { Scratch::shared().remove(); }
    Kernel(const Kernel&) = delete;
    Kernel& operator=(const Kernel&) = delete;

    void compute(ort::KernelContext* context) const {
        const ort::Value* input = nullptr;
        check(api, api.KernelContext_GetInput(context, kX, &input));
        TensorShape shape = shape_of(api, input);
        const auto columns = static_cast<std::int64_t>(weight_->columns());
        if (shape.rank < 1 || shape.sizes[shape.rank - 1] != columns) {
            throw std::runtime_error("an input that is not (..., " + number(columns) + ")");
        }
        Call call;
        call.element = element_of(shape.type);
        call.tokens = shape.elements / weight_->columns();
        shape.sizes[shape.rank - 1] = static_cast<std::int64_t>(weight_->rows());
        ort::Value* output = nullptr;
        check(api, api.KernelContext_GetOutput(context, 0, shape.sizes, shape.rank, &output));
        if (call.tokens == 0) return;
        void* from = nullptr;
        check(api, api.GetTensorMutableData(const_cast<ort::Value*>(input), &from));
        check(api, api.GetTensorMutableData(output, &call.y));
        call.x = from;
        set_stream(context, call);
        call.scratch = Scratch::shared().of(call.stream);
        weight_->multiply(call);
    }

private:
    static void set_stream(ort::KernelContext* context, Call& call) {
#if defined(__CUDACC__)
        void* stream = nullptr;
        check(api, api.KernelContext_GetGPUComputeStream(context, &stream));
        call.stream = static_cast<Stream>(stream);
        if (call.tokens <= kMostDecodeTokens || !has_cublas()) return;
        check(api, api.KernelContext_GetResource(context, kResourceVersion, kCublasHandle,
                                                 &call.library));
        if (call.library != nullptr) call.product = multiply_by_cublas;
#else
        (void)context, (void)call, (void)kResourceVersion, (void)kCublasHandle;
#endif
    }

    std::unique_ptr<Weight> weight_;
};

// Runs `work`; what it throws becomes a status.
template <class Work>
ort::Status* guarded(const Work& work) {
    try {
        work();
        return nullptr;
    } catch (const std::bad_alloc&) {
        return api.CreateStatus(ort::kFail, "elsa.PackedMatMul: out of memory");
    } catch (const std::exception& error) {
        const std::string message = std::string("elsa.PackedMatMul: ") + error.what();
        return api.CreateStatus(ort::kFail, message.c_str());
    }
}

// One for each type of x.
struct PackedMatMul : CustomOp {
    int type;

    explicit PackedMatMul(int type_) : type(type_) {
        GetName = [](const CustomOp*) { return "PackedMatMul"; };
        GetProvider = [](const CustomOp*) -> const char* {
#if defined(__CUDACC__)
            return "CUDAExecutionProvider";
#else
            return nullptr;  // the CPU, where the emulation runs
#endif
        };
        GetInputTypeCount = [](const CustomOp*) -> std::size_t { return kInputs; };
        GetOutputTypeCount = [](const CustomOp*) -> std::size_t { return 1; };
        GetInputType = [](const CustomOp* op, std::size_t i) -> int {
            return i == kX      ? static_cast<const PackedMatMul*>(op)->type
                   : i == kMask ? int{ort::kUint8}
                                : 0;  // any
        };
        GetOutputType = [](const CustomOp* op, std::size_t) {
            return static_cast<const PackedMatMul*>(op)->type;
        };
        GetInputCharacteristic = [](const CustomOp*, std::size_t i) -> int {
            return i < kScales ? kRequired : kOptional;
        };
        GetOutputCharacteristic = [](const CustomOp*, std::size_t) -> int { return kRequired; };
        GetInputMemoryType = [](const CustomOp*, std::size_t i) -> int {
            return i == kX ? kDefaultMemory : kOnCpu;
        };
        CreateKernelV2 = [](const CustomOp*, const void*, const KernelInfo* info, void** kernel) {
            return guarded([&] { *kernel = new Kernel(info); });
        };
        KernelComputeV2 = [](void* kernel, ort::KernelContext* context) {
            return guarded([&] { static_cast<const Kernel*>(kernel)->compute(context); });
        };
        KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
        GetStartVersion = [](const CustomOp*) { return 1; };
        GetEndVersion = [](const CustomOp*) { return 1; };
    }
};

CustomOpDomain* domain() {
    static CustomOpDomain* const made = [] {
        static const PackedMatMul f32(ort::kFloat), f16(ort::kFloat16), bf16(ort::kBfloat16);
        CustomOpDomain* fresh = nullptr;
        check(api, api.CreateCustomOpDomain("elsa", &fresh));
        for (const PackedMatMul* op : {&f32, &f16, &bf16}) {
            check(api, api.CustomOpDomain_Add(fresh, op));
        }
        return fresh;
    }();
    return made;
}

}  // namespace
}  // namespace cuda
}  // namespace elsa

extern "C" {

// Called by onnxruntime's register_custom_ops_library.
__attribute__((visibility("default"))) elsa::ort::Status* RegisterCustomOps(
    elsa::ort::SessionOptions* options, const elsa::ort::ApiBase* base) {
    using namespace elsa::cuda;
    if (!api.load(*base)) {
        if (api.CreateStatus == nullptr) return nullptr;
        return api.CreateStatus(elsa::ort::kFail,
                                "elsa.PackedMatMul needs onnxruntime 1.23 or newer of version 1");
    }
    return guarded([&] { check(api, api.AddCustomOpDomain(options, domain())); });
}

// Version of what the Python side relies on: the operator's inputs and attributes.
__attribute__((visibility("default"))) std::int32_t elsa_cuda_version() { return 1; }
}
