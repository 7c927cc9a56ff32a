#include "ort_custom_op.h"

#include <stdexcept>
#include <string>

#include "../ort_table.h"

namespace elsa {
namespace cuda {

bool Api::load(const ort::ApiBase& base) {
    const void* table = ort::find_table(base, *this);
    if (table == nullptr) return false;
    using ort::take;
    take(table, 2, GetErrorMessage);
    take(table, 26, CreateCustomOpDomain);
    take(table, 27, CustomOpDomain_Add);
    take(table, 28, AddCustomOpDomain);
    take(table, 51, GetTensorMutableData);
    take(table, 60, GetTensorElementType);
    take(table, 61, GetDimensionsCount);
    take(table, 62, GetDimensions);
    take(table, 65, GetTensorTypeAndShape);
    take(table, 86, KernelInfoGetAttribute_int64);
    take(table, 90, KernelContext_GetInput);
    take(table, 91, KernelContext_GetOutput);
    take(table, 93, ReleaseStatus);
    take(table, 99, ReleaseTensorInfo);
    take(table, 193, KernelContext_GetGPUComputeStream);
    take(table, 230, KernelInfo_GetInputCount);
    take(table, 249, KernelInfoGetConstantInput_tensor);
    take(table, 265, KernelContext_GetResource);
    return true;
}

void check(const Api& api, ort::Status* status) {
    if (status == nullptr) return;
    const std::string message = api.GetErrorMessage(status);
    api.ReleaseStatus(status);
    throw std::runtime_error(message);
}

TensorShape shape_of(const Api& api, const ort::Value* value) {
    ort::TensorInfo* info = nullptr;
    check(api, api.GetTensorTypeAndShape(value, &info));
    TensorShape shape;
    ort::Status* status = api.GetTensorElementType(info, &shape.type);
    if (status == nullptr) status = api.GetDimensionsCount(info, &shape.rank);
    if (status == nullptr && shape.rank <= 16) {
        status = api.GetDimensions(info, shape.sizes, shape.rank);
    }
    api.ReleaseTensorInfo(info);
    check(api, status);
    if (shape.rank > 16) throw std::runtime_error("a tensor of more than 16 dimensions");
    for (std::size_t i = 0; i < shape.rank; ++i) {
        shape.elements *= static_cast<std::size_t>(shape.sizes[i]);
    }
    return shape;
}

Constant constant(const Api& api, const KernelInfo* info, std::size_t input) {
    std::size_t count = 0;
    check(api, api.KernelInfo_GetInputCount(info, &count));
    if (input >= count) return {};
    int is = 0;
    const ort::Value* value = nullptr;
    check(api, api.KernelInfoGetConstantInput_tensor(info, input, &is, &value));
    if (is == 0 || value == nullptr) return {};
    Constant found;
    found.shape = shape_of(api, value);
    void* data = nullptr;
    check(api, api.GetTensorMutableData(const_cast<ort::Value*>(value), &data));
    found.data = data;
    return found;
}

}  // namespace cuda
}  // namespace elsa
