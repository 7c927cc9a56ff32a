#include "cublas.h"

#include <climits>
#include <stdexcept>
#include <string>

#if defined(__CUDACC__)
#include <dlfcn.h>
#endif

namespace elsa {
namespace cuda {
namespace {

// Numbers of cublas_api.h and library_types.h, which keep them from version to version.
constexpr int kNotTransposed = 0, kTransposed = 1, kComputeF32 = 68, kDefaultAlgorithm = -1;
constexpr int type_number(Element element) {
    return element == Element::f32 ? 0 : element == Element::f16 ? 2 : 14;
}

using GemmEx = int (*)(void* handle, int transposed_a, int transposed_b, int m, int n, int k,
                       const void* alpha, const void* a, int a_type, int a_stride, const void* b,
                       int b_type, int b_stride, const void* beta, void* c, int c_type,
                       int c_stride, int compute_type, int algorithm);

GemmEx find() {
#if defined(__CUDACC__)
    for (const char* name : {"libcublas.so.13", "libcublas.so.12"}) {
        void* const library = dlopen(name, RTLD_LAZY | RTLD_NOLOAD);
        if (library == nullptr) continue;
        if (void* const found = dlsym(library, "cublasGemmEx")) {
            return reinterpret_cast<GemmEx>(found);
        }
    }
#endif
    return nullptr;
}

GemmEx gemm() {
    static const GemmEx found = find();
    return found;
}

}  // namespace

bool has_cublas() { return gemm() != nullptr; }

// Column-major, as cuBLAS has it: y (rows, tokens) = dense (columns, rows)^T x (columns, tokens).
void multiply_by_cublas(void* handle, const DenseCall& call, bool adds) {
    if (call.tokens > INT_MAX || call.stride > INT_MAX || call.columns > INT_MAX) {
        throw std::runtime_error("a product larger than cuBLAS takes");
    }
    const int rows = static_cast<int>(call.rows), tokens = static_cast<int>(call.tokens);
    const int columns = static_cast<int>(call.columns), stride = static_cast<int>(call.stride);
    const int type = type_number(call.element);
    const float one = 1.0f, beta = adds ? 1.0f : 0.0f;
    const int failed =
        gemm()(handle, kTransposed, kNotTransposed, rows, tokens, columns, &one, call.dense, type,
               columns, call.x, type, columns, &beta, call.y, type, stride, kComputeF32,
               kDefaultAlgorithm);
    if (failed != 0) throw std::runtime_error("cuBLAS fails with status " + std::to_string(failed));
}

}  // namespace cuda
}  // namespace elsa
