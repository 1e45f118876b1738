"""Whole pages of K and V as codes of 8 to 2 bits, laid out for attention over the codes.

    int8   y = x S / sqrt(D)    codes = round(127 y / max |y|), one fp32 scale a (token, head)
    fp8    y = x                codes = e4m3(448 y / max |y|), one fp32 scale a (token, head)
    int4   y = x S / sqrt(D)    codes = round((y - m - zero) / scale) in 0 .. 15, fp16 scale and
                                zero a group of 64 dimensions; m: K's mean over the page's tokens,
                                or 0 where it would coarsen one of them
    k4v2   K as int4; V rotated, in 2 bits with one fp16 scale a (token, head) and one of 8 bits a
           (dimension, head) of the page
    int2   K rotated, less its page mean, in 2 bits with one fp16 scale a (token, head); V as k4v2

U pages of P tokens, H kv heads, D head_dim, G groups. A tensor [U, ...] is contiguous.

int8, fp8  k_codes [U, H, P, D]    k_scale [U, H, P] fp32    v_codes [U, H, D, P]    v_scale alike
int4       k_codes [U, H, P, D/2]  uint8: dimension d in the low nibble, d + D/2 in the high one
           k_scale, k_zero [U, H, G, P] fp16    k_mean [U, H, D] fp16
           v_codes [U, H, D, P/2]  uint8: token n in the low nibble, n + P/2 in the high one
           v_scale, v_zero [U, H, G, P] fp16
k4v2       k_codes, k_scale, k_zero, k_mean as int4    v_codes [U, H, D/2, P/2] uint8: token n of
           dimension d in the lowest two bits, then n + P/2 of d, n and n + P/2 of d + D/2
           v_scale [U, H, P] fp16    v_dims [U, H, D] uint8
int2       k_codes [U, H, P, D/4] uint8: dimension d in the lowest two bits, then d + D/4, d + D/2
           and d + 3D/4    k_scale [U, H, P] fp16    k_mean [U, H, D] fp16    V as k4v2

K lies dimension by dimension and V token by token, as the two products of attention want them. The
context's last page may be short: what it lacks has code, scale and zero 0. S (the signs of
rotate.py) is left out where D is not a power of two; page_scaled.py, page_int4.py, page_k4v2.py
and page_int2.py say what zeros and what is not finite become.
Cost   int4 of bf16: reads 2 bytes a value, writes 0.56: memory-bound.
Source QuaRot, https://arxiv.org/abs/2404.00456 (rotation); KIVI, https://arxiv.org/abs/2402.02750
       (K's outliers lie in channels: here the mean of each).

A page's bytes depend on nothing but its own tokens, so a page is encoded in one call. Decoding
gives the same bits on every device. Encoding does too for fp8 and for fp32 values; bf16 and fp16
values that are rotated by tensor cores are summed in another order than on a CPU: there a scale may
differ in its last bits, a code that lay on an edge by one, and whether a mean on the edge is used.
"""

from __future__ import annotations

import torch

from ringspan.kernels import page_int2, page_int4, page_k4v2, page_scaled
from ringspan.kernels.merge import FLOATS

KINDS = ("int8", "fp8", "int4", "k4v2", "int2")

_KERNEL_256_SHARED_BYTES = 136 << 10
"""What the rotating kernels take at D 256."""

_SCALED = {
    "int8": page_scaled.INT8,
    "fp8": page_scaled.FP8,
}
_FEW_BITS = {"int4": page_int4, "k4v2": page_k4v2, "int2": page_int2}


