"""Per-row symmetric quantisation to 8 bits: the definition that page codecs share.

    scale = max |x| / M            M = 127 (int8) or 448 (fp8 e4m3)
    codes = round(x * (M / max |x|))      half to even
    x'    = codes * scale

x      [..., D]  fp32 | bf16 | fp16; a row is (token, head)
codes  [..., D]  int8 or float8_e4m3fn
scale  [...]     fp32; all mathematics in fp32

A row of zeros (or one whose largest value is below 2^-100) has scale 0 and comes back as zeros. A
row that holds a value that is not finite gets scale nan and comes back as nan, so it is not hidden;
nothing is raised, since that would make a GPU wait.
"""

from __future__ import annotations

import torch

INT8_MAX = 127.0
FP8_MAX = 448.0
TINY = 2.0**-100
"""Below it M / max |x| could overflow fp32."""


def quantize_ref(
    x: torch.Tensor, dtype: torch.dtype, largest: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition -> codes, scale. The kernel gives the same bits."""
    x = x.float()
    peak = x.abs().amax(-1)
    peak = torch.where(peak.isfinite(), peak, torch.nan)
    peak = torch.where(peak < TINY, 0.0, peak)
    # tensor by tensor: torch takes a number / tensor, or a tensor / number on a GPU, for a product
    # with a rounded reciprocal, which is off by one bit now and then
    most = torch.full_like(peak, largest)
    inverse = torch.where(peak == 0, 0.0, most / peak)
    scale = peak / most
    scaled = x * inverse[..., None]
    if dtype == torch.int8:
        # what nan becomes as an integer is the machine's business: make it 0
        return torch.nan_to_num(scaled.round_(), nan=0.0).to(dtype), scale
    return scaled.clamp_(-largest, largest).to(dtype), scale
