// __half on the host: IEEE binary16, of which kernels use only the conversions from and to float.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

class __half {
   public:
    __half() = default;

    explicit __half(float value) {
        std::uint32_t word;
        std::memcpy(&word, &value, sizeof word);
        const std::uint32_t sign = word >> 16 & 0x8000u, magnitude = word & 0x7fffffffu;
        std::uint32_t rounded;
        if (magnitude > 0x7f800000u) {
            rounded = 0x7e00u | (magnitude >> 13 & 0x3ffu);  // NaN: quiet, with what fits of its payload
        } else if (magnitude >= 0x47800000u) {
            rounded = 0x7c00u;  // 65536 and more, infinity included
        } else if (magnitude >= 0x38800000u) {
            // Normal: add half of the last kept bit, less one where that bit is even; a carry runs into the exponent, as
            // it should, up to infinity. Then change the exponent's bias from 127 to 15.
            rounded = ((magnitude + 0xfffu + (magnitude >> 13 & 1u)) >> 13) - ((127u - 15u) << 10);
        } else {
            // Subnormal, a multiple of 2^-24: adding 0.5, whose last bit is worth 2^-24, rounds in hardware.
            float shifted;
            std::memcpy(&shifted, &magnitude, sizeof shifted);
            shifted += 0.5f;
            std::memcpy(&rounded, &shifted, sizeof rounded);
            rounded -= 0x3f000000u;  // the bits of 0.5
        }
        bits = static_cast<std::uint16_t>(sign | rounded);
    }

    explicit operator float() const {
        const std::uint32_t sign = (bits & 0x8000u) << 16, exponent = bits >> 10 & 0x1fu, fraction = bits & 0x3ffu;
        if (exponent == 0) {
            const float magnitude = std::ldexp(static_cast<float>(fraction), -24);
            return sign ? -magnitude : magnitude;
        }
        const std::uint32_t word = sign | (exponent == 0x1fu ? 0xffu : exponent + 127u - 15u) << 23 | fraction << 13;
        float value;
        std::memcpy(&value, &word, sizeof value);
        return value;
    }

   private:
    std::uint16_t bits;
};
