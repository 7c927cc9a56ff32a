#include "ort_table.h"

namespace elsa {
namespace ort {

bool Api::load(const ApiBase& base) {
    const void* table = find_table(base, *this);
    if (table == nullptr) return false;
    take(table, 2, GetErrorMessage);
    take(table, 51, GetTensorMutableData);
    take(table, 55, CastTypeInfoToTensorInfo);
    take(table, 60, GetTensorElementType);
    take(table, 61, GetDimensionsCount);
    take(table, 62, GetDimensions);
    take(table, 65, GetTensorTypeAndShape);
    take(table, 90, KernelContext_GetInput);
    take(table, 91, KernelContext_GetOutput);
    take(table, 93, ReleaseStatus);
    take(table, 99, ReleaseTensorInfo);
    take(table, 237, HasSessionConfigEntry);
    take(table, 238, GetSessionConfigEntry);
    take(table, 272, ReadOpAttr);
    take(table, 274, ParallelFor);
    take(table, 289, GetValueInfoName);
    take(table, 290, GetValueInfoTypeInfo);
    take(table, 307, HardwareDevice_Type);
    take(table, 317, GetEpApi);
    take(table, 323, ValueInfo_GetValueProducer);
    take(table, 324, ValueInfo_GetValueNumConsumers);
    take(table, 326, ValueInfo_GetInitializerValue);
    take(table, 330, ValueInfo_IsGraphOutput);
    take(table, 331, ValueInfo_IsConstantInitializer);
    take(table, 338, Graph_GetNumInputs);
    take(table, 339, Graph_GetInputs);
    take(table, 340, Graph_GetNumOutputs);
    take(table, 341, Graph_GetOutputs);
    take(table, 344, Graph_GetNumNodes);
    take(table, 345, Graph_GetNodes);
    take(table, 349, Node_GetName);
    take(table, 350, Node_GetOperatorType);
    take(table, 351, Node_GetDomain);
    take(table, 353, Node_GetNumInputs);
    take(table, 354, Node_GetInputs);
    take(table, 355, Node_GetNumOutputs);
    take(table, 356, Node_GetOutputs);
    take(table, 361, Node_GetAttributeByName);
    const void* ep = GetEpApi();
    if (ep == nullptr) return false;
    take(ep, 0, CreateEpDevice);
    take(ep, 2, AddNodesToFuse);
    return true;
}

}  // namespace ort
}  // namespace elsa
