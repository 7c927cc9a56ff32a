// In front of a loop whose sums must stay in registers: left to itself, gcc 12 keeps them in memory.
#pragma once

#if defined(__clang__)
#define ELSA_UNROLL _Pragma("unroll")
#elif defined(__GNUC__)
#define ELSA_UNROLL _Pragma("GCC unroll 8")
#else
#define ELSA_UNROLL
#endif
