"""How fast is attention over encoded pages, beside cuDNN (or torch) over the same keys in bf16?

    ringspan bench decode --tokens 1048576 --codecs int4,int8,fp8 --questions 1,16

Correctness comes first: the kernel's error against exact K and V over the error of decoding the
pages and attending in fp32, which may be 1.5 for 8 bits and 1.1 for 4; above it nothing is timed.
On a CPU the definition takes the kernel's place, against torch's own attention in fp32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import msgspec
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from ringspan.deploy.bench.timing import Side, calls_of, seconds_of
from ringspan.kernels.decode import attend_pages, attend_pages_ref
from ringspan.kernels.pages import encode_pages, page_shapes
from ringspan.types import page_tokens_for

LIMITS = {"int8": 1.5, "fp8": 1.5, "int4": 1.1, "k4v2": 1.1}
"""Of the error, over that of decoding and attending in fp32."""

CHECK_KEYS = 8192
"""Over which the error is measured: the reference decodes them all."""

_ENCODE_TOKENS = 1 << 15


class DecodeRow(msgspec.Struct, frozen=True, kw_only=True):
    """One kind, one number of questions."""

    benchmark: str = "decode"
    command: str
    device: str
    kind: str
    keys: int
    questions: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    bytes_read: int
    seconds: float
    """Median; `baseline_s` likewise, taken in turn with it."""
    baseline: str
    baseline_s: float
    error: float
    """Relative, of out, against exact K and V."""
    error_ratio: float
    """Over that of decoding the pages and attending in fp32."""
    repeats: int

    @property
    def gb_per_s(self) -> float:
        return self.bytes_read / self.seconds / 1e9

    @property
    def speedup(self) -> float:
        return self.baseline_s / self.seconds


class DecodeWrong(msgspec.Struct, frozen=True, kw_only=True):
    """Not timed, since its error is above the limit."""

    kind: str
    questions: int
    error_ratio: float
    limit: float


def bench_decode(
    kinds: Sequence[str],
    *,
    keys: int,
    questions: Sequence[int],
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    device: torch.device,
    repeats: int,
    seed: int,
    command: str,
) -> Iterator[DecodeRow | DecodeWrong]:
    """Rows as they come. Raises KeyError for a kind that is not in LIMITS."""
    generator = torch.Generator(device).manual_seed(seed)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    k, v = random(keys, num_kv_heads, head_dim), random(keys, num_kv_heads, head_dim)
    scale = 1 / math.sqrt(head_dim)
    for kind in kinds:
        pages = _encoded(kind, k, v)
        for count in questions:
            q = random(count, num_q_heads, head_dim)
            error, ratio = _errors(kind, q, k, v, pages, scale)
            if not ratio <= LIMITS[kind]:
                yield DecodeWrong(kind=kind, questions=count, error_ratio=ratio, limit=LIMITS[kind])
                continue
            seconds, baseline_s = _times(kind, q, k, v, pages, scale, device, repeats)
            yield DecodeRow(
                command=command,
                device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
                kind=kind,
                keys=keys,
                questions=count,
                num_q_heads=num_q_heads,
                num_kv_heads=num_kv_heads,
                head_dim=head_dim,
                bytes_read=sum(tensor.numel() * tensor.element_size() for tensor in pages),
                seconds=seconds,
                baseline="cuDNN bf16" if device.type == "cuda" else "torch fp32",
                baseline_s=baseline_s,
                error=error,
                error_ratio=ratio,
                repeats=repeats,
            )


def decode_line(row: DecodeRow) -> str:
    return (
        f"{row.kind}, {row.questions} x {row.num_q_heads} rows over {row.keys:,} keys: "
        f"{row.seconds * 1e3:.3f} ms, {row.gb_per_s:,.4g} GB/s, "
        f"{row.speedup:.2f}x {row.baseline} ({row.baseline_s * 1e3:.3f} ms), "
        f"error {row.error:.2e} = {row.error_ratio:.2f} of decoding first"
    )


def _encoded(kind: str, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
    tokens = page_tokens_for(k.shape[2])
    units = -(-k.shape[0] // tokens)
    pages = tuple(
        torch.empty((units, *shape), dtype=dtype, device=k.device)
        for _, shape, dtype in page_shapes(kind, k.shape[1], k.shape[2], tokens)
    )
    for start in range(0, k.shape[0], _ENCODE_TOKENS):
        some = slice(start, start + _ENCODE_TOKENS)
        at = slice(start // tokens, -(-min(some.stop, k.shape[0]) // tokens))
        encode_pages(kind, k[some], v[some], tuple(tensor[at] for tensor in pages))
    return pages


def _errors(
    kind: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pages: tuple[torch.Tensor, ...],
    scale: float,
) -> tuple[float, float]:
    """-> the error of the kernel, and over that of decoding and attending in fp32."""
    stop = min(k.shape[0], CHECK_KEYS)
    options = {"scale": scale, "stop": stop}
    exact = attend_pages_ref("plain", q.float(), (k[:stop], v[:stop]), **options).out
    decoded = attend_pages_ref(kind, q.float(), pages, **options).out
    got = attend_pages(kind, q, pages, out_dtype=torch.float32, **options).out
    error = ((got - exact).norm() / exact.norm()).item()
    return error, error / ((decoded - exact).norm() / exact.norm()).item()


def _times(
    kind: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pages: tuple[torch.Tensor, ...],
    scale: float,
    device: torch.device,
    repeats: int,
) -> tuple[float, float]:
    """Medians of ours and of the baseline, taken in turn."""
    q4, k4, v4 = (x.transpose(0, 1)[None].contiguous() for x in (q, k, v))
    backend = SDPBackend.CUDNN_ATTENTION if device.type == "cuda" else SDPBackend.MATH

    def ours(calls: int) -> None:
        for _ in range(calls):
            attend_pages(kind, q, pages, scale=scale, stop=k.shape[0])

    def baseline(calls: int) -> None:
        with sdpa_kernel(backend):
            for _ in range(calls):
                torch.nn.functional.scaled_dot_product_attention(
                    q4, k4, v4, scale=scale, enable_gqa=True
                )

    sides = (Side("pages", ours), Side("baseline", baseline))
    calls = calls_of(sides, device)
    samples = [
        [seconds_of(run, n, device) for run, n in zip((ours, baseline), calls, strict=True)]
        for _ in range(repeats)
    ]
    mine, theirs = torch.tensor(samples).median(0).values.tolist()
    return mine, theirs
