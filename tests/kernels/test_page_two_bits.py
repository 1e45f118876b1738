"""The 2-bit halves of k4v2 and int2 pages against their formulas, value by value in fp64."""

import math

import pytest
import torch

from ringspan.kernels.page_k4v2 import LARGEST_DIM, STEP
from ringspan.kernels.pages import decode_pages, encode_pages, page_shapes
from ringspan.kernels.rotate import hadamard

P = 16


def make(tokens, dim, seed=0):
    """Rows and dimensions of unequal size."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(2, tokens, 2, dim, generator=random)
    x *= 0.5 + torch.rand(tokens, 1, 1, generator=random)
    return x * (0.5 + torch.rand(dim, generator=random))


def there_and_back(kind, k, v):
    units = -(-k.shape[0] // P)
    tensors = tuple(
        torch.zeros(units, *shape, dtype=dtype)
        for _, shape, dtype in page_shapes(kind, 2, k.shape[2], P)
    )
    encode_pages(kind, k, v, tensors)
    back = torch.empty_like(k), torch.empty_like(v)
    decode_pages(kind, tensors, *back)
    return tensors, *back


def rotated(x):
    dim = x.shape[-1]
    return hadamard(x.float()).double() if dim & (dim - 1) == 0 else x.double()


def odd_levels(z):
    """z [P, H, D] -> -3, -1, 1, 3: by steps of STEP times the rms of a row."""
    step = STEP * z.pow(2).mean(-1, keepdim=True).sqrt()
    return 2 * (z / step).floor().clamp(-2, 1) + 1


def of_their_length(w, y):
    """w [P, H, D] scaled to the length of y's rows, the factor as fp16 holds it in units of w / 512
    or of w / 2."""
    return w * (y.norm(dim=-1, keepdim=True) / w.norm(dim=-1, keepdim=True))


def v_by_the_formula(y):
    """One page y [P, H, D] fp64."""
    n = y / y.pow(2).mean(-1, keepdim=True).sqrt()
    spread = n.pow(2).mean(0).sqrt()  # [H, D]
    dims = (LARGEST_DIM * spread / spread.amax(-1, keepdim=True)).round().clamp(1)
    return of_their_length(odd_levels(n / dims) * dims, y)


def k_by_the_formula(y):
    mean = y.mean(0).half().double()
    return of_their_length(odd_levels(y - mean), y - mean) + mean


def assert_nearly_all_close(got, want):
    """A value on the edge of a step may fall to either side; scales are fp16."""
    size = want.pow(2).mean().sqrt()
    far = ((got.double() - want).abs() > 2e-3 * want.abs() + 2e-3 * size).any(-1)
    assert far.double().mean() < 0.02


@pytest.mark.parametrize("dim", [32, 80, 128, 256])
@pytest.mark.parametrize("kind", ["k4v2", "int2"])
def test_two_bits_decode_to_their_formula(kind, dim):
    k, v = make(40, dim)
    _, k_back, v_back = there_and_back(kind, k, v)
    for start in (0, 16, 32):
        page = slice(start, min(start + P, 40))
        assert_nearly_all_close(rotated(v_back[page]), v_by_the_formula(rotated(v[page])))
        if kind == "int2":
            assert_nearly_all_close(rotated(k_back[page]), k_by_the_formula(rotated(k[page])))


@pytest.mark.parametrize("kind", ["k4v2", "int2"])
def test_rows_of_v_keep_their_length(kind):
    k, v = make(64, 64)
    *_, v_back = there_and_back(kind, k, v)
    torch.testing.assert_close(v_back.norm(dim=-1), v.norm(dim=-1), rtol=1e-3, atol=0)


def test_k_of_k4v2_is_that_of_int4():
    k, v = make(40, 64)
    four, k_four, _ = there_and_back("int4", k, v)
    mixed, k_mixed, _ = there_and_back("k4v2", k, v)
    assert torch.equal(k_four, k_mixed)
    assert all(torch.equal(a, b) for a, b in zip(four[:4], mixed[:4], strict=True))


def test_scales_of_dimensions_win_on_unequal_dimensions():
    """Not rotated: a dimension of a tenth of the size keeps its signs and its size."""
    k, v = make(128, 96)
    v[..., ::2] *= 0.1
    *_, v_back = there_and_back("k4v2", k, v)
    small, back = v[..., ::2], v_back[..., ::2]
    assert (small - back).pow(2).mean() < 0.25 * small.pow(2).mean()


def test_a_sink_leaves_the_mean_of_its_page_out():
    k, v = make(48, 64)
    k += 3 * torch.randn(64, generator=torch.Generator().manual_seed(9))
    k[20, 1] *= 0.02
    tensors, k_back, _ = there_and_back("int2", k, v)
    assert (tensors[2] == 0).all(-1).tolist() == [[False, False], [False, True], [False, False]]
    assert (k_back[20, 1] - k[20, 1]).norm() < 0.5 * k[20, 1].norm()


@pytest.mark.parametrize("kind", ["k4v2", "int2"])
def test_what_fp16_cannot_hold_comes_back_as_nan(kind):
    k, v = make(16, 96)
    v[2, 1] = 1e7
    _, k_back, v_back = there_and_back(kind, k, v)
    assert v_back[2, 1].isnan().all()
    v_back[2, 1] = 0.0
    assert v_back.isfinite().all()
    assert k_back.isfinite().all()


@pytest.mark.parametrize("kind", ["k4v2", "int2"])
def test_sizes_that_fp32_could_not_square_are_coded(kind):
    k, v = make(16, 64)
    *_, v_back = there_and_back(kind, k, v * 1e-4)
    assert (v_back * 1e4 - v).norm() < 0.5 * v.norm()
    *_, v_back = there_and_back(kind, k, v * 1e-30)
    assert v_back.isfinite().all()


def test_what_does_not_pack_is_refused():
    with pytest.raises(ValueError, match=r"head_dim 63 .* k4v2 .* expected both even"):
        page_shapes("k4v2", 2, 63, 16)
    with pytest.raises(ValueError, match=r"head_dim 66 .* int2 .* multiples of 4 and of 2"):
        page_shapes("int2", 2, 66, 16)
    assert math.prod(page_shapes("int2", 1, 64, 16)[0][1]) == 64 * 16 / 4
