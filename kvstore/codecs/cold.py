"""Archive codec `zstd-planes`: a page's payload, bit for bit, in fewer bytes; at rest only.

    u   = bits of an element; of floats rotated left by 1:  sign to the end, exponent to the front
    plane b = byte b of every u of one tensor, all layers of the page, the axis of units last
    stored  = for each tensor, for each b:  size u32 | the plane's zstd frame, or the plane itself
              where zstd does not make it smaller (then size is that of the plane)

The exponents of keys and values take few values, the more so within a channel: their plane shrinks
to less than half. Signs and mantissas are noise and stay as they are. Lossless, for the payload of
any page codec; of codes that a quantiser left nearly nothing is to be had.

Source: ZipNN, https://arxiv.org/abs/2411.05239 (exponents apart, entropy coded); zstd, RFC 8878.
Ratio on smollm2's keys and values: docs/codecs.md.
"""

from __future__ import annotations

import math
import struct
from typing import TYPE_CHECKING

import numpy as np
import zstandard

from ringspan.errors import CorruptPage
from ringspan.kvstore.planes import bytes_tensor

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ringspan.attention.kv import TensorSpec
    from ringspan.kvstore.page import PageForm

NAME = "zstd-planes"
LEVEL = 3
"""Of zstd: higher ones take the exponents' entropy no further, only longer."""

_SIZE = struct.Struct("<I")
_WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32}


def pack(form: PageForm, tokens: int, payload: memoryview) -> bytes:
    """The payload of a page of `tokens` tokens, packed."""
    compressor = zstandard.ZstdCompressor(level=LEVEL, write_checksum=False)
    found: list[bytes | memoryview] = []
    for spec, part in _parts(form, tokens, payload):
        for plane in _planes(part, spec, form.num_layers):
            found += small_plane(plane, compressor)
    return b"".join(found)


def unpack(form: PageForm, tokens: int, stored: memoryview) -> memoryview:
    """The payload back. Raises `CorruptPage`; never makes more than the form's payload."""
    payload = memoryview(bytearray(form.bytes_of(tokens)))
    at = 0
    for spec, part in _parts(form, tokens, payload):
        words = _WORDS[spec.dtype.itemsize]
        planes = np.empty((part.size // spec.dtype.itemsize, spec.dtype.itemsize), np.uint8)
        for b in range(spec.dtype.itemsize):
            plane, at = next_plane(stored, at, len(planes), f"plane {b} of {spec.name}")
            planes[:, b] = plane
        units = part.size // spec.unit_bytes // form.num_layers
        bits = planes.view(words).reshape(form.num_layers, math.prod(spec.shape), units)
        if _rotates(spec):
            bits = (bits >> 1) | (bits << (8 * bits.itemsize - 1))
        back = np.ascontiguousarray(bits.transpose(0, 2, 1))
        part[:] = back.view(np.uint8).reshape(part.shape)
    if at != stored.nbytes:
        raise CorruptPage(f"{stored.nbytes - at} bytes behind the last plane")
    return payload


def small_plane(
    plane: np.ndarray, compressor: zstandard.ZstdCompressor
) -> tuple[bytes, bytes | memoryview]:
    """uint8 [n] as it is stored: its size, and its bytes or fewer."""
    small = compressor.compress(plane.data)
    kept = small if len(small) < plane.nbytes else plane.data
    return _SIZE.pack(len(kept)), kept


def next_plane(stored: memoryview, at: int, size: int, what: str) -> tuple[np.ndarray, int]:
    """A plane of `size` bytes that begins at `at`; where the next one does. Raises `CorruptPage`
    before anything larger is made."""
    head = stored[at : at + _SIZE.size]
    (kept,) = _SIZE.unpack(head) if head.nbytes == _SIZE.size else (0,)
    at += head.nbytes
    data = stored[at : at + kept]
    if not kept or data.nbytes != kept or kept > size:
        raise CorruptPage(f"{what}: {data.nbytes} bytes stored for {size}")
    if kept == size:
        return np.frombuffer(data, np.uint8), at + kept
    try:
        # what a frame claims to become is looked at before it becomes anything
        claimed = zstandard.get_frame_parameters(data).content_size
        if claimed != size:
            raise CorruptPage(f"{what}: zstd claims {claimed} bytes, the form makes {size}")
        made = zstandard.ZstdDecompressor().decompress(
            data, max_output_size=size, allow_extra_data=False
        )
    except zstandard.ZstdError as error:
        raise CorruptPage(f"{what}: {error}") from None
    if len(made) != size:
        raise CorruptPage(f"{what}: zstd made {len(made)} bytes, the form makes {size}")
    return np.frombuffer(made, np.uint8), at + kept


def _parts(
    form: PageForm, tokens: int, payload: memoryview
) -> Iterator[tuple[TensorSpec, np.ndarray]]:
    """Each tensor's bytes in all layers: uint8 [layers, bytes], a view."""
    planes = bytes_tensor(payload).numpy().reshape(form.num_layers, -1)
    at = 0
    for spec in form.specs:
        width = spec.bytes_of(tokens)
        yield spec, planes[:, at : at + width]
        at += width


def _planes(part: np.ndarray, spec: TensorSpec, num_layers: int) -> Iterator[np.ndarray]:
    """Byte planes of one tensor, contiguous, least significant first."""
    size = spec.dtype.itemsize
    bits = np.ascontiguousarray(part).view(_WORDS[size])
    bits = bits.reshape(num_layers, -1, math.prod(spec.shape))
    if _rotates(spec):
        bits = (bits << 1) | (bits >> (8 * size - 1))
    bits = np.ascontiguousarray(bits.transpose(0, 2, 1))
    planes = bits.view(np.uint8).reshape(-1, size)
    for b in range(size):
        yield np.ascontiguousarray(planes[:, b])


def _rotates(spec: TensorSpec) -> bool:
    return spec.dtype.is_floating_point and spec.dtype.itemsize > 1
