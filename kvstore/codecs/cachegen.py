"""Archive codec `cachegen`: keys and values in steps, entropy coded by channel; lossy, at rest.

    step(layer, head) = q * depth(layer) * rms of what is left of the head once each channel's mean
                        over the page is taken off
    small(token)      = round(log2 of the token's size over its head's), at most 0; of V only
    code   = round(x / (step * 2^small))          anchor = round(mean of the channel / step)
    stored = code - anchor, by rANS with one model for each channel (kvstore/codecs/rans.py);
             code itself where small < 0
    decode:  x = code * step * 2^small

depth: 2/3 for the first third of the layers, 1, 4/3 for the last: what early layers lose is lost
for all that follow. small: attention rests on few tokens whose V is near 0 (sinks), and what noise
these have comes out: without it the error of attention over smollm2's pages was twice as large.

Bits per element depend on the page: 3.8 on smollm2, with an error of attention of 0.097 where
int4's 4.56 have 0.085. A page that went through is one of codec `raw` of provenance `decoded from
cachegen pages`: it takes the memory of raw, and nobody takes it for exact.

Source: CacheGen, https://arxiv.org/abs/2310.07240, sections 5.1 and 5.2: differences to an anchor
within a group of tokens, coarser layer by layer, arithmetic coding with a distribution for each
layer and channel. There the anchor is a group's first token; the mean of the channel over the page
is the better one: at equal error it took 0.3 (K) to 0.5 bits (V) less on smollm2.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import numpy as np
import torch
import zstandard

from ringspan.errors import BadInput, CorruptPage
from ringspan.kvstore.codecs import cold, rans
from ringspan.kvstore.dtypes import dtype_of
from ringspan.kvstore.planes import bytes_tensor

if TYPE_CHECKING:
    from ringspan.kvstore.page import PageForm

NAME = "cachegen"
Q = 0.3
"""Steps in units of the rms: noise 21 dB below what is left of the means."""
DEPTH = (2 / 3, 1.0, 4 / 3)
COARSEST = 1 << 14
"""The largest value of a head is at most so many steps, so that anchors have 16 bits."""
SMALLEST = -12
"""Octaves."""

_COUNTS = struct.Struct("<II")


def pack(form: PageForm, tokens: int, payload: memoryview) -> bytes:
    """The payload of a page of codec raw, packed. BadInput for values that are not finite."""
    values = _values(form, tokens, payload)
    if not np.isfinite(values).all():
        raise BadInput(
            "keys or values that are not finite cannot be kept by cachegen: use zstd-planes"
        )
    steps, small = _step_sizes(values), _octaves(values[1])
    anchors = np.rint(values.mean(axis=-1) / steps[..., None]).astype(np.int16)
    codes = np.rint(values / (steps[..., None, None] * _scales(small)))
    rest = codes.astype(np.int64) - _anchors(anchors, small)
    model = rans.choose(np.abs(rest).reshape(-1, tokens))
    coded = rans.encode(rest.ravel(), np.repeat(model, tokens))
    compressor = zstandard.ZstdCompressor(level=cold.LEVEL)
    parts: list[bytes | memoryview] = [_COUNTS.pack(len(coded.words), len(coded.escaped))]
    for side in (steps, small, anchors, model, coded.escaped):
        for plane in _bytes_of(side):
            parts += cold.small_plane(plane, compressor)
    return b"".join((*parts, coded.states.tobytes(), coded.words.tobytes()))


def unpack(form: PageForm, tokens: int, stored: memoryview) -> memoryview:
    """A payload of codec raw, the same on every machine. Raises `CorruptPage`."""
    shape = (2, form.num_layers, form.num_kv_heads, form.head_dim)
    channels = int(np.prod(shape))
    if stored.nbytes < _COUNTS.size:
        raise CorruptPage(f"{stored.nbytes} bytes stored, too few")
    num_words, num_escaped = _COUNTS.unpack_from(stored)
    lanes = rans.lanes_of(channels * tokens)
    if 2 * num_words + 4 * lanes > stored.nbytes or num_escaped > channels * tokens:
        raise CorruptPage(f"{num_words} words and {num_escaped} escapes in {stored.nbytes} bytes")
    sides, at = [], _COUNTS.size
    for name, kind, count in (
        ("steps", "<f4", channels // form.head_dim),
        ("octaves", "i1", channels // form.head_dim // 2 * tokens),
        ("anchors", "<i2", channels),
        ("models", "u1", channels),
        ("escapes", "<i4", num_escaped),
    ):
        width = np.dtype(kind).itemsize
        planes = np.empty((count, width), np.uint8)
        for b in range(width if count else 0):
            planes[:, b], at = cold.next_plane(stored, at, count, f"byte {b} of {name}")
        sides.append(planes.view(kind).reshape(count))
    steps, octaves, anchors, model, escaped = sides
    small = octaves.reshape(*shape[1:3], tokens)
    if (
        not (np.isfinite(steps) & (steps > 0)).all()
        or (small > 0).any()
        or (small < SMALLEST).any()
    ):
        raise CorruptPage("steps that no page has")
    if at + 4 * lanes + 2 * num_words != stored.nbytes:
        raise CorruptPage(f"{stored.nbytes} bytes stored, {at + 4 * lanes + 2 * num_words} are due")
    if channels and model.max() >= len(rans.models().reach):
        raise CorruptPage(f"a model {model.max()} that there is not")
    states = np.frombuffer(stored, "<u4", lanes, at)
    words = np.frombuffer(stored, "<u2", num_words, at + 4 * lanes)
    rest = rans.decode(rans.Coded(states, words, escaped), np.repeat(model, tokens))
    codes = rest.reshape(*shape, tokens) + _anchors(anchors.reshape(shape), small)
    # integers, powers of two and one product: the same on every machine
    with np.errstate(over="ignore"):
        values = codes.astype(np.float32) * (steps.reshape(*shape[:3], 1, 1) * _scales(small))
    return _payload(form, values)


def _step_sizes(values: np.ndarray) -> np.ndarray:
    """fp32 [2, layers, heads], never 0."""
    left = values - values.mean(axis=-1, keepdims=True)
    rms = np.sqrt(np.square(left, dtype=np.float64).mean(axis=(-2, -1)))
    layers = values.shape[1]
    depth = np.array([DEPTH[3 * layer // layers] for layer in range(layers)])
    least = np.abs(values).max(axis=(-2, -1)) / COARSEST
    steps = np.maximum(Q * depth[None, :, None] * rms, least).astype(np.float32)
    return np.where(steps > 0, steps, np.float32(1))


def _octaves(values: np.ndarray) -> np.ndarray:
    """int8 [layers, heads, tokens]: by how many octaves each token's V, [layers, heads, head_dim,
    tokens], is smaller than its head's."""
    size = np.square(values, dtype=np.float64).mean(axis=2)
    whole = size.mean(axis=-1, keepdims=True)
    ratio = np.divide(size, whole, out=np.zeros_like(size), where=whole > 0)
    octaves = np.rint(0.5 * np.log2(np.maximum(ratio, 2.0 ** (2 * SMALLEST))))
    return np.clip(octaves, SMALLEST, 0).astype(np.int8)


