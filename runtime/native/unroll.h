// In front of a loop whose sums must stay in registers: gcc 12 may keep them in memory otherwise.
#pragma once

#if defined(__clang__)
#define ELSA_UNROLL _Pragma("unroll")
#elif defined(__GNUC__)
#define ELSA_UNROLL _Pragma("GCC unroll 8")
#else
#define ELSA_UNROLL
#endif
