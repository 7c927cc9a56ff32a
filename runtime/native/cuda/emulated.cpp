// The CUDA files as a host compiler sees them: kernels, memory and operator, emulated.
#include "cublas.cu"
#include "device.cu"
#include "packed_matmul.cu"
#include "product.cu"
#include "scratch.cu"
