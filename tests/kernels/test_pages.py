import math

import pytest
import torch

from ringspan.kernels.page_int4 import num_groups
from ringspan.kernels.pages import KINDS, decode_pages, encode_pages, page_shapes
from ringspan.kernels.quantize import FP8_MAX, INT8_MAX, quantize_ref
from ringspan.kernels.rotate import hadamard

pytestmark = [
    pytest.mark.usefixtures("dirty_empty"),
    # what Triton's interpreter computes of inf, or of what fp16 cannot hold
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
]

HEADS = 2
LEAST_SQNR_DB = {"int8": 40.0, "fp8": 30.0, "int4": 19.0, "k4v2": 8.5, "int2": 8.5}
FEW_BITS = ("int4", "k4v2", "int2")
CODE_BITS = {"int4": (4, 4), "k4v2": (4, 2), "int2": (2, 2)}
"""Of K and V, where several codes share a byte."""
SIZES = [(64, 16), (128, 32), (256, 16)]  # D, P


def make(tokens, dim, heads=HEADS, dtype=torch.float32, device="cpu", seed=0):
    """k with outlier channels, v; both slices of wider rows, so that strides count."""
    random = torch.Generator().manual_seed(seed)
    both = torch.randn(2, tokens, heads + 1, dim + 16, generator=random)
    both[0] += 6 * torch.randn(heads + 1, dim + 16, generator=random)
    k, v = both.to(device, dtype)[:, :, :heads, :dim]
    return k, v


