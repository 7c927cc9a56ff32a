#include "emulation.h"

#include <ucontext.h>

#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <stdexcept>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace elsa {
namespace cuda {
namespace emulation {

thread_local Index threadIdx, blockIdx, blockDim, gridDim;

namespace {

constexpr std::size_t kStackBytes = 128 * 1024;

struct Fibre {
    ucontext_t context{};
    std::unique_ptr<unsigned char[]> stack{new unsigned char[kStackBytes]};
    bool done = false;
};

struct Block {
    std::vector<Fibre> fibres;
    ucontext_t scheduler{};
    const void* scheduler_stack = nullptr;
    std::size_t scheduler_stack_bytes = 0;
    std::unique_ptr<unsigned char[]> shared;
    const std::function<void()>* kernel = nullptr;
    std::exception_ptr failure;
};

thread_local Block* block = nullptr;

// The address sanitizer wants to be told which stack is in use.
void leaving(void** fake, const void* bottom, std::size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(fake, bottom, bytes);
#else
    (void)fake, (void)bottom, (void)bytes;
#endif
}

void arrived(void* fake, const void** bottom, std::size_t* bytes) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake, bottom, bytes);
#else
    (void)fake, (void)bottom, (void)bytes;
#endif
}

void to_scheduler(bool last) {
    Fibre& self = block->fibres[threadIdx.x];
    void* fake = nullptr;
    // Null says that this stack is not used again.
    leaving(last ? nullptr : &fake, block->scheduler_stack, block->scheduler_stack_bytes);
    swapcontext(&self.context, &block->scheduler);
    arrived(fake, nullptr, nullptr);
}

void enter() {
    arrived(nullptr, &block->scheduler_stack, &block->scheduler_stack_bytes);
    try {
        (*block->kernel)();
    } catch (...) {
        block->failure = std::current_exception();
    }
    block->fibres[threadIdx.x].done = true;
    to_scheduler(true);
}

void resume(unsigned thread) {
    Fibre& fibre = block->fibres[thread];
    threadIdx.x = thread;
    void* fake = nullptr;
    leaving(&fake, fibre.stack.get(), kStackBytes);
    swapcontext(&block->scheduler, &fibre.context);
    arrived(fake, nullptr, nullptr);
}

void run_block(Block& state, std::size_t shared_bytes, Order order) {
    const unsigned threads = blockDim.x;
    state.shared.reset(new unsigned char[shared_bytes]);
    std::memset(state.shared.get(), 0xff, shared_bytes);
    for (Fibre& fibre : state.fibres) {
        fibre.done = false;
        getcontext(&fibre.context);
        fibre.context.uc_stack.ss_sp = fibre.stack.get();
        fibre.context.uc_stack.ss_size = kStackBytes;
        fibre.context.uc_link = nullptr;
        makecontext(&fibre.context, enter, 0);
    }
    for (unsigned left = threads; left > 0;) {
        unsigned ended = 0;
        for (unsigned i = 0; i < threads; ++i) {
            const unsigned thread = order == Order::forward ? i : threads - 1 - i;
            if (!state.fibres[thread].done) resume(thread);
            ended += state.fibres[thread].done ? 1 : 0;
        }
        if (state.failure) std::rethrow_exception(state.failure);
        if (ended != 0 && ended != threads) {
            throw std::logic_error("a thread left while others of its block wait");
        }
        left = threads - ended;
    }
}

}  // namespace

void run(Index grid, unsigned threads, std::size_t shared_bytes, Order order,
         const std::function<void()>& kernel) {
    Block state;
    state.fibres = std::vector<Fibre>(threads);
    state.kernel = &kernel;
    block = &state;
    gridDim = grid;
    blockDim = {threads, 1, 1};
    const unsigned blocks = grid.x * grid.y;
    for (unsigned i = 0; i < blocks; ++i) {
        const unsigned at = order == Order::forward ? i : blocks - 1 - i;
        blockIdx = {at % grid.x, at / grid.x, 0};
        run_block(state, shared_bytes, order);
    }
    block = nullptr;
}

unsigned char* shared_memory() { return block->shared.get(); }

void wait() { to_scheduler(false); }

}  // namespace emulation
}  // namespace cuda
}  // namespace elsa
