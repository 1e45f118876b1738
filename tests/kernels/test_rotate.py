import math

import pytest
import torch

from ringspan.kernels.rotate import (
    KERNEL_DIMS,
    dequantize_rotate_int8,
    dequantize_rotate_ref,
    hadamard,
    rotate_quantize_int8,
)

pytestmark = pytest.mark.usefixtures("dirty_empty")

LOW = (torch.float16, torch.bfloat16)


def make(*shape, dtype=torch.float32, device="cpu"):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 9
    x[0, 0] = 0.0
    return x.to(device, dtype)


def coded(x, encode=rotate_quantize_int8):
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty(x.shape[:-1], device=x.device)
    encode(x, codes, scale)
    return codes, scale


def random_codes(*shape, device="cpu"):
    random = torch.Generator().manual_seed(1)
    codes = torch.randint(-127, 128, shape, generator=random, dtype=torch.int8)
    scale = torch.rand(shape[:-1], generator=random)
    return codes.to(device), scale.to(device)


def same_bits(a, b):
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def assert_same_up_to_the_order_of_a_sum(got, expected):
    codes, scale = (tensor.cpu() for tensor in got)
    expected_codes, expected_scale = (tensor.cpu() for tensor in expected)
    torch.testing.assert_close(scale, expected_scale, rtol=1e-5, atol=0, equal_nan=True)
    moved = (codes.int() - expected_codes.int()).abs()
    assert moved.max() <= 1
    assert (moved > 0).float().mean() < 1e-3


@pytest.mark.parametrize("dim", [1, 2, 64, 128, 256])
def test_hadamard_is_orthonormal_and_its_own_inverse(dim):
    x = torch.randn(5, 3, dim, generator=torch.Generator().manual_seed(0))
    before = x.clone()
    rotated = hadamard(x)
    torch.testing.assert_close(rotated.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(hadamard(rotated), x, rtol=1e-5, atol=1e-5)
    assert torch.equal(x, before)


def test_hadamard_has_minus_one_where_two_indices_share_an_odd_number_of_bits():
    signs = [[(-1.0) ** (i & j).bit_count() / 4 for j in range(16)] for i in range(16)]
    assert torch.equal(hadamard(torch.eye(16)), torch.tensor(signs))


def test_hadamard_spreads_an_outlier_evenly():
    x = torch.zeros(1, 64)
    x[0, 17] = 8.0
    assert torch.equal(hadamard(x).abs(), torch.ones(1, 64))


def test_hadamard_keeps_dtype_and_takes_strided_input():
    x = make(6, 4, 96, dtype=torch.bfloat16)[..., :64]
    rotated = hadamard(x.transpose(0, 1))
    assert rotated.dtype == torch.bfloat16
    assert torch.equal(rotated, hadamard(x).transpose(0, 1))


def test_a_row_gets_the_same_bits_alone_and_among_others(device):
    x = make(70, 3, 128, device=device)
    codes, scale = coded(x)
    for row in (0, 1, 69):
        alone = coded(x[row : row + 1])
        assert same_bits(alone[0][0], codes[row])
        assert same_bits(alone[1][0], scale[row])


@pytest.mark.parametrize("shape", [(64,), (3, 64), (2, 3, 5, 64)], ids=str)
def test_there_and_back_errs_by_a_small_part_of_the_row(shape, device):
    x = torch.randn(*shape[:-1], 80, generator=torch.Generator().manual_seed(2)).to(device)
    x = x[..., :64]
    out = torch.empty_like(x)
    dequantize_rotate_int8(*coded(x), out)
    assert ((out - x).norm(dim=-1) <= 0.012 * x.norm(dim=-1)).all()


def test_a_dimension_that_is_no_power_of_two_is_refused():
    codes, scale = random_codes(2, 80)
    for call in (
        lambda: hadamard(torch.zeros(2, 80)),
        lambda: rotate_quantize_int8(torch.zeros(2, 80), codes, scale),
        lambda: dequantize_rotate_int8(codes, scale, torch.zeros(2, 80)),
    ):
        with pytest.raises(ValueError, match="power of two"):
            call()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("dim", KERNEL_DIMS)
def test_encoding_kernel_agrees_with_the_definition(dim, dtype, device):
    from ringspan.kernels.rotate_triton import rotate_quantize_triton

    if device.type == "cuda" and dtype == torch.float32:
        pytest.skip("the kernel is used for fp16 and bf16")
    x = make(33, 3, dim + 16, dtype=dtype, device=device)[..., :dim].transpose(0, 1)
    expected = coded(x.cpu())
    assert_same_up_to_the_order_of_a_sum(coded(x, rotate_quantize_triton), expected)


@pytest.mark.parametrize("dim", KERNEL_DIMS)
def test_decoding_kernel_gives_the_bits_of_the_definition(dim, device):
    from ringspan.kernels.rotate_triton import dequantize_rotate_triton

    codes, scale = random_codes(33, 3, dim, device=device)
    expected = dequantize_rotate_ref(codes, scale)
    for dtype in (torch.float32, torch.float16):
        out = torch.empty(3, 33, dim, dtype=dtype, device=device).transpose(0, 1)
        dequantize_rotate_triton(codes, scale, out)
        assert same_bits(out, expected.to(dtype))


def test_more_tiles_than_programs_are_all_done(monkeypatch, device):
    from ringspan.kernels import rotate_triton

    monkeypatch.setattr(rotate_triton, "_PROGRAMS", 2)
    x = make(101, 3, 16, dtype=torch.float16, device=device)
    codes, scale = coded(x, rotate_triton.rotate_quantize_triton)
    assert_same_up_to_the_order_of_a_sum((codes, scale), coded(x.cpu()))
    out = torch.empty(x.shape, device=device)
    rotate_triton.dequantize_rotate_triton(codes, scale, out)
    assert same_bits(out, dequantize_rotate_ref(codes, scale))


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_a_row_that_is_not_finite_comes_back_as_nan_and_spoils_no_other(value, device):
    from ringspan.kernels.rotate_triton import dequantize_rotate_triton, rotate_quantize_triton

    x = make(3, 2, 16, dtype=torch.float16, device=device)
    x[1, 1, 5] = value
    for encode, decode in (
        (rotate_quantize_int8, dequantize_rotate_int8),
        (rotate_quantize_triton, dequantize_rotate_triton),
    ):
        codes, scale = coded(x, encode)
        out = torch.empty_like(x)
        decode(codes, scale, out)
        assert scale[1, 1].isnan()
        assert out[1, 1].isnan().all()
        assert (out[0, 0] == 0).all()
        out[1, 1] = 0.0
        assert out.isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [*LOW, torch.float32], ids=str)
