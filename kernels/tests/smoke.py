"""Each level that this processor has quantises a row: what a wheel is asked where it was built, without torch."""

import ctypes

from grating_kernels import library


class Rows(ctypes.Structure):
    """This class mirrors ``gk_rows``."""

    _fields_ = [("data", ctypes.c_void_p), ("stride", ctypes.c_int64), ("scale", ctypes.c_void_p)]


module = ctypes.CDLL(str(library()))
module.gk_start.restype = ctypes.c_char_p
module.gk_start.argtypes = [ctypes.c_void_p, ctypes.c_int32, ctypes.c_char_p]
names = ctypes.create_string_buffer(256)
module.gk_levels(names, 256)
levels = names.value.split()
assert levels

row, quantized, scale = (ctypes.c_float * 4)(1, -3, 0, 251), (ctypes.c_int8 * 64)(), (ctypes.c_float * 2)()
for level in levels:
    assert module.gk_start(None, 1, level) == level
    failed = module.gk_run_rows(
        2,  # float32
        ctypes.c_int64(1),
        ctypes.c_int64(4),
        ctypes.byref(Rows(ctypes.addressof(row), 4, None)),
        (ctypes.c_byte * 64)(),  # no norm
        ctypes.byref(Rows(None, 0, None)),
        ctypes.byref(Rows(ctypes.addressof(quantized), 64, ctypes.addressof(scale))),
    )
    assert (failed, *scale, list(quantized)) == (0, 1.0, 124.0, [-123, -127, -124, 127] + [0] * 60), level
    ctypes.memset(quantized, 0xFF, 64)
print(f"version {module.gk_version()} of the C interface; levels: {b', '.join(levels).decode()}")
