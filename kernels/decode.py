"""Attention of few query rows over encoded pages, in place: nothing is decoded into memory.

    scores = scale * q k'^T;  with softcap c > 0: c * tanh(scores / c)
    lse = log(sum over keys of exp(scores));  out = exp(scores - lse) v'

k' and v' are what the pages decode to (kernels/pages.py has the encodings). Every row sees all keys
[first, stop) of its sequence: there is no causal edge here. All but fp8 and plain hold K and V
behind the Hadamard rotation H along D, so q is rotated as well (q k'^T = (q H)(k' H)^T) and out is
rotated back once, where the splits of the keys are merged.

q          [T, Hq, D]  bf16 | fp16 | fp32; kv head h serves the q heads h*G .. h*G + G - 1
tensors    int8, fp8   k_codes [U, Hkv, P, D], k_scale [U, Hkv, P] fp32, v_codes [U, Hkv, D, P],
                       v_scale [U, Hkv, P] fp32; U pages of P tokens
           int4        k_codes [U, Hkv, P, D/2] uint8, k_scale, k_zero [U, Hkv, groups, P] fp16,
                       k_mean [U, Hkv, D] fp16, v_codes [U, Hkv, D, P/2] uint8, v_scale, v_zero
                       [U, Hkv, groups, P] fp16
           k4v2        K as int4; v_codes [U, Hkv, D/2, P/2] uint8, v_scale [U, Hkv, P] fp16,
                       v_dims [U, Hkv, D] uint8
           int2        k_codes [U, Hkv, P, D/4] uint8, k_scale [U, Hkv, P] fp16, k_mean [U, Hkv, D]
                       fp16; V as k4v2
           plain       k, v [S, Hkv, D] bf16 | fp16 | fp32, token first: a tail, never encoded
cu_rows    [B + 1]     int32: rows cu_rows[b] .. cu_rows[b + 1] - 1 are those of sequence b
page_table [B, N]      int32: page i of sequence b lies in unit page_table[b, i]
lengths    [B]         int32: where the keys of sequence b end, at most `stop`
out        [T, Hq, D]  in q.dtype unless told; 0 where a sequence has no keys
lse        [T, Hq]     fp32, natural log; -inf where a sequence has no keys
Cost       reads the pages once for all rows of a sequence (64 rows of a kv head a sweep)
Source     split keys: https://arxiv.org/abs/2311.01282; rotation: https://arxiv.org/abs/2404.00456;
           a channel mean taken off K and zeros kept apart: https://arxiv.org/abs/2402.02750.

The Triton kernels lie in decode_triton.py; see merge.py for why apart.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ringspan.kernels.merge import merge_into
from ringspan.kernels.page_int2 import levels
from ringspan.kernels.page_k4v2 import UNIT, weights
from ringspan.kernels.rotate import hadamard
from ringspan.types import Part

KINDS = ("int8", "fp8", "int4", "k4v2", "int2", "plain")

ROTATED = ("int8", "int4", "k4v2", "int2")
"""Kinds that hold K and V behind the Hadamard rotation, where D is a power of two."""

CODES = {
    "int8": torch.int8, "fp8": torch.float8_e4m3fn, "int4": torch.uint8, "k4v2": torch.uint8,
    "int2": torch.uint8,
}  # fmt: skip

_TENSORS = {"int8": 4, "fp8": 4, "int4": 7, "k4v2": 7, "int2": 6, "plain": 2}
_FLOATS = (torch.bfloat16, torch.float16, torch.float32)

_STRETCH_ELEMENTS = 1 << 21
"""Of K that the reference takes at a time: 8 MiB of fp32."""


def attend_pages(
    kind: str,
    q: torch.Tensor,
    tensors: tuple[torch.Tensor, ...],
    *,
    scale: float,
    stop: int,
    first: int | torch.Tensor = 0,
    softcap: float = 0.0,
    page_table: torch.Tensor | None = None,
    cu_rows: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Part:
    """Attention of q's rows over the keys [first, stop) of one layer's pages.

    Shapes as above; every tensor contiguous but q, whose last axis is. Without `cu_rows` all rows
    are one sequence (then page_table may be [N], lengths [1]). Without `page_table` the pages are
    taken as they lie: one context for all sequences. `lengths` lies on the device and is not read
    on the host, so that a captured CUDA graph sees keys that were written since; `stop` is what
    no length exceeds. `first` may be int32 [B] for kind `plain`, whose sequences may be ranges
    [first[b], lengths[b]) of one tensor; `plain` takes no page_table. CUDA tensors go to the
    kernels where those serve the shape (`decode_triton.serves`), others to the reference; on a GPU
    that reads cu_rows and lengths on the host. Raises ValueError for what does not fit together.
    """
    _check(kind, q, tensors, stop, first, page_table, cu_rows, lengths)
    if out_dtype is None:
        out_dtype = q.dtype
    if q.is_cuda and q.numel():
        from ringspan.kernels import decode_triton

        if decode_triton.serves(kind, q, tensors):
            return decode_triton.attend_pages_triton(
                kind, q, tensors, scale=scale, stop=stop, first=first, softcap=softcap,
                page_table=page_table, cu_rows=cu_rows, lengths=lengths, out_dtype=out_dtype,
            )  # fmt: skip
    return attend_pages_ref(
        kind, q, tensors, scale=scale, stop=stop, first=first, softcap=softcap,
        page_table=page_table, cu_rows=cu_rows, lengths=lengths, out_dtype=out_dtype,
    )  # fmt: skip


def attend_pages_ref(
    kind: str,
    q: torch.Tensor,
    tensors: tuple[torch.Tensor, ...],
    *,
    scale: float,
    stop: int,
    first: int | torch.Tensor = 0,
    softcap: float = 0.0,
    page_table: torch.Tensor | None = None,
    cu_rows: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Part:
    """The definition, in fp32, any device; sequence by sequence, stretches of pages at a time."""
    rows = [0, q.shape[0]] if cu_rows is None else cu_rows.tolist()
    count = len(rows) - 1
    stops = [stop] * count if lengths is None else [min(n, stop) for n in lengths.tolist()]
    firsts = first.tolist() if isinstance(first, torch.Tensor) else [first] * count
    tables = [None] * count if page_table is None else page_table.view(count, -1).unbind()
    rotated = kind in ROTATED and not q.shape[2] & (q.shape[2] - 1)
    queries = hadamard(q.float()) if rotated else q.float()
    out = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
    lse = torch.full(q.shape[:2], -torch.inf, device=q.device)
    for b in range(count):
        of_b = slice(rows[b], rows[b + 1])
        if not of_b.stop - of_b.start:
            continue
        for k, v in _stretches(kind, tensors, firsts[b], stops[b], tables[b]):
            part = _attend(queries[of_b], k, v, scale, softcap)
            merge_into(out[of_b], lse[of_b], *part)
    return Part((hadamard(out) if rotated else out).to(out_dtype or q.dtype), lse)


def page_tokens_of(kind: str, tensors: tuple[torch.Tensor, ...]) -> int:
    """Tokens that one leading index of the tensors holds."""
    return 1 if kind == "plain" else tensors[0].shape[2]


def decoded(kind: str, tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of whole pages, both [Hkv, tokens, D] fp32, still behind the rotation if any."""
    if kind == "plain":
        return tensors[0].float().transpose(0, 1), tensors[1].float().transpose(0, 1)
    if kind in ("int4", "k4v2", "int2"):
        *k_side, k_mean, v_codes, v_scale, v_last = tensors
        if kind == "int2":
            k = levels(k_side[0]).mul_(k_side[1].float()[..., None]).mul_(0.5)
        else:
            k_codes, k_scale, k_zero = k_side
            k = _grouped(_nibbles(k_codes), k_scale.mT, k_zero.mT)  # [U, Hkv, P, D]
        k += k_mean.float()[:, :, None]
        if kind == "int4":
            v = _grouped(_nibbles(v_codes).mT, v_scale.mT, v_last.mT)
        else:
            v = weights(v_codes, v_last).mul_(v_scale.float()[:, :, None]).mul_(UNIT).mT
    else:
        k_codes, k_scale, v_codes, v_scale = tensors
        k = k_codes.float().mul_(k_scale[..., None])
        v = v_codes.float().mul_(v_scale[:, :, None]).mT
    return k.transpose(0, 1).flatten(1, 2), v.transpose(0, 1).flatten(1, 2)


