# cython: boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Compiled twin of conv2d.py: the same three maps, each as products of matrices.

Column n of the matrix `columns` (C * kh * kw, positions) lists all that the kernel sees of one image at output position n. With
it

    correlate                  y       = weight columns
    correlate_adjoint_weight   dweight = sum over blocks of dy columns^T
    correlate_adjoint_x        columns = weight^T dy, and every entry is added back to the pixel it came from

where weight is (O, C * kh * kw), dy (O, positions). The whole matrix of an image would be kh * kw times the size of the image,
so it is made for a few positions at a time. Two cases need none:

    a 1x1 kernel at stride 1   the columns are x itself
    a 3x3 kernel at stride 1   Winograd's way has fewer products (winograd_cython.pyx); the adjoint in x is such a correlation
                               too, of dy with the kernel turned by 180 degrees and its channels exchanged

The loops, and the products of `correlate`, run on as many threads as OpenMP is told to (OMP_NUM_THREADS), the adjoints'
products on those of NumPy's library. What `correlate` returns does not depend on their number: tasks share nothing, and are cut
alike.
"""

import numpy as np

from cython cimport floating
from cython.parallel cimport prange, threadid

from reference.nn import matmul_cython, winograd_cython
from reference.nn.product cimport ROWS, WIDTH, aligned, multiply, omp_get_max_threads
from reference.nn.vectorised cimport VECTORISED
from reference.nn.windows cimport Windows, gather, scatter

from reference.nn.memory import empty, workspace

cdef enum:
    TERMS = 512  # rows of columns, PANELS * WIDTH wide, that stay in the second-level cache between filling and multiplying
    PANELS = 8
    TASKS = 16  # at least, where there is work enough, so that they share out evenly

_BLOCK = 1 << 21  # entries of columns at a time in the adjoints
_FEW = 4 * PANELS * WIDTH  # positions that are too few to share out
_WORTH = 1000  # positions from which Winograd's fewer products outweigh the transformation of the weight


def correlate(x, weight, bias, stride, padding, out):
    """Return y (B, O, *out) of x (B, C, H, W), weight (O, C, kh, kw) and bias (O,) or None."""
    if _is_winograds(weight.shape[2:], stride, len(x), out):
        return winograd_cython.correlate(x, weight, bias, padding, out)
    outputs, terms, taps = len(weight), weight[0].size, weight[0, 0].size
    if out[0] * out[1] <= _FEW:
        return _correlate_whole(np.ascontiguousarray(x), weight.reshape(outputs, terms), bias, weight.shape[2:], stride, padding, out)
    y = empty((len(x), outputs, *out), x.dtype)
    bias = np.zeros(outputs, x.dtype) if bias is None else bias
    panels = (outputs + ROWS - 1) // ROWS
    packed = workspace("conv2d.packed", panels * terms * ROWS, x.dtype)[: panels * terms * ROWS].reshape(panels, terms, ROWS)
    each = (min(terms, TERMS + taps) + panels * ROWS) * PANELS * WIDTH + 16
    scratch = workspace("conv2d", omp_get_max_threads() * each, x.dtype)[: omp_get_max_threads() * each].reshape(-1, each)
    w = _windows(x, out, weight.shape[2:], stride, padding)
    _correlate(np.ascontiguousarray(x), weight.reshape(outputs, terms), bias, y, packed, scratch, w)
    return y


def _correlate_whole(x, weight, bias, kernel, stride, padding, out):
    """The same where an image has few positions: the weight is most of the work, and is read where it is."""
    y = empty((len(x), len(weight), out[0] * out[1]), x.dtype)
    columns, w = empty((weight.shape[1], y.shape[2]), x.dtype), _windows(x, out, kernel, stride, padding)
    for image in range(len(x)):
        _fill(x[image], columns, w, 0)
        y[image] = matmul_cython.product(weight, columns, None)
    if bias is not None:
        y += bias[:, None]
    return y.reshape(len(x), len(weight), *out)


def correlate_adjoint_x(dy, weight, stride, padding, size):
    """Return dx (B, C, *size) of dy (B, O, h, w) and weight (O, C, kh, kw)."""
    kernel, out = weight.shape[2:], dy.shape[2:]
    if _is_winograds(kernel, stride, len(dy), size):
        turned = weight[:, :, ::-1, ::-1].swapaxes(0, 1)
        return winograd_cython.correlate(dy, turned, None, [(2 - before, 2 - after) for before, after in padding], size)
    transposed = weight.reshape(len(weight), -1).T
    dy = dy.reshape(*dy.shape[:2], -1)
    if _is_a_product(kernel, stride, out, size):
        return matmul_cython.product(np.broadcast_to(transposed, (len(dy), *transposed.shape)), dy, None).reshape(
            len(dy), -1, *size
        )
    dx = np.zeros((len(dy), weight.shape[1], *size), dy.dtype)
    w = _windows(dx, out, kernel, stride, padding)
    for image, positions, columns in _blocks(len(dy), len(transposed), out, dy.dtype):
        columns = matmul_cython.product(transposed, dy[image, :, positions], None)
        _spread(columns, dx[image], w, positions.start)
    return dx


def correlate_adjoint_weight(dy, x, stride, padding, kernel):
    """Return dweight (O, C, *kernel) of dy (B, O, h, w) and x (B, C, H, W)."""
    out, terms, x = dy.shape[2:], x.shape[1] * kernel[0] * kernel[1], np.ascontiguousarray(x)
    dweight = np.zeros((dy.shape[1], terms), dy.dtype)
    w = _windows(x, out, kernel, stride, padding)
    is_product = _is_a_product(kernel, stride, out, x.shape[2:])
    dy = dy.reshape(*dy.shape[:2], -1)
    for image, positions, columns in _blocks(len(x), terms, out, x.dtype):
        if is_product:
            columns = x[image].reshape(terms, -1)[:, positions]
        else:
            _fill(x[image], columns, w, positions.start)
        dweight += matmul_cython.product(dy[image, :, positions], columns.T, None)
    return dweight.reshape(dy.shape[1], x.shape[1], *kernel)


def _is_winograds(kernel, stride, batch, out):
    return kernel == (3, 3) and stride == 1 and batch * out[0] * out[1] >= _WORTH


def _is_a_product(kernel, stride, out, size):
    return kernel == (1, 1) and stride == 1 and out == size  # of one size: without padding


def _windows(x, out, kernel, stride, padding):
    """Return the members of `Windows`."""
    return {
        "height": x.shape[2],
        "width": x.shape[3],
        "across": out[1],
        "kh": kernel[0],
        "kw": kernel[1],
        "stride": stride,
        "top": padding[0][0],
        "left": padding[1][0],
    }


def _blocks(batch, terms, out, dtype):
    """Yield (image, slice of positions, columns to use) for every block of output positions."""
    positions = out[0] * out[1]
    most = min(max(_BLOCK // terms // WIDTH, 1) * WIDTH, positions)
    buffer = empty((terms * most,), dtype)
    for image in range(batch):
        for first in range(0, positions, most):
            count = min(most, positions - first)
            yield image, slice(first, first + count), buffer[: terms * count].reshape(terms, count)


def _fill(const floating[:, :, ::1] x, floating[:, ::1] columns, Windows w, Py_ssize_t first):
    """Write what the kernel sees of the image x (C, H, W) from position `first` on."""
    cdef Py_ssize_t taps = w.kh * w.kw, count = columns.shape[1], c
    for c in prange(x.shape[0], nogil=True):
        gather(&x[c, 0, 0], &columns[c * taps, 0], w, first, count, count, 0)


def _spread(const floating[:, ::1] columns, floating[:, :, ::1] dx, Windows w, Py_ssize_t first):
    """Add every entry of `columns` to the pixel of dx (C, H, W) that `_fill` would have read it from; padding is dropped."""
    cdef Py_ssize_t taps = w.kh * w.kw, c
    for c in prange(dx.shape[0], nogil=True):
        scatter(&columns[c * taps, 0], &dx[c, 0, 0], w, first, columns.shape[1])


def _correlate(
    const floating[:, :, :, ::1] x,
    const floating[:, :] weight,
    const floating[:] bias,
    floating[:, :, :, ::1] y,
    floating[:, :, ::1] packed,
    floating[:, ::1] scratch,
    Windows w,
):
    """Pack the weight into panels of ROWS outputs, then share out tasks: some positions of an image, a part of the panels."""
    cdef Py_ssize_t positions = y.shape[2] * y.shape[3], panels = packed.shape[0], batch = x.shape[0]
    # Long tasks read adjacent memory. Parts of the panels are tasks of their own only where there are few positions.
    cdef Py_ssize_t length = WIDTH * max(1, min(PANELS, batch * positions // (TASKS * WIDTH)))
    cdef Py_ssize_t runs = (positions + length - 1) // length, parts = max(1, min(TASKS // (batch * runs), panels // 4))
    cdef Py_ssize_t panel, task
    for panel in prange(panels, nogil=True):
        pack(weight, &packed[panel, 0, 0], panel * ROWS)
    for task in prange(batch * runs * parts, schedule="dynamic", nogil=True):
        run(
            x[task // parts // runs],
            packed[panels * (task % parts) // parts : panels * (task % parts + 1) // parts],
            bias,
            y[task // parts // runs],
            aligned(&scratch[threadid(), 0]),
            w,
            task // parts % runs * length,
            min(length, positions - task // parts % runs * length),
            panels * (task % parts) // parts * ROWS,
        )


cdef VECTORISED pack(const floating[:, :] weight, floating* packed, Py_ssize_t first) noexcept nogil:
    """packed (terms, ROWS) = the rows of weight from `first` on; zeros for those past the last."""
    cdef Py_ssize_t k, r, rows = min(ROWS, weight.shape[0] - first)
    for k in range(weight.shape[1]):
        for r in range(rows):
            packed[k * ROWS + r] = weight[first + r, k]
        for r in range(rows, ROWS):
            packed[k * ROWS + r] = 0


cdef void run(
    const floating[:, :, ::1] x,
    const floating[:, :, ::1] weight,
    const floating[:] bias,
    floating[:, :, ::1] y,
    floating* total,
    Windows w,
    Py_ssize_t first,
    Py_ssize_t count,
    Py_ssize_t output,
) noexcept nogil:
    """Compute `count` positions from `first` on, in row-major order, of the outputs that `weight` makes, from `output` on.

    total is (panels of positions, panels of outputs, ROWS, WIDTH); columns, after it, is (panels of positions, rows, WIDTH).
    """
    cdef Py_ssize_t taps = w.kh * w.kw, rows = min(TERMS // taps + 1, x.shape[0]) * taps
    cdef Py_ssize_t panels = (count + WIDTH - 1) // WIDTH, size = weight.shape[0] * ROWS * WIDTH, c = 0, channels, n, p, q, r
    cdef floating* columns = total + panels * size
    cdef floating* at
    for n in range(panels * size):
        total[n] = 0
    while c < x.shape[0]:  # as many channels at a time as fill `rows`
        channels = min(rows // taps, x.shape[0] - c)
        for n in range(channels):
            gather(&x[c + n, 0, 0], columns + n * taps * WIDTH, w, first, count, WIDTH, rows * WIDTH)
        for q in range(panels):
            for p in range(weight.shape[0]):
                at = total + q * size + p * ROWS * WIDTH
                multiply(&weight[p, c * taps, 0], columns + q * rows * WIDTH, at, channels * taps, WIDTH)
        c += channels
    for r in range(min(weight.shape[0] * ROWS, y.shape[0] - output)):
        write(total + r * WIDTH, size, bias[output + r], &y[output + r, 0, 0] + first, count)


cdef VECTORISED write(const floating* total, Py_ssize_t size, floating bias, floating* y, Py_ssize_t count) noexcept nogil:
    """y (count,) = bias + total, whose panels of WIDTH entries are `size` apart."""
    cdef Py_ssize_t n
    while count > 0:
        for n in range(min(count, WIDTH)):
            y[n] = total[n] + bias
        y += WIDTH
        total += size
        count -= WIDTH