def empty(kind, tokens, dim, page_tokens, heads=HEADS, device="cpu"):
    units = -(-tokens // page_tokens)
    return tuple(
        torch.empty(units, *shape, dtype=dtype, device=device)
        for _, shape, dtype in page_shapes(kind, heads, dim, page_tokens)
    )


def encoded(kind, k, v, page_tokens, encode=None):
    into = empty(kind, k.shape[0], k.shape[2], page_tokens, k.shape[1], k.device)
    if encode is None:
        encode_pages(kind, k, v, into)
    else:
        encode(k, v, into)
    return into


def decoded(kind, tensors, tokens, dim, dtype=torch.float32, decode=None, heads=HEADS):
    shape = (2, tokens, heads + 1, dim + 16)
    k, v = torch.empty(shape, dtype=dtype, device=tensors[0].device)[:, :, :heads, :dim]
    if decode is None:
        decode_pages(kind, tensors, k, v)
    else:
        decode(tensors, k, v)
    return k, v


def kernels(kind):
    from ringspan.kernels import (
        page_int2_triton,
        page_int4_triton,
        page_k4v2_triton,
        page_scaled_triton,
    )

    return {
        "int8": page_scaled_triton.INT8,
        "fp8": page_scaled_triton.FP8,
        "int4": page_int4_triton,
        "k4v2": page_k4v2_triton,
        "int2": page_int2_triton,
    }[kind]


def same_bits(a, b):
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def sqnr_db(x, y):
    x, y = x.double(), y.double()
    return 10 * math.log10(x.pow(2).sum() / (x - y).pow(2).sum())


def assert_same_up_to_the_order_of_a_sum(kind, got, expected):
    # a mean that lay on an edge moves by one step of fp16, and with it what is left of its channel
    names = [name for name, _, _ in page_shapes(kind, HEADS, 64, 16)]
    slack = 0.0
    if kind in FEW_BITS:
        slack = 2**-10 * expected[names.index("k_mean")].abs().max().item()
    for name, one, other in zip(names, got, expected, strict=True):
        one, other = one.cpu(), other.cpu()
        if one.dtype == torch.float8_e4m3fn:
            one, other = one.view(torch.uint8), other.view(torch.uint8)
        if one.is_floating_point():
            # a mean near 0 is a difference of large sums
            atol = 2e-5 + (slack if name in ("k_scale", "k_zero") else 0.0)
            torch.testing.assert_close(one, other, rtol=2e-3, atol=atol, equal_nan=True)
            continue
        if kind in FEW_BITS and name.endswith("codes"):
            bits = CODE_BITS[kind][name == "v_codes"]
            one, other = (
                torch.cat([x >> shift & (1 << bits) - 1 for shift in range(0, 8, bits)])
                for x in (one, other)
            )
        moved = (one.int() - other.int()).abs()
        assert moved.max() <= 1
        assert (moved > 0).float().mean() < 2e-3


def rotated(x):
    dim = x.shape[-1]
    return hadamard(x.float()) if dim & (dim - 1) == 0 else x.float()


def int4_by_the_formula(z):
    """z [N, D] fp64, rows -> what is decoded of them, unrotated."""
    z = z.unflatten(-1, (num_groups(z.shape[-1]), -1))
    zero = z.amin(-1, keepdim=True).half().double()
    scale = ((z.amax(-1, keepdim=True) - z.amin(-1, keepdim=True)) / 15).half().double()
    codes = ((z - zero) / scale).round().clamp(0, 15)
    return (codes * scale + zero).flatten(-2)


def widened(y, mean):
    """Whether the mean more than doubles the range of some row of y [T, H, D], by head."""

    def width(x):
        groups = x.unflatten(-1, (num_groups(x.shape[-1]), -1))
        return (groups.amax(-1) - groups.amin(-1)).amax(-1)

    return (width(y - mean) > 2 * width(y)).any(0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dim", [64, 96, 128])
def test_pages_come_back_with_the_error_of_their_bits(kind, dim):
    k, v = make(150, dim)
    back = decoded(kind, encoded(kind, k, v, 64), 150, dim)
    for x, y in zip((k, v), back, strict=True):
        assert sqnr_db(x, y) > LEAST_SQNR_DB[kind] - (6 if dim == 96 else 0)


@pytest.mark.parametrize("dim", [64, 80])
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_codes_of_8_bits_are_those_of_rows_laid_out_in_pages(kind, dim):
    k, v = make(40, dim)
    k_codes, k_scale, v_codes, v_scale = encoded(kind, k, v, 16)
    for x, codes, scale in (
        (k, k_codes, k_scale),
        (v, v_codes.view(torch.uint8).transpose(2, 3), v_scale),
    ):
        y = rotated(x) if kind == "int8" else x
        largest = INT8_MAX if kind == "int8" else FP8_MAX
        rows, row_scale = quantize_ref(y, v_codes.dtype, largest)
        for token in range(40):
            page, slot = divmod(token, 16)
            assert same_bits(codes[page, :, slot], rows[token])
            assert same_bits(scale[page, :, slot], row_scale[token])


@pytest.mark.parametrize("dim", [32, 64, 128, 192, 256])
def test_int4_decodes_to_its_formula(dim):
    k, v = make(40, dim)
    got_k, got_v = decoded("int4", encoded("int4", k, v, 16), 40, dim)
    want_v = rotated(int4_by_the_formula(rotated(v).double()))
    torch.testing.assert_close(got_v, want_v, rtol=1e-5, atol=1e-5)
    for start, stop in ((0, 16), (16, 32), (32, 40)):
        y = rotated(k[start:stop]).double()
        mean = y.mean(0).half().double()
        assert not widened(y, mean).any()
        want_k = rotated(int4_by_the_formula(y - mean) + mean)
        torch.testing.assert_close(got_k[start:stop], want_k, rtol=1e-5, atol=2e-5)


def test_nibbles_pair_dimensions_of_k_and_tokens_of_v():
    k = torch.zeros(16, 1, 96)  # no power of two: not rotated
    v = torch.zeros(16, 1, 96)
    k[:, 0] = torch.arange(16.0)[:, None] % 2 * (torch.arange(96.0) == 50) * 15
    k[:, 0, 60] = 20.0
    v[:, 0, 0] = 15.0
    v[:, 0, 7] = torch.arange(16.0) % 15
    k_codes, _, _, k_mean, v_codes, v_scale, v_zero = encoded("int4", k, v, 16)
    assert k_mean[0, 0, 50] == 7.5
    assert k_codes[0, 0, 1].tolist() == [0, 0, 240] + [0] * 45  # 50 = 2 + 48
    assert v_codes[0, 0, 7].tolist() == [n % 15 | (n + 8) % 15 << 4 for n in range(8)]
    assert v_scale[0, 0, 0].tolist() == [1.0] * 16
    assert v_zero[0, 0, 0].tolist() == [0.0] * 16


@pytest.mark.parametrize("dim", [64, 128])
def test_a_mean_that_coarsens_a_token_is_left_out_for_its_page_and_head(dim, device):
    k, v = make(48, dim, device=device)
    k[20, 1] *= 0.02  # in the second page, unlike the rest of it: a sink
    tensors = encoded("int4", k, v, 16)
    for page in range(3):
        y = rotated(k[16 * page : 16 * page + 16]).cpu()
        assert widened(y, y.mean(0)).tolist() == [False, page == 1]
    means = tensors[3].cpu()
    assert (means == 0).all(-1).tolist() == [[False, False], [False, True], [False, False]]
    got, _ = decoded("int4", tensors, 48, dim)
    assert sqnr_db(k[20, 1], got[20, 1]) > LEAST_SQNR_DB["int4"]


def test_the_mean_of_a_short_page_is_that_of_its_tokens():
    k, v = make(5, 64)
    mean = encoded("int4", k, v, 16)[3]
    torch.testing.assert_close(mean[0], rotated(k).mean(0).half())


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_has_the_same_bytes_alone_and_among_others(kind):
    k, v = make(300, 128, heads=9)
    together = encoded(kind, k, v, 32)
    for start, stop in ((0, 32), (32, 128), (128, 300), (288, 300)):
        alone = encoded(kind, k[start:stop], v[start:stop], 32)
        for one, whole in zip(alone, together, strict=True):
            assert same_bits(one, whole[start // 32 : -(-stop // 32)])


@pytest.mark.parametrize("kind", KINDS)
def test_a_short_page_is_filled_up_with_zero_bytes(kind, device):
    k, v = make(21, 64, device=device)
    tensors = encoded(kind, k, v, 16)
    names = [name for name, _, _ in page_shapes(kind, HEADS, 64, 16)]
    for name, tensor in zip(names, tensors, strict=True):
        if name in ("k_mean", "v_dims"):
            continue
        if name == "v_codes" and kind in ("k4v2", "int2"):
            assert (tensor[1] & 0b11001100 == 0).all()  # tokens 8 to 15
            assert (tensor[1, ..., 5:] == 0).all()
            continue
        by_group = name.endswith(("scale", "zero")) and f"{name[0]}_zero" in names
        axis = 3 if by_group or name == "v_codes" else 2
        if name == "v_codes" and kind == "int4":
            assert (tensor[1, ..., :5] >> 4 == 0).all()  # tokens 8 to 12
            assert (tensor[1, ..., 5:] == 0).all()
            continue
        missing = tensor[1:].view(torch.uint8) if tensor.element_size() == 1 else tensor[1:]
        missing = missing.narrow(axis, 5, 11)
        assert (missing.contiguous().view(torch.uint8) == 0).all(), name


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_tokens_alone_can_be_decoded(kind, device):
    k, v = make(40, 64, device=device)
    tensors = encoded(kind, k, v, 16)
    whole = decoded(kind, tensors, 40, 64)
    for tokens in (1, 16, 35):
        for part, all_of_it in zip(decoded(kind, tensors, tokens, 64), whole, strict=True):
            assert same_bits(part, all_of_it[:tokens])


@pytest.mark.parametrize("kind", KINDS)
def test_constant_rows_and_zeros_come_back_as_they_were(kind, device):
    k, v = make(16, 96, device=device)  # not rotated
    k[:], v[3], v[4] = 1.5, 0.0, -2.5
    tensors = encoded(kind, k, v, 16)
    got_k, got_v = decoded(kind, tensors, 16, 96)
    torch.testing.assert_close(got_k, k, rtol=1e-6, atol=0)
    assert (got_v[3] == 0).all()
    if kind not in ("k4v2", "int2"):  # whose two bits keep a row's length
        torch.testing.assert_close(got_v[4], v[4], rtol=1e-6, atol=0)
    if kind in FEW_BITS:
        assert (tensors[1] == 0).all()
        assert (tensors[0] == 0).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("dim", [64, 96])
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_that_is_not_finite_comes_back_as_nan_and_spoils_no_other(kind, dim, value, device):
    k, v = make(20, dim, device=device)
    k[3, 1, 5] = v[18, 0, 7] = value
    tensors = encoded(kind, k, v, 16)
    got_k, got_v = decoded(kind, tensors, 20, dim)
    for got, (token, head), x in ((got_k, (3, 1), k), (got_v, (18, 0), v)):
        assert got[token, head].isnan().all()
        got[token, head] = x[token, head] = 0.0
        assert sqnr_db(x, got) > LEAST_SQNR_DB[kind] - 6


def test_what_fp16_cannot_hold_comes_back_as_nan(device):
    k, v = make(16, 96, device=device)
    k[:, 0] += 1e5  # the mean
    v[2, 1, 5] = -1e5  # a zero
    v[3, 1, 5] = 3e6  # a scale
    got_k, got_v = decoded("int4", encoded("int4", k, v, 16), 16, 96)
    assert got_k[:, 0].isnan().all()
    assert got_k[:, 1].isfinite().all()
    assert got_v[2:4, 1].isnan().all()
    assert got_v[:, 0].isfinite().all()
    assert got_v[4:].isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_no_tokens_are_no_pages(kind):
    k, v = make(0, 64)
    assert [t.shape[0] for t in encoded(kind, k, v, 16)] == [0] * len(page_shapes(kind, 1, 64, 16))
    decoded(kind, empty(kind, 16, 64, 16), 0, 64)


def test_what_does_not_fit_is_refused_by_name():
    k, v = make(20, 64)
    good = empty("int4", 20, 64, 16)
    with pytest.raises(
        ValueError, match="unknown kind of page 'int5'; known: int8, fp8, int4, k4v2, int2"
    ):
        encode_pages("int5", k, v, good)
    with pytest.raises(ValueError, match="40 tokens are 3 pages of 16, found tensors of 2"):
        encode_pages("int4", *make(40, 64), good)
    with pytest.raises(ValueError, match="40 tokens are wanted of 2 pages of 16"):
        decode_pages("int4", good, *make(40, 64))
    with pytest.raises(ValueError, match="int4 pages have 7 tensors, found 4"):
        encode_pages("int4", k, v, good[:4])
    with pytest.raises(ValueError, match=r"k_scale is .* expected .*torch.float16"):
        encode_pages("int4", k, v, (good[0], good[1].float(), *good[2:]))
    wide = torch.empty(2, 2, 64, 16, dtype=torch.uint8)[..., ::2]
    with pytest.raises(ValueError, match="v_codes has strides"):
        encode_pages("int4", k, v, (*good[:4], wide, *good[5:]))
    with pytest.raises(ValueError, match="contiguous last axis"):
        encode_pages("int4", k.transpose(1, 2), v.transpose(1, 2), good)
    with pytest.raises(ValueError, match="expected both"):
        encode_pages("int4", k, v[:5], good)
    with pytest.raises(ValueError, match=r"head_dim 63 .* expected both even"):
        page_shapes("int4", 2, 63, 16)


@pytest.mark.filterwarnings("ignore:All-NaN slice")  # numpy's, in the interpreter's tl.min
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("dim", "page_tokens"), [*SIZES, (80, 16)], ids=str)
@pytest.mark.parametrize("kind", ["int8", "int4", "k4v2", "int2"])
def test_encoding_kernel_agrees_with_the_definition(kind, dim, page_tokens, dtype, device):
    if kind in FEW_BITS and dim == 80:
        pytest.skip("the kernel is for powers of two")
    if device.type == "cuda" and (dtype == torch.float32 or page_tokens < 32):
        pytest.skip("the kernel is used for fp16 and bf16 and products of 16 and more rows")
    tokens = 2 * page_tokens + 5
    k, v = make(tokens, dim, dtype=dtype, device=device)
    k[page_tokens + 1] *= 0.02  # leaves out the mean of a page
    k[page_tokens + 2, 0] = 0.0
    k[3, 1, 5], v[4, 0, 6], v[5, 1] = float("nan"), float("inf"), 1.5
    expected = encoded(kind, k.cpu(), v.cpu(), page_tokens)
    got = encoded(kind, k, v, page_tokens, kernels(kind).encode)
    assert_same_up_to_the_order_of_a_sum(kind, got, expected)


@pytest.mark.parametrize(("dim", "page_tokens"), [*SIZES, (80, 16)], ids=str)
@pytest.mark.parametrize("kind", ["int8", "int4", "k4v2", "int2"])
def test_decoding_kernel_gives_the_bits_of_the_definition(kind, dim, page_tokens, device):
    if kind in FEW_BITS and dim == 80:
        pytest.skip("the kernel is for powers of two")
    if device.type == "cuda" and page_tokens < 32:
        pytest.skip("the kernel is used for products of 16 and more rows")
    tokens = page_tokens + 5
    tensors = encoded(kind, *make(2 * page_tokens, dim), page_tokens)
    on_device = tuple(tensor.to(device) for tensor in tensors)
    for dtype in (torch.float32, torch.float16):
        expected = decoded(kind, tensors, tokens, dim, dtype)
        got = decoded(kind, on_device, tokens, dim, dtype, kernels(kind).decode)
        for one, other in zip(got, expected, strict=True):
            assert same_bits(one.cpu(), other)


@pytest.mark.parametrize("kind", ["int8", "int4", "k4v2", "int2"])
def test_more_pages_than_programs_are_all_done(kind, device, monkeypatch):
    from ringspan.kernels import page_int4_triton, page_k4v2_triton, page_scaled_triton

    for module in (page_scaled_triton, page_int4_triton, page_k4v2_triton):
        for name, config in module.CONFIGS.items():
            monkeypatch.setitem(module.CONFIGS, name, config._replace(programs=3))
    k, v = make(130, 64, dtype=torch.float16, device=device)
    got = encoded(kind, k, v, 32, kernels(kind).encode)
    assert_same_up_to_the_order_of_a_sum(kind, got, encoded(kind, k.cpu(), v.cpu(), 32))
    back = decoded(kind, got, 130, 64, decode=kernels(kind).decode)
    expected = decoded(kind, tuple(tensor.cpu() for tensor in got), 130, 64)
    assert all(same_bits(a.cpu(), b) for a, b in zip(back, expected, strict=True))


GPU_SIZES = [(64, 128), (80, 128), (128, 128), (256, 64), (512, 64), (64, 16)]
GPU_CASES = [
    *((dim, page_tokens, torch.bfloat16) for dim, page_tokens in GPU_SIZES),
    (128, 128, torch.float16),
    (128, 128, torch.float32),
    (32, 128, torch.float16),
]


def name_of(case):
    return "D{}-P{}-{}".format(*case)


@pytest.mark.gpu
@pytest.mark.parametrize("case", GPU_CASES, ids=name_of)
@pytest.mark.parametrize("kind", KINDS)
def test_gpu_encodes_as_the_cpu_up_to_the_order_of_a_sum(kind, case, device):
    dim, page_tokens, dtype = case
    k, v = make(1000, dim, heads=3, dtype=dtype)
    k[300] *= 0.02  # leaves out the mean of a page
    k[700, 1, 5], v[3, 0, 6], v[4] = float("nan"), float("inf"), 0.0
    got = encoded(kind, k.to(device), v.to(device), page_tokens)
    expected = encoded(kind, k, v, page_tokens)
    assert_same_up_to_the_order_of_a_sum(kind, got, expected)
    if kind == "fp8":
        assert all(same_bits(a.cpu(), b) for a, b in zip(got[::2], expected[::2], strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize(("dim", "page_tokens"), GPU_SIZES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_gpu_encodes_fp32_to_the_bits_of_the_cpu(kind, dim, page_tokens, device):
    k, v = make(1000, dim, heads=3)
    got = encoded(kind, k.to(device), v.to(device), page_tokens)
    for one, other in zip(got, encoded(kind, k, v, page_tokens), strict=True):
        assert same_bits(one.cpu(), other)


@pytest.mark.gpu
@pytest.mark.parametrize("case", GPU_CASES, ids=name_of)
@pytest.mark.parametrize("kind", KINDS)
def test_gpu_decodes_to_the_bits_of_the_cpu(kind, case, device):
    dim, page_tokens, dtype = case
    tensors = encoded(kind, *make(1000, dim, heads=3), page_tokens)
    on_gpu = tuple(tensor.to(device) for tensor in tensors)
    expected = decoded(kind, tensors, 990, dim, dtype, heads=3)
    for one, other in zip(decoded(kind, on_gpu, 990, dim, dtype, heads=3), expected, strict=True):
        assert same_bits(one.cpu(), other)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_gpu_gives_a_page_the_same_bytes_alone_and_among_others(kind, device):
    k, v = make(2000, 128, heads=8, dtype=torch.bfloat16, device=device)
    together = encoded(kind, k, v, 128)
    for start, stop in ((0, 128), (128, 1024), (1920, 2000)):
        alone = encoded(kind, k[start:stop], v[start:stop], 128)
        for one, whole in zip(alone, together, strict=True):
            assert same_bits(one, whole[start // 128 : -(-stop // 128)])
