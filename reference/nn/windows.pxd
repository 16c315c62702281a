"""What the windows of a convolution see of one plane of x: gathered into columns, and its adjoint, which scatters them back."""

from cython cimport floating

from reference.nn.vectorised cimport VECTORISED


cdef struct Windows:
    Py_ssize_t height, width  # of the plane
    Py_ssize_t across  # windows side by side: the width of the result
    Py_ssize_t kh, kw, stride, top, left


cdef inline VECTORISED gather(
    const floating* x, floating* columns, Windows w, Py_ssize_t first, Py_ssize_t count, Py_ssize_t wide, Py_ssize_t apart
) noexcept nogil:
    """Write what the kh * kw taps see of x in `count` windows from `first` on, in row-major order; 0 where they see padding.

    columns is (panels, kh * kw, wide): a panel holds `wide` windows, and begins `apart` entries after the one before.
    """
    cdef Py_ssize_t at = 0, i, j, n, row, column, line, offset, length, start, stop
    cdef const floating* pixels
    cdef floating* seen
    while at < count:  # the windows that are neighbours in a row, and in a panel
        row, column = (first + at) // w.across, (first + at) % w.across
        length = min(w.across - column, count - at, wide - at % wide)
        for i in range(w.kh):
            line = row * w.stride + i - w.top
            for j in range(w.kw):
                seen = columns + at // wide * apart + (i * w.kw + j) * wide + at % wide
                if line < 0 or line >= w.height:
                    for n in range(length):
                        seen[n] = 0
                    continue
                offset = column * w.stride + j - w.left
                pixels = x + line * w.width + offset
                start = first_inside(offset, w.stride, length)
                stop = first_inside(offset - w.width, w.stride, length)
                for n in range(start):
                    seen[n] = 0
                if w.stride == 1:  # said apart, so that the compiler makes it a copy of adjacent memory
                    for n in range(start, stop):
                        seen[n] = pixels[n]
                else:
                    for n in range(start, stop):
                        seen[n] = pixels[n * w.stride]
                for n in range(stop, length):
                    seen[n] = 0
        at += length


cdef inline VECTORISED scatter(
    const floating* columns, floating* x, Windows w, Py_ssize_t first, Py_ssize_t count
) noexcept nogil:
    """Add every entry of columns (kh * kw, count) to the pixel of x that `gather` would read it from; padding is dropped."""
    cdef Py_ssize_t at = 0, i, j, n, row, column, line, offset, length
    cdef const floating* sent
    cdef floating* pixels
    while at < count:
        row, column = (first + at) // w.across, (first + at) % w.across
        length = min(w.across - column, count - at)
        for i in range(w.kh):
            line = row * w.stride + i - w.top
            if line < 0 or line >= w.height:
                continue
            for j in range(w.kw):
                sent = columns + (i * w.kw + j) * count + at
                offset = column * w.stride + j - w.left
                pixels = x + line * w.width + offset
                for n in range(first_inside(offset, w.stride, length), first_inside(offset - w.width, w.stride, length)):
                    pixels[n * w.stride] += sent[n]
        at += length


cdef inline Py_ssize_t first_inside(Py_ssize_t offset, Py_ssize_t stride, Py_ssize_t length) noexcept nogil:
    """Return the first n in [0, length] with n * stride + offset >= 0."""
    if offset >= 0:
        return 0
    return min((stride - 1 - offset) // stride, length)
