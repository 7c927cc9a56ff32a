// Loops whose sums must stay in registers.
#pragma once

#include <type_traits>
#include <utility>

// In front of a loop. gcc 12 may keep an array in memory all the same; `each_of` does not let it.
#if defined(__clang__)
#define ELSA_UNROLL _Pragma("unroll")
#elif defined(__GNUC__)
#define ELSA_UNROLL _Pragma("GCC unroll 8")
#else
#define ELSA_UNROLL
#endif

#if defined(__GNUC__) || defined(__clang__)
#define ELSA_INLINE inline __attribute__((always_inline))
#define ELSA_EACH __attribute__((always_inline))  // behind the parameters of a lambda
#else
#define ELSA_INLINE inline
#define ELSA_EACH
#endif

namespace elsa {
namespace {  // one copy for each file: files are compiled for different processors

template <class Work, int... i>
ELSA_INLINE void each_in(std::integer_sequence<int, i...>, const Work& work) {
    (work(std::integral_constant<int, i>{}), ...);
}

// work(0), work(1), ..., work(count - 1), each number known when compiled.
template <int count, class Work>
ELSA_INLINE void each_of(const Work& work) {
    each_in(std::make_integer_sequence<int, count>{}, work);
}

}  // namespace
}  // namespace elsa
