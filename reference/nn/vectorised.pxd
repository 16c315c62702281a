"""The return type `VECTORISED`: void, and the function is compiled for several instruction sets; the best is taken at run time.

A wheel runs on any machine of its kind, so the compiler is told of none in particular. `cdef VECTORISED row(...) noexcept
nogil` is compiled three times where GCC and glibc can choose between the copies when the library is loaded: for x86-64 with
AVX-512, with AVX2 and as such. Elsewhere it is void. A `prange` stands in an outer, plain function that calls such inner ones:
the compiler does not copy the body of a parallel loop.
"""

cdef extern from *:
    """
    #if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
    #define VECTORISED __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default"))) void
    #define has_avx512() (__builtin_cpu_supports("avx512f") != 0)
    #else
    #define VECTORISED void
    #define has_avx512() 0
    #endif
    """
    ctypedef void VECTORISED
    bint has_avx512() nogil  # whether the copy for AVX-512 is the one taken
