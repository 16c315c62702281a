// Tensor cores, and what feeds them: a product of two small matrices by the 32 lanes of a warp, the loads that lay its operands
// out, and copies to shared memory that go on while the warp computes.
//
// On a GPU these are PTX instructions. On the host they are twins of the same layouts, built on the emulation's meetings; what
// each lane holds is that of the PTX ISA, "Matrix fragments for mma.m16n8k16 with floating point type". With
// g = lane / 4 and t = lane % 4, two elements of T to each unsigned, the left one in its lower half:
//
//     A (16 x 16)  a[0] = A[g][2t, 2t+1]     a[1] = A[g+8][2t, ...]     a[2] = A[g][2t+8, ...]     a[3] = A[g+8][2t+8, ...]
//     B (16 x 8)   b0 = B[2t, 2t+1][g]       b1 = B[2t+8, 2t+9][g]
//     C (16 x 8)   c[0], c[1] = C[g][2t, 2t+1]     c[2], c[3] = C[g+8][2t, 2t+1]
#pragma once

#include "element.cuh"

// 16 bytes of elements: one access to memory, aligned to as much.
template <typename T>
struct __align__(16) Chunk {
    T values[16 / sizeof(T)];
};

#ifdef __CUDACC__

__device__ inline unsigned shared_address(const void* pointer) {
    return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

template <typename T>
__device__ unsigned pack(float left, float right);

template <>
__device__ inline unsigned pack<__half>(float left, float right) {
    const __half2 pair = __floats2half2_rn(left, right);
    return *reinterpret_cast<const unsigned*>(&pair);
}

template <>
__device__ inline unsigned pack<__nv_bfloat16>(float left, float right) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(left, right);
    return *reinterpret_cast<const unsigned*>(&pair);
}

// c += A B. Before sm_80 a tensor core takes 8 columns of A at a time, whose fragments are the halves of those of 16.
template <typename T>
__device__ void multiply_add(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1);

template <>
__device__ inline void multiply_add<__half>(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
#if __CUDA_ARCH__ >= 800
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(b0));
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[2]), "r"(a[3]), "r"(b1));
#endif
}

