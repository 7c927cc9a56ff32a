// onnxruntime's threads for our work: a second pool beside them made medians three times slower.
#pragma once

#include "graph_values.h"
#include "parallel.h"

namespace elsa {

struct Pool {
    const ort::Api& api;
    const ort::KernelContext* context;

    // Valid as long as this.
    Parallel parallel() {
        return {this, [](void* self, std::size_t tasks, void (*task)(void*, std::size_t),
                         void* data) {
                    const Pool& pool = *static_cast<Pool*>(self);
                    check(pool.api, pool.api.ParallelFor(pool.context, task, tasks, 0, data));
                }};
    }
};

}  // namespace elsa
