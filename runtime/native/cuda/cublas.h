// The dense product of the cuBLAS that onnxruntime has loaded; nothing is linked.
#pragma once

#include "product.h"

namespace elsa {
namespace cuda {

// Whether there is one; then `multiply_by_cublas` may be called.
bool has_cublas();

// handle: cublasHandle_t on the stream of the product.
void multiply_by_cublas(void* handle, const DenseCall& call, bool adds);

}  // namespace cuda
}  // namespace elsa