def _scales(small: np.ndarray) -> np.ndarray:
    """fp32 [2, layers, heads, 1, tokens]: of a token's step; K's are all 1."""
    scales = np.ldexp(np.float32(1), small.astype(np.int32))
    return np.stack([np.ones_like(scales), scales])[..., None, :]


def _anchors(anchors: np.ndarray, small: np.ndarray) -> np.ndarray:
    """int64 [2, layers, heads, head_dim, tokens]; 0 for tokens that are small, whose values have
    nothing of the mean."""
    counts = np.stack([np.ones_like(small), small == 0])[..., None, :]
    return anchors.astype(np.int64)[..., None] * counts


def _values(form: PageForm, tokens: int, payload: memoryview) -> np.ndarray:
    """fp32 [2, layers, heads, head_dim, tokens] of a raw page."""
    kind = dtype_of(form.dtype)
    rows = bytes_tensor(payload).view(kind)
    shape = (form.num_layers, 2, tokens, form.num_kv_heads, form.head_dim)
    found: np.ndarray = rows.view(shape).permute(1, 0, 3, 4, 2).float().contiguous().numpy()
    return found


def _payload(form: PageForm, values: np.ndarray) -> memoryview:
    """`_values`, the other way round."""
    kind = dtype_of(form.dtype)
    limits = torch.finfo(kind)  # half a step above the largest value may be beyond fp16
    rows = torch.from_numpy(values).clamp_(limits.min, limits.max).to(kind)
    rows = rows.permute(1, 0, 4, 2, 3).contiguous()
    return memoryview(rows.reshape(-1).view(torch.uint8).numpy())


def _bytes_of(values: np.ndarray) -> list[np.ndarray]:
    """Byte planes, least significant first; none of nothing."""
    flat = np.ascontiguousarray(values).reshape(-1)
    planes = flat.view(np.uint8).reshape(flat.size, -1) if flat.size else np.empty((0, 0))
    return [np.ascontiguousarray(planes[:, b]) for b in range(planes.shape[1])]