template <>
__device__ inline void multiply_add<__nv_bfloat16>(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four 8 x 8 matrices from shared memory. Lane l names row l % 8 of matrix l / 8 (16 bytes, aligned), and receives of matrix i,
// in r[i], the elements [g][2t, 2t+1]: as A and C are laid out.
template <typename T>
__device__ void load_matrices(unsigned (&r)[4], const T* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// The same, each matrix transposed on the way: r[i] receives [2t, 2t+1][g], as B is laid out.
template <typename T>
__device__ void load_matrices_transposed(unsigned (&r)[4], const T* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// Copies of 16 bytes from global to shared memory by this thread, which arrive some time before `wait` returns. Other threads
// see them after a barrier that follows. Before sm_80, which brought them, they arrive at once.
class AsyncCopies {
   public:
    // Zeros where `exists` is false; `from` is not read then, but has to be an address in global memory.
    __device__ void copy(void* to, const void* from, bool exists) {
#if __CUDA_ARCH__ >= 800
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                     :
                     : "r"(shared_address(to)), "l"(__cvta_generic_to_global(from)), "r"(exists ? 16 : 0)
                     : "memory");
#else
        *static_cast<uint4*>(to) = exists ? *static_cast<const uint4*>(from) : make_uint4(0, 0, 0, 0);
#endif
    }

    __device__ void wait() {
#if __CUDA_ARCH__ >= 800
        asm volatile("cp.async.wait_all;" : : : "memory");
#endif
    }
};

#else

template <typename T>
unsigned pack(float left, float right) {
    const T pair[2] = {static_cast<T>(left), static_cast<T>(right)};
    unsigned packed;
    std::memcpy(&packed, pair, sizeof packed);
    return packed;
}

namespace emulation {

// What a lane brings to a product; it takes its c away.
struct Fragments {
    unsigned a[4], b[2];
    float c[4];
};

template <typename T>
float element(const unsigned* fragment, unsigned index) {
    T value;
    std::memcpy(&value, reinterpret_cast<const unsigned char*>(fragment) + index * sizeof(T), sizeof value);
    return static_cast<float>(value);
}

template <typename T>
void multiply_add(Fiber* const* lanes, unsigned) {
    float a[16][16], b[16][8];
    Fragments held[WARP];
    for (unsigned lane = 0; lane < WARP; ++lane) {
        std::memcpy(&held[lane], lanes[lane]->brought, sizeof held[lane]);
        const unsigned g = lane / 4, t = lane % 4;
        for (unsigned i = 0; i < 8; ++i) a[g + i / 2 % 2 * 8][2 * t + i % 2 + i / 4 * 8] = element<T>(held[lane].a, i);
        for (unsigned i = 0; i < 4; ++i) b[2 * t + i % 2 + i / 2 * 8][g] = element<T>(held[lane].b, i);
    }
    for (unsigned lane = 0; lane < WARP; ++lane) {
        for (unsigned i = 0; i < 4; ++i) {
            const unsigned row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
            for (unsigned k = 0; k < 16; ++k) held[lane].c[i] += a[row][k] * b[k][column];
        }
        std::memcpy(lanes[lane]->taken, held[lane].c, sizeof held[lane].c);
    }
}

template <bool TRANSPOSED>
void distribute(Fiber* const* lanes, unsigned) {
    for (unsigned lane = 0; lane < WARP; ++lane) {
        for (unsigned matrix = 0; matrix < 4; ++matrix) {
            for (unsigned i = 0; i < 2; ++i) {
                const unsigned row = TRANSPOSED ? lane % 4 * 2 + i : lane / 4, column = TRANSPOSED ? lane / 4 : lane % 4 * 2 + i;
                std::memcpy(lanes[lane]->taken + 4 * matrix + 2 * i, lanes[8 * matrix + row]->brought + 2 * column, 2);
            }
        }
    }
}

// The row is read by the lane that names it, where races and the sanitizers see it.
template <typename T>
void load(const char* kind, unsigned (&r)[4], const T* row, Meeting meeting) {
    const Chunk<T> values = *reinterpret_cast<const Chunk<T>*>(row);
    const Outside outside;
    Fiber& self = fibers[current];
    std::memcpy(self.brought, &values, sizeof values);
    meet(kind, 0xffffffffu, meeting);
    std::memcpy(r, self.taken, sizeof r);
}

}  // namespace emulation

template <typename T>
void multiply_add(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    const emulation::Outside outside;
    emulation::Fiber& self = emulation::fibers[emulation::current];
    const emulation::Fragments mine{{a[0], a[1], a[2], a[3]}, {b0, b1}, {c[0], c[1], c[2], c[3]}};
    static_assert(sizeof mine <= emulation::PAYLOAD, "what a lane brings");
    std::memcpy(self.brought, &mine, sizeof mine);
    emulation::meet("mma.m16n8k16", 0xffffffffu, emulation::multiply_add<T>);
    std::memcpy(c, self.taken, sizeof c);
}

template <typename T>
void load_matrices(unsigned (&r)[4], const T* row) {
    emulation::load("ldmatrix", r, row, emulation::distribute<false>);
}

template <typename T>
void load_matrices_transposed(unsigned (&r)[4], const T* row) {
    emulation::load("ldmatrix.trans", r, row, emulation::distribute<true>);
}

// A copy arrives as late as it may, at `wait`. Until then there is NaN, so that reading too early, and asking for a copy while
// others still read what was there, are both seen.
class AsyncCopies {
   public:
    void copy(void* to, const void* from, bool exists) {
        using Bytes = Chunk<unsigned char>;
        Bytes nan;
        std::memset(&nan, 0xff, sizeof nan);
        *static_cast<Bytes*>(to) = nan;
        if (count == CAPACITY) return emulation::fail("a thread has more copies on their way than AsyncCopies holds");
        copies[count++] = {static_cast<Bytes*>(to), exists ? static_cast<const Bytes*>(from) : nullptr};
    }

    void wait() {
        for (unsigned k = 0; k < count; ++k)
            *copies[k].to = copies[k].from == nullptr ? Chunk<unsigned char>{} : *copies[k].from;
        count = 0;
    }

   private:
    static constexpr unsigned CAPACITY = 64;
    struct {
        Chunk<unsigned char>* to;
        const Chunk<unsigned char>* from;
    } copies[CAPACITY];
    unsigned count = 0;
};

#endif