def _nibbles(codes: torch.Tensor) -> torch.Tensor:
    """[..., n] uint8 -> [..., 2n] fp32: all low nibbles, then all high ones."""
    return torch.cat((codes & 15, codes >> 4), -1).float()


def _grouped(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """codes [..., D] * scale + zero, both [..., groups]."""
    parts = codes.unflatten(-1, (scale.shape[-1], -1))
    return torch.addcmul(zero.float()[..., None], parts, scale.float()[..., None]).flatten(-2)


def _stretches(
    kind: str,
    tensors: tuple[torch.Tensor, ...],
    first: int,
    stop: int,
    table: torch.Tensor | None,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """k, v [Hkv, keys, D] fp32 of the keys [first, stop), in order."""
    tokens = page_tokens_of(kind, tensors)
    heads, dim = _heads_and_dim(kind, tensors)
    step = max(1, _STRETCH_ELEMENTS // (heads * dim * tokens))
    last = -(-stop // tokens)
    for page in range(first // tokens, last if stop > first else 0, step):
        end = min(page + step, last)
        if table is None:
            units = tuple(tensor[page:end] for tensor in tensors)
        else:
            units = tuple(_picked(tensor, table[page:end].long()) for tensor in tensors)
        k, v = decoded(kind, units)
        inside = slice(max(0, first - page * tokens), min(end * tokens, stop) - page * tokens)
        yield k[:, inside], v[:, inside]


def _picked(tensor: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """tensor[index]; as bytes where torch does not index the dtype everywhere."""
    if tensor.dtype == torch.float8_e4m3fn:
        return tensor.view(torch.uint8)[index].view(tensor.dtype)
    return tensor[index]


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, softcap: float
) -> Part:
    """q [T, Hq, D], k and v [Hkv, S, D], all fp32 -> a part."""
    rows, heads = q.shape[0], k.shape[0]
    queries = q.unflatten(1, (heads, -1)).transpose(0, 1).flatten(1, 2)  # [Hkv, T*G, D]
    scores = queries @ k.mT * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    lse = scores.logsumexp(-1)
    out = (scores - lse[..., None]).exp_() @ v
    out = out.unflatten(1, (rows, -1)).transpose(0, 1).flatten(1, 2)
    return Part(out, lse.unflatten(1, (rows, -1)).transpose(0, 1).flatten(1, 2))


def _heads_and_dim(kind: str, tensors: tuple[torch.Tensor, ...]) -> tuple[int, int]:
    heads, dim = tensors[0].shape[1], tensors[0].shape[-1]
    return heads, dim * {"int4": 2, "k4v2": 2, "int2": 4}.get(kind, 1)


def _expected(
    kind: str, tensors: tuple[torch.Tensor, ...], dim: int
) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes of all tensors, from the first one's."""
    units, heads = tensors[0].shape[:2]
    if kind == "plain":
        return [((units, heads, dim), tensors[0].dtype)] * 2
    tokens, codes = tensors[0].shape[2], CODES[kind]
    if kind == "int4":
        groups = ((units, heads, max(1, dim // 64), tokens), torch.float16)
        return [
            ((units, heads, tokens, dim // 2), codes), groups, groups,
            ((units, heads, dim), torch.float16),
            ((units, heads, dim, tokens // 2), codes), groups, groups,
        ]  # fmt: skip
    if kind == "k4v2":
        groups = ((units, heads, max(1, dim // 64), tokens), torch.float16)
        return [
            ((units, heads, tokens, dim // 2), codes), groups, groups,
            ((units, heads, dim), torch.float16),
            ((units, heads, dim // 2, tokens // 2), codes),
            ((units, heads, tokens), torch.float16), ((units, heads, dim), torch.uint8),
        ]  # fmt: skip
    if kind == "int2":
        side = ((units, heads, tokens), torch.float16)
        return [
            ((units, heads, tokens, dim // 4), codes), side, ((units, heads, dim), torch.float16),
            ((units, heads, dim // 2, tokens // 2), codes), side, ((units, heads, dim), codes),
        ]  # fmt: skip
    scale = ((units, heads, tokens), torch.float32)
    return [
        ((units, heads, tokens, dim), codes),
        scale,
        ((units, heads, dim, tokens), codes),
        scale,
    ]


def _check(
    kind: str,
    q: torch.Tensor,
    tensors: tuple[torch.Tensor, ...],
    stop: int,
    first: int | torch.Tensor,
    page_table: torch.Tensor | None,
    cu_rows: torch.Tensor | None,
    lengths: torch.Tensor | None,
) -> None:
    if kind not in KINDS:
        raise ValueError(f"no encoding {kind!r} to attend over; known: {', '.join(KINDS)}")
    if q.dim() != 3 or q.dtype not in _FLOATS or (q.shape[2] > 1 and q.stride(2) != 1):
        raise ValueError(
            f"q is {tuple(q.shape)} {q.dtype} with strides {q.stride()}, expected [T, Hq, D] bf16, "
            "fp16 or fp32 with a contiguous last axis"
        )
    if len(tensors) != _TENSORS[kind] or tensors[0].dim() != (3 if kind == "plain" else 4):
        raise ValueError(
            f"{kind} has {len(tensors)} tensors, the first of shape {tuple(tensors[0].shape)}; "
            f"expected {_TENSORS[kind]} as kernels/decode.py lists them"
        )
    for i, (tensor, (shape, dtype)) in enumerate(
        zip(tensors, _expected(kind, tensors, q.shape[2]), strict=True)
    ):
        if tuple(tensor.shape) != shape or tensor.dtype != dtype or tensor.device != q.device:
            raise ValueError(
                f"tensor {i} of {kind} is {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}, "
                f"expected {shape} {dtype} on {q.device} to match q {tuple(q.shape)}"
            )
        if not tensor.is_contiguous():
            raise ValueError(
                f"tensor {i} of {kind} has strides {tensor.stride()}, expected contiguous"
            )
    if kind == "plain" and tensors[0].dtype not in _FLOATS:
        raise ValueError(f"plain keys are {tensors[0].dtype}, expected bf16, fp16 or fp32")
    if q.shape[1] % tensors[0].shape[1]:
        raise ValueError(f"{q.shape[1]} q heads are no multiple of {tensors[0].shape[1]} kv heads")
    count = 1 if cu_rows is None else cu_rows.numel() - 1
    _check_indices("cu_rows", cu_rows, q.device, ((count + 1,),))
    _check_indices("lengths", lengths, q.device, ((count,),))
    if isinstance(first, torch.Tensor):
        if kind != "plain":
            raise ValueError(
                f"first is a tensor, which only plain keys take; {kind} takes a number"
            )
        _check_indices("first", first, q.device, ((count,),))
    elif first < 0 or stop < 0:
        raise ValueError(f"keys [{first}, {stop}) are not 0 <= first, 0 <= stop")
    if page_table is None:
        held = tensors[0].shape[0] * page_tokens_of(kind, tensors)
    else:
        if kind == "plain":
            raise ValueError("plain keys take no page_table: their tokens lie in order")
        width = page_table.shape[-1]
        shapes = ((count, width), (width,)) if count == 1 else ((count, width),)
        _check_indices("page_table", page_table, q.device, shapes)
        held = width * page_tokens_of(kind, tensors)
    if stop > held:
        raise ValueError(
            f"stop is {stop}, but {'the page table' if page_table is not None else 'the tensors'} "
            f"hold {held} tokens"
        )


def _check_indices(
    name: str,
    tensor: torch.Tensor | None,
    device: torch.device,
    shapes: tuple[tuple[int, ...], ...],
) -> None:
    if tensor is None:
        return
    good = tuple(tensor.shape) in shapes and tensor.dtype == torch.int32
    if not (good and tensor.device == device and tensor.is_contiguous()):
        raise ValueError(
            f"{name} is {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}, expected "
            f"contiguous {' or '.join(map(str, shapes))} torch.int32 on {device}"
        )
