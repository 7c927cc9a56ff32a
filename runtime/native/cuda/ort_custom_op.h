// The part of onnxruntime's C interface that a custom operator uses, declared by us (see
// ../ort_api.h): slots of a table that is only appended to, and the operator's own structure.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../ort_api.h"

namespace elsa {
namespace cuda {

struct KernelInfo;
struct CustomOpDomain;

enum MemoryType : int { kOnCpu = -2, kDefaultMemory = 0 };
enum Characteristic : int { kRequired = 0, kOptional = 1 };

// Members that are null are optional.
struct CustomOp {
    std::uint32_t version = ort::kApiVersion;
    void* (*CreateKernel)(const CustomOp*, const void* api, const KernelInfo*) = nullptr;
    const char* (*GetName)(const CustomOp*) = nullptr;
    const char* (*GetProvider)(const CustomOp*) = nullptr;
    int (*GetInputType)(const CustomOp*, std::size_t) = nullptr;
    std::size_t (*GetInputTypeCount)(const CustomOp*) = nullptr;
    int (*GetOutputType)(const CustomOp*, std::size_t) = nullptr;
    std::size_t (*GetOutputTypeCount)(const CustomOp*) = nullptr;
    void (*KernelCompute)(void* kernel, ort::KernelContext*) = nullptr;
    void (*KernelDestroy)(void* kernel) = nullptr;
    int (*GetInputCharacteristic)(const CustomOp*, std::size_t) = nullptr;
    int (*GetOutputCharacteristic)(const CustomOp*, std::size_t) = nullptr;
    int (*GetInputMemoryType)(const CustomOp*, std::size_t) = nullptr;
    int (*GetVariadicInputMinArity)(const CustomOp*) = nullptr;
    int (*GetVariadicInputHomogeneity)(const CustomOp*) = nullptr;
    int (*GetVariadicOutputMinArity)(const CustomOp*) = nullptr;
    int (*GetVariadicOutputHomogeneity)(const CustomOp*) = nullptr;
    ort::Status* (*CreateKernelV2)(const CustomOp*, const void* api, const KernelInfo*,
                                   void** kernel) = nullptr;
    ort::Status* (*KernelComputeV2)(void* kernel, ort::KernelContext*) = nullptr;
    ort::Status* (*InferOutputShape)(const CustomOp*, void* context) = nullptr;
    int (*GetStartVersion)(const CustomOp*) = nullptr;
    int (*GetEndVersion)(const CustomOp*) = nullptr;
    void* optional[4] = {};
};

// The functions, by their slot.
struct Api {
    ort::Status* (*CreateStatus)(ort::ErrorCode, const char* message);                   // 0
    const char* (*GetErrorMessage)(const ort::Status*);                                  // 2
    ort::Status* (*CreateCustomOpDomain)(const char* name, CustomOpDomain** made);       // 26
    ort::Status* (*CustomOpDomain_Add)(CustomOpDomain*, const CustomOp*);                // 27
    ort::Status* (*AddCustomOpDomain)(ort::SessionOptions*, CustomOpDomain*);            // 28
    ort::Status* (*GetTensorMutableData)(ort::Value*, void** data);                      // 51
    ort::Status* (*GetTensorElementType)(const ort::TensorInfo*, int* type);             // 60
    ort::Status* (*GetDimensionsCount)(const ort::TensorInfo*, std::size_t* count);      // 61
    ort::Status* (*GetDimensions)(const ort::TensorInfo*, std::int64_t*, std::size_t);   // 62
    ort::Status* (*GetTensorTypeAndShape)(const ort::Value*, ort::TensorInfo** made);    // 65
    ort::Status* (*KernelInfoGetAttribute_int64)(const KernelInfo*, const char* name,
                                                 std::int64_t* value);                   // 86
    ort::Status* (*KernelContext_GetInput)(const ort::KernelContext*, std::size_t,
                                           const ort::Value**);                          // 90
    ort::Status* (*KernelContext_GetOutput)(ort::KernelContext*, std::size_t,
                                            const std::int64_t* sizes, std::size_t count,
                                            ort::Value**);                               // 91
    void (*ReleaseStatus)(ort::Status*);                                                 // 93
    void (*ReleaseTensorInfo)(ort::TensorInfo*);                                         // 99
    ort::Status* (*KernelContext_GetGPUComputeStream)(const ort::KernelContext*,
                                                      void** stream);                    // 193
    ort::Status* (*KernelInfo_GetInputCount)(const KernelInfo*, std::size_t* count);     // 230
    ort::Status* (*KernelInfoGetConstantInput_tensor)(const KernelInfo*, std::size_t, int* is,
                                                      const ort::Value**);               // 249
    ort::Status* (*KernelContext_GetResource)(const ort::KernelContext*, int version, int id,
                                              void** resource);                          // 265

    // False when this onnxruntime is not one we know; then only CreateStatus may be set.
    bool load(const ort::ApiBase& base);
};

// Throws std::runtime_error with onnxruntime's message when the status is a failure.
void check(const Api& api, ort::Status* status);

struct TensorShape {
    int type = 0;
    std::size_t rank = 0, elements = 1;
    std::int64_t sizes[16] = {};
};
TensorShape shape_of(const Api& api, const ort::Value* value);

// A tensor that the graph holds, or one with null data.
struct Constant {
    const void* data = nullptr;
    TensorShape shape;
};
Constant constant(const Api& api, const KernelInfo* info, std::size_t input);

}  // namespace cuda
}  // namespace elsa
