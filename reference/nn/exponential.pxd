"""exp of what is not positive, as arithmetic without a branch or a table, so that the compiler vectorises the loops that call it.

    exp(x) = 2^k exp(r),  k = x / ln 2 rounded,  |r| <= ln 2 / 2

r = x - k ln 2 takes ln 2 in two parts: k times the first, which has zeros for its last bits, is exact. exp(r) is the polynomial
that interpolates it at the Chebyshev nodes of the interval; its relative error is 2.5e-9 in float32 (degree 6) and 4.2e-18 in
float64 (degree 11), well under one rounding, and the result errs by less than 3 roundings. A test computes the coefficients afresh.

2^k is written into the exponent bits, made larger than it is by a power that the last product takes away again: so results that are
subnormal or 0 come out as they should. NaN yields NaN; what a positive number yields is not defined.
"""

from libc.stdint cimport uint32_t, uint64_t
from cython cimport floating


cdef union Bits32:
    float value
    uint32_t bits


cdef union Bits64:
    double value
    uint64_t bits


cdef inline float _exp32(float x) noexcept nogil:
    cdef Bits32 whole, power
    cdef float k, r, y
    x = -104.0 if x < -104.0 else x  # rounds to 0
    # Adding 1.5 * 2^23 pushes the fraction out: the sum's last bits are k as a whole number.
    whole.value = x * <float>1.44269504088896341 + <float>12582912.0
    k = whole.value - <float>12582912.0
    r = (x - k * <float>0.693145751953125) - k * <float>1.42860682030941723e-6
    y = <float>0.0013941108433972674
    y = y * r + <float>0.008375126398153335
    y = y * r + <float>0.04166635289677516
    y = y * r + <float>0.16666415514653274
    y = y * r + <float>0.5000000047117757
    y = y * r + <float>1.0000000377162137
    y = y * r + <float>1.0
    power.bits = (whole.bits - <uint32_t>0x4B400000 + 127 + 64) << 23  # 2^(k + 64), as the bias of the exponent is 127
    return y * power.value * <float>5.421010862427522e-20


cdef inline double _exp64(double x) noexcept nogil:
    cdef Bits64 whole, power
    cdef double k, r, y
    x = -746.0 if x < -746.0 else x
    whole.value = x * 1.4426950408889634 + 6755399441055744.0
    k = whole.value - 6755399441055744.0
    r = (x - k * 0.69314718036912382) - k * 1.9082149292705877e-10
    y = 2.5110037605963777e-08
    y = y * r + 2.763263963904103e-07
    y = y * r + 2.755724091857897e-06
    y = y * r + 2.480148548232849e-05
    y = y * r + 0.00019841269890047113
    y = y * r + 0.0013888888952314775
    y = y * r + 0.008333333333319601
    y = y * r + 0.04166666666648809
    y = y * r + 0.1666666666666668
    y = y * r + 0.5000000000000019
    y = y * r + 1.0
    y = y * r + 1.0
    power.bits = (whole.bits - <uint64_t>0x4338000000000000 + 1023 + 512) << 52  # 2^(k + 512)
    return y * power.value * 7.458340731200207e-155


cdef inline floating exponential(floating x) noexcept nogil:
    """Return exp(x), x <= 0 or NaN."""
    if floating is float:
        return _exp32(x)
    else:
        return _exp64(x)
