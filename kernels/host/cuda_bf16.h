// __nv_bfloat16 on the host: the upper half of a float, of which kernels use only the conversions from and to float.
#pragma once

#include <cstdint>
#include <cstring>

class __nv_bfloat16 {
   public:
    __nv_bfloat16() = default;

    explicit __nv_bfloat16(float value) {
        std::uint32_t word;
        std::memcpy(&word, &value, sizeof word);
        if ((word & 0x7fffffffu) > 0x7f800000u) {
            word |= 0x00400000u;  // NaN: quiet, so that a payload cut to zero does not turn it into infinity
        } else {
            // Add half of the last kept bit, less one where that bit is even; a carry runs up to infinity, as it should.
            word += 0x7fffu + (word >> 16 & 1u);
        }
        bits = static_cast<std::uint16_t>(word >> 16);
    }

    explicit operator float() const {
        const std::uint32_t word = static_cast<std::uint32_t>(bits) << 16;
        float value;
        std::memcpy(&value, &word, sizeof value);
        return value;
    }

   private:
    std::uint16_t bits;
};
