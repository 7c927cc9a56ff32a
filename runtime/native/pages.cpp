#include "pages.h"

#include <algorithm>
#include <cstring>
#include <mutex>
#include <new>

#include "packed.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace elsa {

#if defined(__linux__)
namespace {

constexpr std::size_t kRegion = std::size_t{16} << 20;  // and what its address is a multiple of

// At the start of a region.
struct Region {
    std::size_t size, used, users;
};

std::mutex mutex;
Region* open_region = nullptr;  // new weights go here while there is room

Region* map_region(std::size_t size) {
    const std::size_t reserved = size + kRegion;
    void* mapped = mmap(nullptr, reserved, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) throw std::bad_alloc();
    const auto start = reinterpret_cast<std::uintptr_t>(mapped);
    const std::uintptr_t base = (start + kRegion - 1) / kRegion * kRegion;
    if (base > start) munmap(mapped, base - start);
    const std::uintptr_t end = start + reserved, wanted = base + size;
    if (end > wanted) munmap(reinterpret_cast<void*>(wanted), end - wanted);
    void* at = reinterpret_cast<void*>(base);
    madvise(at, size, MADV_HUGEPAGE);  // a wish: without it everything works, more slowly
    return new (at) Region{size, kAlign, 0};
}

}  // namespace

std::uint8_t* allocate_pages(std::size_t bytes) {
    const std::size_t wanted = round_up(std::max<std::size_t>(bytes, 1), kAlign);
    const std::lock_guard<std::mutex> lock(mutex);
    Region* region = open_region;
    if (region == nullptr || region->size - region->used < wanted) {
        region = map_region(std::max(kRegion, round_up(wanted + kAlign, 4096)));
        if (region->size == kRegion) open_region = region;
    }
    auto* memory = reinterpret_cast<std::uint8_t*>(region) + region->used;
    region->used += wanted;
    ++region->users;
    return memory;
}

void free_pages(std::uint8_t* memory) {
    if (memory == nullptr) return;
    const std::lock_guard<std::mutex> lock(mutex);
    // Every weight starts within the first 16 MiB of its region.
    auto* region = reinterpret_cast<Region*>(reinterpret_cast<std::uintptr_t>(memory) / kRegion * kRegion);
    if (--region->users > 0) return;
    if (open_region == region) open_region = nullptr;
    munmap(region, region->size);
}

#else

std::uint8_t* allocate_pages(std::size_t bytes) {
    const std::size_t whole = round_up(std::max<std::size_t>(bytes, 1), kAlign);
    auto* memory = static_cast<std::uint8_t*>(::operator new[](whole, std::align_val_t{kAlign}));
    std::memset(memory, 0, whole);
    return memory;
}

void free_pages(std::uint8_t* memory) { ::operator delete[](memory, std::align_val_t{kAlign}); }

#endif

}  // namespace elsa