def encode_pages(
    kind: str, k: torch.Tensor, v: torch.Tensor, into: tuple[torch.Tensor, ...]
) -> None:
    """k, v [T, H, D] of consecutive pages, only the last of them short -> `into`, written in place.

    k, v fp32 | bf16 | fp16, the last axis contiguous; `into` [ceil(T / P), ...] as `page_shapes`
    says, the page's length P being what they have. Raises ValueError for anything else. Nothing is
    raised for values that are not finite: they come back as nan.
    """
    page_tokens = _check(kind, k, v, into)
    if not k.numel():
        return
    if -(-k.shape[0] // page_tokens) != into[0].shape[0]:
        raise ValueError(
            f"{k.shape[0]} tokens are {-(-k.shape[0] // page_tokens)} pages of {page_tokens}, "
            f"found tensors of {into[0].shape[0]}: pass as many pages as the tokens fill"
        )
    # tensor cores would round fp32: the torch code gives the bits of the CPU on any device
    if k.dtype != torch.float32 and _has_kernel(kind, k, page_tokens):
        _triton(kind).encode(k, v, into)
    elif kind in _FEW_BITS:
        _FEW_BITS[kind].encode(k, v, into)
    else:
        page_scaled.encode(_SCALED[kind], k, v, into)


def decode_pages(
    kind: str, tensors: tuple[torch.Tensor, ...], k: torch.Tensor, v: torch.Tensor
) -> None:
    """The first T tokens of `tensors` [U, ...] -> k, v [T, H, D], written in place; T <= U * P.

    k, v fp32 | bf16 | fp16, the last axis contiguous, in the space of what was encoded (the
    rotation undone). Raises ValueError for anything else.
    """
    page_tokens = _check(kind, k, v, tensors)
    if not k.numel():
        return
    units = -(-k.shape[0] // page_tokens)
    if units > tensors[0].shape[0]:
        raise ValueError(
            f"{k.shape[0]} tokens are wanted of {tensors[0].shape[0]} pages of {page_tokens}: "
            "pass all the pages that hold them"
        )
    tensors = tuple(tensor[:units] for tensor in tensors)
    if _has_kernel(kind, k, page_tokens):
        _triton(kind).decode(tensors, k, v)
    elif kind in _FEW_BITS:
        _FEW_BITS[kind].decode(tensors, k, v)
    else:
        page_scaled.decode(_SCALED[kind], tensors, k, v)


def page_shapes(
    kind: str, num_kv_heads: int, head_dim: int, page_tokens: int
) -> tuple[tuple[str, tuple[int, ...], torch.dtype], ...]:
    """Name, shape of one page and dtype of the tensors of a kind, in their order.

    Raises ValueError for an unknown kind, or where codes of few bits do not fill bytes.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind of page {kind!r}; known: {', '.join(KINDS)}")
    if kind in _FEW_BITS:
        return _FEW_BITS[kind].shapes(num_kv_heads, head_dim, page_tokens)
    return page_scaled.shapes(_SCALED[kind], num_kv_heads, head_dim, page_tokens)


def _check(kind: str, k: torch.Tensor, v: torch.Tensor, tensors: tuple[torch.Tensor, ...]) -> int:
    """P; raises ValueError unless all fit together."""
    if k.dim() != 3 or v.shape != k.shape or v.dtype != k.dtype or k.dtype not in FLOATS:
        raise ValueError(
            f"k {tuple(k.shape)} {k.dtype} and v {tuple(v.shape)} {v.dtype}, expected both "
            "[T, H, D] and both fp32, bf16 or fp16"
        )
    if k.numel() and (k.stride(2) != 1 or v.stride(2) != 1):
        raise ValueError(
            f"k and v have strides {k.stride()} and {v.stride()}, expected a contiguous last axis"
        )
    page_tokens = tensors[0].shape[2] if tensors and tensors[0].dim() == 4 else 0
    wanted = page_shapes(kind, k.shape[1], k.shape[2], page_tokens)
    if len(tensors) != len(wanted):
        raise ValueError(f"{kind} pages have {len(wanted)} tensors, found {len(tensors)}")
    units = tensors[0].shape[0]
    for tensor, (name, shape, dtype) in zip(tensors, wanted, strict=True):
        if tuple(tensor.shape) != (units, *shape) or tensor.dtype != dtype:
            raise ValueError(
                f"{name} is {tuple(tensor.shape)} {tensor.dtype}, expected {(units, *shape)} "
                f"{dtype} for {kind} pages of k and v {tuple(k.shape)}"
            )
        if not tensor.is_contiguous():
            raise ValueError(f"{name} has strides {tensor.stride()}, expected contiguous")
        if tensor.device != k.device or v.device != k.device:
            raise ValueError(
                f"k, v and {name} are on {k.device}, {v.device} and {tensor.device}, expected one"
            )
    return page_tokens


def _has_kernel(kind: str, k: torch.Tensor, page_tokens: int) -> bool:
    """Products of tensor cores are 16 values deep or more, tiles have powers of two."""
    dim = k.shape[2]
    if not k.is_cuda or page_tokens not in (32, 64, 128) or dim % 2 or dim > 256:
        return False
    if kind == "fp8":
        return torch.cuda.get_device_capability(k.device) >= (8, 9)  # else it lacks the casts
    if dim & (dim - 1):
        return kind == "int8"
    properties = torch.cuda.get_device_properties(k.device)
    enough = dim < 256 or properties.shared_memory_per_block_optin >= _KERNEL_256_SHARED_BYTES
    return dim >= 32 and enough


def _triton(kind: str):
    """Imported when a CUDA tensor comes: importing triton takes half a second."""
    if kind == "int4":
        from ringspan.kernels import page_int4_triton

        return page_int4_triton
    if kind == "k4v2":
        from ringspan.kernels import page_k4v2_triton

        return page_k4v2_triton
    if kind == "int2":
        from ringspan.kernels import page_int2_triton

        return page_int2_triton
    from ringspan.kernels import page_scaled_triton

    return page_scaled_triton.INT8 if kind == "int8" else page_scaled_triton.FP8
