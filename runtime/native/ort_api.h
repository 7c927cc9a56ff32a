// The part of onnxruntime's C interface that the plugin uses, declared by us: slots of a table of
// functions that is only appended to, and the structures of version 1.23, which later ones extend.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace elsa {
namespace ort {

constexpr std::uint32_t kApiVersion = 23;

// Opaque to us.
struct Status;
struct Value;
struct TensorInfo;
struct TypeInfo;
struct OpAttr;
struct Graph;
struct Node;
struct ValueInfo;
struct KernelContext;
struct SessionOptions;
struct Logger;
struct HardwareDevice;
struct KeyValuePairs;
struct EpDevice;
struct GraphSupportInfo;
struct ComputeContext;

enum ErrorCode : int { kFail = 1, kInvalidArgument = 2, kNotImplemented = 9, kEpFail = 11 };
enum ElementType : int {
    kFloat = 1,
    kUint8 = 2,
    kInt8 = 3,
    kInt32 = 6,
    kInt64 = 7,
    kBool = 9,
    kFloat16 = 10,
    kBfloat16 = 16
};
enum AttrType : int { kAttrInt = 1, kAttrInts = 2, kAttrFloat = 3, kAttrString = 5 };
constexpr int kDeviceCpu = 0;

struct ApiBase {
    const void* (*GetApi)(std::uint32_t version);
    const char* (*GetVersionString)();
};

struct NodeFusionOptions {
    std::uint32_t version;
    bool drop_constant_initializers;
};

struct NodeComputeInfo {
    std::uint32_t version;
    Status* (*CreateState)(NodeComputeInfo*, ComputeContext*, void** state);
    Status* (*Compute)(NodeComputeInfo*, void* state, KernelContext*);
    void (*ReleaseState)(NodeComputeInfo*, void* state);
};

// Members that are null are optional. Those of later versions are not read: `version` says 23.
struct Ep {
    std::uint32_t version;
    const char* (*GetName)(const Ep*);
    Status* (*GetCapability)(Ep*, const Graph*, GraphSupportInfo*);
    Status* (*Compile)(Ep*, const Graph** graphs, const Node** fused, std::size_t count,
                       NodeComputeInfo** infos, Node** context_nodes);
    void (*ReleaseNodeComputeInfos)(Ep*, NodeComputeInfo** infos, std::size_t count);
    void* optional[8];
};

struct EpFactory {
    std::uint32_t version;
    const char* (*GetName)(const EpFactory*);
    const char* (*GetVendor)(const EpFactory*);
    Status* (*GetSupportedDevices)(EpFactory*, const HardwareDevice* const* devices,
                                   std::size_t count, EpDevice** made, std::size_t most,
                                   std::size_t* made_count);
    Status* (*CreateEp)(EpFactory*, const HardwareDevice* const* devices,
                        const KeyValuePairs* const* metadata, std::size_t count,
                        const SessionOptions*, const Logger*, Ep** made);
    void (*ReleaseEp)(EpFactory*, Ep*);
    std::uint32_t (*GetVendorId)(const EpFactory*);
    const char* (*GetVersion)(const EpFactory*);
    Status* (*ValidateCompiledModel)(EpFactory*, const HardwareDevice* const* devices,
                                     std::size_t count, const char* info, int* compatibility);
    Status* (*CreateAllocator)(EpFactory*, const void* memory_info, const KeyValuePairs* options,
                               void** allocator);
    void (*ReleaseAllocator)(EpFactory*, void* allocator);
    Status* (*CreateDataTransfer)(EpFactory*, void** transfer);
    bool (*IsStreamAware)(const EpFactory*);
    Status* (*CreateSyncStreamForDevice)(EpFactory*, const void* memory_device,
                                         const KeyValuePairs* options, void** stream);
    void* later[8];
};

// The functions, by their slot.
struct Api {
    Status* (*CreateStatus)(ErrorCode, const char* message);                            // 0
    const char* (*GetErrorMessage)(const Status*);                                      // 2
    Status* (*GetTensorMutableData)(Value*, void** data);                               // 51
    Status* (*CastTypeInfoToTensorInfo)(const TypeInfo*, const TensorInfo**);           // 55
    Status* (*GetTensorElementType)(const TensorInfo*, int* type);                      // 60
    Status* (*GetDimensionsCount)(const TensorInfo*, std::size_t* count);               // 61
    Status* (*GetDimensions)(const TensorInfo*, std::int64_t* sizes, std::size_t);      // 62
    Status* (*GetTensorTypeAndShape)(const Value*, TensorInfo** made);                  // 65
    Status* (*KernelContext_GetInput)(const KernelContext*, std::size_t, const Value**);  // 90
    Status* (*KernelContext_GetOutput)(KernelContext*, std::size_t, const std::int64_t* sizes,
                                       std::size_t count, Value**);                     // 91
    void (*ReleaseStatus)(Status*);                                                     // 93
    void (*ReleaseTensorInfo)(TensorInfo*);                                             // 99
    Status* (*HasSessionConfigEntry)(const SessionOptions*, const char* key, int* there);  // 237
    Status* (*GetSessionConfigEntry)(const SessionOptions*, const char* key, char* value,
                                     std::size_t* size);                                // 238
    Status* (*ReadOpAttr)(const OpAttr*, AttrType, void* data, std::size_t size,
                          std::size_t* written);                                        // 272
    Status* (*ParallelFor)(const KernelContext*, void (*task)(void*, std::size_t),
                           std::size_t total, std::size_t batches, void* data);         // 274
    Status* (*GetValueInfoName)(const ValueInfo*, const char** name);                   // 289
    Status* (*GetValueInfoTypeInfo)(const ValueInfo*, const TypeInfo**);                // 290
    int (*HardwareDevice_Type)(const HardwareDevice*);                                  // 307
    const void* (*GetEpApi)();                                                          // 317
    Status* (*ValueInfo_GetValueProducer)(const ValueInfo*, const Node**, std::size_t*);  // 323
    Status* (*ValueInfo_GetValueNumConsumers)(const ValueInfo*, std::size_t*);          // 324
    Status* (*ValueInfo_GetInitializerValue)(const ValueInfo*, const Value**);          // 326
    Status* (*ValueInfo_IsGraphOutput)(const ValueInfo*, bool*);                        // 330
    Status* (*ValueInfo_IsConstantInitializer)(const ValueInfo*, bool*);                // 331
    Status* (*Graph_GetNumInputs)(const Graph*, std::size_t*);                          // 338
    Status* (*Graph_GetInputs)(const Graph*, const ValueInfo**, std::size_t);           // 339
    Status* (*Graph_GetNumOutputs)(const Graph*, std::size_t*);                         // 340
    Status* (*Graph_GetOutputs)(const Graph*, const ValueInfo**, std::size_t);          // 341
    Status* (*Graph_GetNumNodes)(const Graph*, std::size_t*);                           // 344
    Status* (*Graph_GetNodes)(const Graph*, const Node**, std::size_t);                 // 345
    Status* (*Node_GetName)(const Node*, const char**);                                 // 349
    Status* (*Node_GetOperatorType)(const Node*, const char**);                         // 350
    Status* (*Node_GetDomain)(const Node*, const char**);                               // 351
    Status* (*Node_GetNumInputs)(const Node*, std::size_t*);                            // 353
    Status* (*Node_GetInputs)(const Node*, const ValueInfo**, std::size_t);             // 354
    Status* (*Node_GetNumOutputs)(const Node*, std::size_t*);                           // 355
    Status* (*Node_GetOutputs)(const Node*, const ValueInfo**, std::size_t);            // 356
    Status* (*Node_GetAttributeByName)(const Node*, const char*, const OpAttr**);       // 361
    // OrtEpApi
    Status* (*CreateEpDevice)(EpFactory*, const HardwareDevice*, const KeyValuePairs* metadata,
                              const KeyValuePairs* options, EpDevice** made);           // 0
    Status* (*AddNodesToFuse)(GraphSupportInfo*, const Node* const*, std::size_t,
                              const NodeFusionOptions*);                                // 2

    // False when this onnxruntime is not one we know; then only CreateStatus may be set.
    bool load(const ApiBase& base);
};

}  // namespace ort
}  // namespace elsa
