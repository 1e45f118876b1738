import pytest
import torch

from ringspan.kernels.quantize import FP8_MAX, INT8_MAX, quantize_ref

INT8 = (torch.int8, INT8_MAX)
FP8 = (torch.float8_e4m3fn, FP8_MAX)


def make(*shape, dtype=torch.float32, device="cpu"):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 9
    x[0, 0] = 0.0
    return x.to(device, dtype)


def there_and_back(kind, x):
    codes, scale = quantize_ref(x, *kind)
    return codes, scale, codes.float() * scale[..., None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_int8_errs_by_at_most_half_a_step(dtype):
    x = make(17, 3, 80, dtype=dtype)
    _, scale, out = there_and_back(INT8, x)
    assert ((out - x.float()).abs() <= 0.5001 * scale[..., None]).all()


def test_fp8_errs_by_at_most_a_sixteenth_or_the_smallest_step():
    x = make(17, 3, 80)
    _, scale, out = there_and_back(FP8, x)
    assert ((out - x).abs() <= x.abs() / 15.9 + scale[..., None] * 2.0**-10).all()


@pytest.mark.parametrize("kind", [INT8, FP8], ids=["int8", "fp8"])
def test_rows_of_zeros_come_back_as_zeros_with_scale_zero(kind):
    codes, scale, out = there_and_back(kind, make(3, 2, 16))
    assert scale[0, 0] == 0
    assert (codes[0, 0].float() == 0).all()
    assert (out[0, 0] == 0).all()


@pytest.mark.parametrize("kind", [INT8, FP8], ids=["int8", "fp8"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_a_row_that_is_not_finite_is_not_hidden_and_spoils_no_other(kind, value):
    x = make(3, 2, 16)
    x[1, 1, 5] = value
    _, scale, out = there_and_back(kind, x)
    assert scale[1, 1].isnan()
    assert out[1, 1].isnan().all()
    out[1, 1] = 0.0
    assert out.isfinite().all()


def test_the_definition_divides_once_without_a_rounded_reciprocal(device):
    x = make(200, 8, 128, dtype=torch.bfloat16, device=device)[1:].float()
    peak = x.abs().amax(-1).double()
    _, scale = quantize_ref(x, torch.int8, INT8_MAX)
    assert torch.equal(scale, (peak / INT8_MAX).float())
    # bf16 values often lie on the edge between two codes, which shows an inverse off by a bit
    inverse = (INT8_MAX / peak).float()
    expected = (x * inverse[..., None]).round().to(torch.int8)
    assert torch.equal(quantize_ref(x, torch.int8, INT8_MAX)[0], expected)


def test_the_largest_value_of_a_row_gets_the_largest_code():
    for dtype, largest in (INT8, FP8):
        codes, _ = quantize_ref(make(40, 3, 64)[1:], dtype, largest)
        assert (codes.float().abs().amax(-1) == largest).all()