@pytest.mark.parametrize("dim", [8, *KERNEL_DIMS, 512])
def test_gpu_decodes_to_the_bits_of_the_cpu(dim, dtype, device):
    codes, scale = random_codes(1000, 8, dim)
    on_cpu = torch.empty(codes.shape, dtype=dtype)
    on_gpu = torch.empty(codes.shape, dtype=dtype, device=device)
    dequantize_rotate_int8(codes, scale, on_cpu)
    dequantize_rotate_int8(codes.to(device), scale.to(device), on_gpu)
    assert same_bits(on_cpu, on_gpu.cpu())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("dim", KERNEL_DIMS)
def test_gpu_encodes_as_the_cpu_up_to_the_order_of_a_sum(dim, dtype, device):
    x = make(1000, 8, dim, dtype=dtype)
    assert_same_up_to_the_order_of_a_sum(coded(x.to(device)), coded(x))


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [8, 128, 512])
def test_gpu_encodes_fp32_to_the_bits_of_the_cpu(dim, device):
    x = make(1000, 8, dim)
    for cpu, gpu in zip(coded(x), coded(x.to(device)), strict=True):
        assert same_bits(cpu, gpu.cpu())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("dim", KERNEL_DIMS)
def test_gpu_gives_a_row_the_same_bits_however_rows_are_cut(dim, dtype, device):
    x = make(257, 8, dim, dtype=dtype, device=device)
    codes, scale = coded(x)
    for start, stop in ((0, 1), (1, 100), (100, 257)):
        part_codes, part_scale = coded(x[start:stop])
        assert same_bits(part_codes, codes[start:stop])
        assert same_bits(part_scale, scale[start:stop])


def test_the_stored_scale_is_that_of_the_orthonormal_row(device):
    x = torch.zeros(1, 64, device=device)
    x[0, 17] = 8.0
    codes, scale = coded(x)
    assert (codes.abs() == 127).all()
    assert math.isclose(scale.item(), 1 / 127, rel_tol=1e-6)
