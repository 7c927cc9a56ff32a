// Work for several threads. The threads belong to the caller, onnxruntime for one.
#pragma once

#include <atomic>
#include <cstddef>
#include <new>

namespace elsa {

// Runs task(data, i) for i in [0, tasks), in any order and place, and returns when all are done.
struct Parallel {
    void* context = nullptr;
    void (*run)(void* context, std::size_t tasks, void (*task)(void* data, std::size_t index),
                void* data) = nullptr;  // null: one after the other
};

// A task that throws (memory ran out) is reported by the caller's thread: a pool's thread cannot.
template <class Task>
void for_each(const Parallel& parallel, std::size_t tasks, const Task& task) {
    if (parallel.run == nullptr || tasks < 2) {
        for (std::size_t i = 0; i < tasks; ++i) task(i);
        return;
    }
    struct Call {
        const Task& task;
        std::atomic<bool> failed{false};
    } call{task};
    const auto run = [](void* data, std::size_t i) {
        auto& each = *static_cast<Call*>(data);
        try {
            each.task(i);
        } catch (...) {
            each.failed = true;
        }
    };
    parallel.run(parallel.context, tasks, run, &call);
    if (call.failed) throw std::bad_alloc();
}

}  // namespace elsa
