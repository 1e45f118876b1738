import math

import pytest
import torch

from ringspan.kernels import page_nuq, page_turn
from ringspan.kernels.page_nuq import NUQ3, NUQ4, decode_pages, encode_pages
from ringspan.kernels.rotate import hadamard

pytestmark = [
    pytest.mark.usefixtures("dirty_empty"),
    # what Triton's interpreter computes of inf, or of what fp16 cannot hold
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
]

LEVELS = [NUQ4, NUQ3]
LEAST_SQNR_DB = {4: 19.5, 3: 14.0}
K_CODES, K_SCALE, K_MEAN, K_KEPT, K_ROW, V_CODES, V_SCALE, V_ROW = range(8)


def bits(levels):
    return f"nuq{levels.bits}"


def make(tokens, dim, heads=2, dtype=torch.float32, device="cpu", seed=0):
    """k with large biases, v; both slices of wider rows, so that strides count."""
    random = torch.Generator().manual_seed(seed)
    both = torch.randn(2, tokens, heads + 1, dim + 16, generator=random)
    both[0] += 6 * torch.randn(heads + 1, dim + 16, generator=random)
    k, v = both.to(device, dtype)[:, :, :heads, :dim]
    return k, v


def with_positions(x, base, first=0):
    """x [T, H, D], the token at position first + t turned as the half-split form does."""
    dim = x.shape[2]
    angle = base ** (-2 * torch.arange(dim // 2, dtype=torch.float64) / dim)
    angle = (first + torch.arange(len(x), dtype=torch.float64))[:, None, None] * angle
    a, b = x.double().chunk(2, -1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).float()


def empty(levels, k, page_tokens):
    units = -(-k.shape[0] // page_tokens)
    made = page_nuq.shapes(levels, k.shape[1], k.shape[2], page_tokens, k.dtype)
    return tuple(torch.empty(units, *s, dtype=dtype, device=k.device) for _, s, dtype in made)


def encoded(levels, k, v, page_tokens, encode=encode_pages):
    into = empty(levels, k, page_tokens)
    encode(levels, k, v, into)
    return into


def decoded(levels, tensors, like, tokens=None, decode=decode_pages):
    shape = (2, tokens or like.shape[0], like.shape[1] + 1, like.shape[2] + 16)
    k, v = torch.empty(shape, dtype=like.dtype, device=like.device)
    k, v = (x[:, : like.shape[1], : like.shape[2]] for x in (k, v))
    decode(levels, tensors, k, v)
    return k, v


def same_bits(a, b):
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def sqnr_db(x, y):
    x, y = x.double(), y.double()
    return 10 * math.log10(x.pow(2).sum() / (x - y).pow(2).sum())


@pytest.mark.parametrize("levels", LEVELS, ids=bits)
@pytest.mark.parametrize("dim", [64, 80, 128])
def test_pages_come_back_with_the_error_of_their_bits(levels, dim):
    k, v = make(150, dim)
    for x, y in zip((k, v), decoded(levels, encoded(levels, k, v, 64), k), strict=True):
        assert sqnr_db(x, y) > LEAST_SQNR_DB[levels.bits]


@pytest.mark.parametrize("levels", LEVELS, ids=bits)
def test_levels_are_the_best_for_a_normal_distribution(levels):
    """Each magnitude is the mean of what is nearest to it (Lloyd and Max), in whole numbers."""
    sizes = torch.randn(400_000, generator=torch.Generator().manual_seed(1)).abs()
    sizes *= levels.deviation
    nearest = torch.bucketize(sizes, torch.tensor(levels.edges))
    for i, magnitude in enumerate(levels.magnitudes):
        assert abs(sizes[nearest == i].mean() - magnitude) < 0.02 * magnitude + 0.6


@pytest.mark.parametrize("levels", LEVELS, ids=bits)
@pytest.mark.parametrize("dim", [16, 80])
def test_codes_of_any_kind_come_out_of_their_bytes(levels, dim):
    codes = torch.randint(0, 2**levels.bits, (dim, 2, 3, 4), dtype=torch.uint8)
    packed = page_nuq.pack(levels, codes)
    assert packed.shape == (2, 3, 4, page_nuq.row_bytes(levels, dim))
    assert torch.equal(page_nuq.unpack(levels, packed, dim), codes)


def test_bytes_are_what_the_layout_says():
    codes = torch.zeros(16, 1, 1, 1, dtype=torch.uint8)
    codes[3], codes[11] = 0b1010, 0b0101
    assert page_nuq.pack(NUQ4, codes).flatten().tolist() == [0, 0, 0, 0b01011010, 0, 0, 0, 0]
    codes[3], codes[11] = 0b110, 0b001  # magnitude 2, negative; magnitude 1
    assert page_nuq.pack(NUQ3, codes).flatten().tolist() == [0, 0, 0, 0b00010010, 0, 0b10]


@pytest.mark.parametrize("levels", LEVELS, ids=bits)
@pytest.mark.parametrize("dim", [32, 64, 128])
def test_values_decode_to_the_formula(levels, dim):
    k, v = make(32, dim)
    tensors = encoded(levels, k, v, 32)
    _, got = decoded(levels, tensors, v)
    step = tensors[V_SCALE].double() / 64  # [1, H, P]
    signed = torch.tensor([*levels.magnitudes, *(-m for m in levels.magnitudes)]).double()
    codes = page_nuq.unpack(levels, tensors[V_CODES], dim).permute(1, 3, 2, 0)[0]  # [P, H, D]
    y = hadamard(v).double()
    of_code = signed[codes.long()] * step[0].T[..., None]
    other = signed * step[0].T[..., None]
    best = (y[..., None] - other[..., None, :]).abs().amin(-1)
    torch.testing.assert_close((y - of_code).abs(), best, rtol=0, atol=1e-5)
    want = hadamard(of_code.float())
    for head, at in enumerate(tensors[K_KEPT][0, :, 0].tolist()):
        want[at, head] = v[at, head].bfloat16().float()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("base", [b for b in page_turn.BASES if b])
@pytest.mark.parametrize("first", [0, 128_000])
def test_the_base_of_the_positions_is_found_in_the_page(base, first, device):
    random = torch.Generator().manual_seed(2)
    u = torch.randn(1, 2, 128, generator=random) + 0.5 * torch.randn(128, 2, 128, generator=random)
    k = with_positions(u, base, first).to(device)
    tensors = encoded(NUQ4, k, k, 128)
    assert [page_turn.BASES[i] for i in tensors[K_KEPT][0, :, 1].tolist()] == [base, base]


def test_keys_without_positions_are_left_as_they_are(device):
    k = make(128, 64, device=device)[0]
    assert encoded(NUQ4, k, k, 128)[K_KEPT][..., 1].tolist() == [[0, 0]]


def test_turning_back_makes_the_mean_worth_more():
    """Keys of one bias under rotary positions: their page mean is the bias again, and its energy
    leaves what is coded."""
    random = torch.Generator().manual_seed(3)
    u = 8 * torch.randn(1, 2, 64, generator=random) + torch.randn(128, 2, 64, generator=random)
    k = with_positions(u, 1e4)
    got, _ = decoded(NUQ4, encoded(NUQ4, k, k, 128), k)
    assert sqnr_db(k, got) > sqnr_db(u - u.mean(0), u - u.mean(0) + (got - k)) + 12


@pytest.mark.parametrize("levels", LEVELS, ids=bits)
def test_a_sink_is_kept_as_it_is_and_spoils_no_mean(levels, device):
    k, v = make(48, 64, device=device)
    k[20, 1] *= 0.02  # in the second page, unlike the rest of it
    tensors = encoded(levels, k, v, 16)
    assert tensors[K_KEPT][1, 1, 0] == 4
    got_k, got_v = decoded(levels, tensors, k)
    for x, got in ((k, got_k), (v, got_v)):
        assert same_bits(got[20, 1].cpu(), x[20, 1].bfloat16().float().cpu())
    u = torch.cat((k[16:20, 1], k[21:32, 1])).cpu()
    torch.testing.assert_close(tensors[K_MEAN][1, 1].cpu(), u.mean(0).half(), rtol=2e-3, atol=2e-3)


def test_a_second_sink_leaves_the_mean_out(device):
    k, v = make(16, 64, device=device)
    k[4, 0] *= 0.02
    k[5, 0] *= 0.02
    tensors = encoded(NUQ4, k, v, 16)
    assert (tensors[K_MEAN][0] == 0).all(-1).tolist() == [True, False]
    got, _ = decoded(NUQ4, tensors, k)
    for token in (4, 5):
        assert sqnr_db(k[token, 0], got[token, 0]) > LEAST_SQNR_DB[4] - 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_kept_row_of_16_bits_is_exact(dtype, device):
    k, v = make(64, 64, dtype=dtype, device=device)
    tensors = encoded(NUQ4, k, v, 64)
    got_k, got_v = decoded(NUQ4, tensors, k)
    for head, at in enumerate(tensors[K_KEPT][0, :, 0].tolist()):
        assert same_bits(got_k[at, head], k[at, head])
        assert same_bits(got_v[at, head], v[at, head])


@pytest.mark.parametrize("levels", LEVELS, ids=bits)
def test_a_page_has_the_same_bytes_alone_and_among_others(levels):
    k, v = make(300, 128, heads=9)
    together = encoded(levels, k, v, 32)
    for start, stop in ((0, 32), (32, 128), (128, 300), (288, 300)):
        alone = encoded(levels, k[start:stop], v[start:stop], 32)
        for one, whole in zip(alone, together, strict=True):
            assert same_bits(one, whole[start // 32 : -(-stop // 32)])


@pytest.mark.parametrize("levels", LEVELS, ids=bits)
def test_a_short_page_is_filled_up_with_zero_bytes(levels, device):
    k, v = make(21, 64, device=device)
    tensors = encoded(levels, k, v, 16)
    for index in (K_CODES, K_SCALE, V_CODES, V_SCALE):
        assert (tensors[index][1, :, 5:] == 0).all()
    assert (tensors[K_KEPT][1, :, 0] < 5).all()


@pytest.mark.parametrize("levels", LEVELS, ids=bits)
def test_the_first_tokens_alone_can_be_decoded(levels, device):
    k, v = make(40, 64, device=device)
    tensors = encoded(levels, k, v, 16)
    whole = decoded(levels, tensors, k)
    for tokens in (1, 16, 35):
        for part, all_of_it in zip(decoded(levels, tensors, k, tokens), whole, strict=True):
            assert same_bits(part, all_of_it[:tokens])


@pytest.mark.parametrize("levels", LEVELS, ids=bits)
def test_zeros_come_back_as_zeros(levels, device):
    k, v = make(16, 64, device=device)
    k[3] = v[3] = v[4] = 0.0
    got_k, got_v = decoded(levels, encoded(levels, k, v, 16), k)
    assert (got_k[3] == 0).all()  # the row least like the mean
    assert (got_v[3:5] == 0).all()
    k[:], v[:] = 0.0, 0.0
    assert not any(x.any() for x in decoded(levels, encoded(levels, k, v, 16), k))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("levels", LEVELS, ids=bits)
def test_a_row_that_is_not_finite_is_seen_and_spoils_no_other(levels, value, device):
    k, v = make(20, 64, device=device)
    k[3, 1, 5] = v[18, 0, 7] = value
    got_k, got_v = decoded(levels, encoded(levels, k, v, 16), k)
    for got, (token, head), x in ((got_k, (3, 1), k), (got_v, (18, 0), v)):
        assert not got[token, head].isfinite().all()
        got[token, head] = x[token, head] = 0.0
        assert sqnr_db(x, got) > LEAST_SQNR_DB[levels.bits]


def test_a_page_of_nothing_finite_comes_back_so(device):
    k, v = make(16, 64, device=device)
    k[:] = float("nan")
    got_k, got_v = decoded(NUQ4, encoded(NUQ4, k, v, 16), k)
    assert got_k.isnan().all()
    assert sqnr_db(v, got_v) > LEAST_SQNR_DB[4]


def test_what_fp16_cannot_hold_comes_back_as_nan_or_as_it_was(device):
    k, v = make(16, 64, device=device)
    k[2, 0] *= 1e6
    v[2:4, 1] *= 1e6
    tensors = encoded(NUQ4, k, v, 16)
    got_k, got_v = decoded(NUQ4, tensors, k)
    assert not (got_k[:, 0].isfinite().all(-1) & (sqnr_db(k[:, 0], got_k[:, 0]) < 30)).any()
    assert got_k[:, 1].isfinite().all()
    assert got_v[[*range(2), *range(4, 16)], 1].isfinite().all()
    assert got_v[2:4, 1].isnan().all(-1).sum() >= 1


def test_no_tokens_are_no_pages():
    k, v = make(0, 64)
    assert [len(t) for t in encoded(NUQ4, k, v, 16)] == [0] * 8


def test_what_does_not_fit_is_refused_by_name():
    k, v = make(20, 64)
    good = empty(NUQ4, k, 16)
    with pytest.raises(ValueError, match="40 tokens in 2 pages of 16: pass them all"):
        encode_pages(NUQ4, *make(40, 64), good)
    with pytest.raises(ValueError, match="have 8 tensors, found 4"):
        encode_pages(NUQ4, k, v, good[:4])
    with pytest.raises(ValueError, match=r"k_scale is .* expected .*torch.float16"):
        encode_pages(NUQ4, k, v, (good[0], good[1].float(), *good[2:]))
    with pytest.raises(ValueError, match=r"k_codes is .* expected \(2, 2, 16, 24\)"):
        encode_pages(NUQ3, k, v, good)
    with pytest.raises(ValueError, match=r"v_row has strides|v_row on .* has strides"):
        encode_pages(NUQ4, k, v, (*good[:7], torch.empty(2, 64, 2).bfloat16().transpose(1, 2)))
    with pytest.raises(ValueError, match="contiguous last axis"):
        encode_pages(NUQ4, k.transpose(1, 2), v.transpose(1, 2), good)
    with pytest.raises(ValueError, match="expected both"):
        encode_pages(NUQ4, k, v[:5], good)
    with pytest.raises(ValueError, match=r"head_dim 100: codes of 3 bits fill bytes 8 at a time"):
        page_nuq.shapes(NUQ3, 2, 100, 128, torch.float32)


def assert_same_up_to_the_order_of_a_sum(levels, got, expected):
    got = [tensor.cpu() for tensor in got]
    assert torch.equal(got[K_KEPT], expected[K_KEPT])
    for index in (K_ROW, V_ROW):
        assert same_bits(got[index], expected[index])
    for index in (K_SCALE, K_MEAN, V_SCALE):
        # a value at an edge may take the level beside it, and the fit moves its row's scale
        one, other = got[index].float(), expected[index].float()
        torch.testing.assert_close(one, other, rtol=3e-2, atol=1e-4, equal_nan=True)
        close = torch.isclose(one, other, rtol=4e-3, atol=1e-4, equal_nan=True)
        assert (~close).float().mean() < 5e-3
    dim = got[K_ROW].shape[-1]
    for index in (K_CODES, V_CODES):
        one, other = (page_nuq.unpack(levels, x[index], dim) for x in (got, expected))
        assert (one != other).float().mean() < 5e-3


@pytest.mark.parametrize(("dim", "page_tokens"), [(64, 16), (128, 32), (256, 16)], ids=str)
@pytest.mark.parametrize("levels", LEVELS, ids=bits)
def test_encoding_kernel_agrees_with_the_definition(levels, dim, page_tokens, device):
    from ringspan.kernels import page_nuq_triton

    if device.type == "cuda" and page_tokens < 32:
        pytest.skip("the kernel is used for products of 16 and more rows")
    k, v = make(2 * page_tokens + 5, dim, dtype=torch.float16, device=device)
    k[page_tokens + 1, 0] *= 0.02
    k[page_tokens + 2 : page_tokens + 4, 1] *= 0.02
    k[3, 1, 5], v[4, 0, 6], v[5, 1] = float("nan"), float("inf"), 0.0
    expected = encoded(levels, k.cpu(), v.cpu(), page_tokens, page_nuq.encode)
    got = encoded(levels, k, v, page_tokens, page_nuq_triton.encode)
    assert_same_up_to_the_order_of_a_sum(levels, got, expected)


@pytest.mark.parametrize(("dim", "page_tokens"), [(64, 16), (128, 32), (256, 16)], ids=str)
@pytest.mark.parametrize("levels", LEVELS, ids=bits)
def test_decoding_kernel_gives_the_bits_of_the_definition(levels, dim, page_tokens, device):
    from ringspan.kernels import page_nuq_triton

    if device.type == "cuda" and page_tokens < 32:
        pytest.skip("the kernel is used for products of 16 and more rows")
    k, v = make(2 * page_tokens, dim, dtype=torch.float16)
    k = with_positions(k.float(), 1e6, 640).half()
    tensors = encoded(levels, k, v, page_tokens)
    on_device = tuple(tensor.to(device) for tensor in tensors)
    expected = decoded(levels, tensors, k, page_tokens + 5)
    like = k.to(device)
    got = decoded(levels, on_device, like, page_tokens + 5, page_nuq_triton.decode)
    assert all(same_bits(one.cpu(), other) for one, other in zip(got, expected, strict=True))


def test_more_pages_than_programs_are_all_done(device, monkeypatch):
    from ringspan.kernels import page_nuq_triton

    for name, config in page_nuq_triton.CONFIGS.items():
        monkeypatch.setitem(page_nuq_triton.CONFIGS, name, config._replace(programs=3))
    k, v = make(130, 64, dtype=torch.float16, device=device)
    got = encoded(NUQ4, k, v, 32, page_nuq_triton.encode)
    expected = encoded(NUQ4, k.cpu(), v.cpu(), 32, page_nuq.encode)
    assert_same_up_to_the_order_of_a_sum(NUQ4, got, expected)
    back = decoded(NUQ4, got, k, decode=page_nuq_triton.decode)
    want = decoded(NUQ4, tuple(tensor.cpu() for tensor in got), k.cpu())
    assert all(same_bits(a.cpu(), b) for a, b in zip(back, want, strict=True))


GPU_SIZES = [(64, 128), (80, 128), (128, 128), (256, 64)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("dim", "page_tokens"), GPU_SIZES, ids=str)
@pytest.mark.parametrize("levels", LEVELS, ids=bits)
def test_gpu_encodes_and_decodes_as_the_cpu(levels, dim, page_tokens, dtype, device):
    k, v = make(1000, dim, heads=3, dtype=dtype)
    k = with_positions(k.float(), 5e5, 1280).to(dtype)
    k[300] *= 0.02
    k[700, 1, 5], v[3, 0, 6], v[4] = float("nan"), float("inf"), 0.0
    got = encoded(levels, k.to(device), v.to(device), page_tokens)
    expected = encoded(levels, k, v, page_tokens)
    assert_same_up_to_the_order_of_a_sum(levels, got, expected)
    on_gpu = tuple(tensor.to(device) for tensor in expected)
    back = decoded(levels, on_gpu, k.to(device), 990)
    want = decoded(levels, expected, k, 990)
    for one, other in zip(back, want, strict=True):
        one = one.cpu()
        assert torch.equal(one.isnan(), other.isnan())  # whose bits are the machine's business
        assert same_bits(
            one.nan_to_num(nan=0.0, posinf=torch.inf), other.nan_to_num(nan=0.0, posinf=torch.inf)
        )
