import pytest
import torch

from ringspan.kernels.flash import flash, flash_ref

pytestmark = pytest.mark.usefixtures("dirty_empty")

FULL = {"causal": False, "offset": 0}

# T, S, Hq, Hkv, D, mask
CASES = {
    "one row": (1, 70, 2, 1, 64, FULL),
    "one key": (5, 1, 1, 1, 16, FULL),
    "odd full": (37, 75, 2, 2, 64, FULL),
    "causal square": (65, 65, 4, 2, 64, {"causal": True, "offset": 0}),
    "causal aligned": (33, 100, 1, 1, 64, {"causal": True, "offset": 67}),
    "causal, keys ahead of all rows": (40, 100, 1, 1, 16, {"causal": True, "offset": 10}),
    "causal, rows without keys": (70, 40, 1, 1, 16, {"causal": True, "offset": -35}),
    "causal, nothing seen": (4, 5, 1, 1, 16, {"causal": True, "offset": -9}),
    "window": (70, 70, 2, 1, 32, {"causal": True, "offset": 0, "window": 13}),
    "window of one key": (40, 90, 1, 1, 16, {"causal": True, "offset": 50, "window": 1}),
    "window behind": (40, 64, 1, 1, 16, {"causal": False, "offset": 64, "window": 40}),
    "window, wide": (64, 150, 1, 1, 16, {"causal": True, "offset": 86, "window": 100}),
    "softcap": (33, 65, 2, 1, 64, {"causal": True, "offset": 32, "softcap": 3.0}),
    "head_dim 80": (33, 40, 1, 1, 80, {"causal": True, "offset": 7}),
    "head_dim 256": (5, 33, 1, 1, 256, FULL),
}


def inputs(case, dtype, device, seed=0):
    rows, keys, q_heads, kv_heads, dim, mask = case
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(n, h, dim, generator=generator).to(device, dtype)
        for n, h in ((rows, q_heads), (keys, kv_heads), (keys, kv_heads))
    )
    return (q, k, v), {"window": None, "softcap": 0.0, "scale": dim**-0.5, **mask}


def launch(tensors, mask, **overrides):
    """The Triton kernel, on the GPU or under the interpreter."""
    from ringspan.kernels.flash_triton import flash_triton

    return flash_triton(*tensors, **mask, **overrides)


def low_precision(q, k, v, *, causal, offset, window, softcap, scale):
    """The definition with scores and weights rounded to q's dtype, as plain torch would do it."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    scores = torch.einsum("thd,shd->hts", q * scale, k)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    ahead = torch.arange(q.shape[0])[:, None] + offset - torch.arange(k.shape[0])
    hidden = (ahead < 0) & causal | (ahead >= (window or 1 << 40))
    weights = scores.masked_fill(hidden.to(q.device), -torch.inf).softmax(-1).nan_to_num(0.0)
    return torch.einsum("hts,shd->thd", weights, v)


def assert_as_good_as_ref(got, tensors, mask, factor=2.0, floor=1e-5):
    """`got` may err from the fp64 truth at most `factor` times what the same precision does."""
    truth = flash_ref(*(x.double() for x in tensors), **mask)
    allowed = factor * (low_precision(*tensors, **mask).double() - truth.out).abs().max() + floor
    error = (got.out.double() - truth.out).abs().max()
    assert error <= allowed, f"max error {error:.3g} > allowed {allowed:.3g}"
    assert torch.equal(got.lse.isneginf(), truth.lse.isneginf())
    assert (got.out[truth.lse.isneginf()] == 0).all()
    seen = truth.lse.isfinite()
    slack = 1e-5 if tensors[0].dtype == torch.float32 else 2e-3
    torch.testing.assert_close(got.lse[seen], truth.lse[seen].float(), rtol=slack, atol=slack)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.float32) for name in CASES]
    + [(name, torch.float16) for name in ("odd full", "causal square", "window", "head_dim 80")],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_kernel_is_as_good_as_the_definition(name, dtype, device):
    tensors, mask = inputs(CASES[name], dtype, device)
    assert_as_good_as_ref(launch(tensors, mask), tensors, mask)


@pytest.mark.parametrize("blocks", [(16, 64), (64, 16)], ids=["wide", "tall"])
def test_the_tile_shape_changes_nothing_but_rounding(blocks, device):
    from ringspan.kernels.flash_triton import Config

    case = (70, 130, 1, 1, 16, {"causal": True, "offset": 60, "window": 33})
    tensors, mask = inputs(case, torch.float32, device)
    part = launch(tensors, mask, config=Config(*blocks, 4, 1))
    torch.testing.assert_close(part, flash_ref(*tensors, **mask), rtol=1e-5, atol=1e-5)


def test_splitting_the_keys_changes_nothing_but_rounding(device):
    tensors, mask = inputs((2, 1100, 4, 2, 16, FULL), torch.float32, device)
    whole, split = (launch(tensors, mask, splits=n) for n in (1, 3))
    torch.testing.assert_close(split, whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(split, flash_ref(*tensors, **mask), rtol=1e-5, atol=1e-5)


def test_strided_q_k_v_are_read_in_place(device):
    (q, k, v), mask = inputs((20, 30, 2, 2, 16, FULL), torch.float32, device)
    q_view = q.transpose(0, 1).contiguous().transpose(0, 1)
    kv = torch.stack((k, v), 1)
    part = launch((q_view, kv[:, 0], kv[:, 1]), mask)
    torch.testing.assert_close(part, launch((q, k, v), mask), rtol=0, atol=0)


@pytest.mark.parametrize("name", CASES)
def test_definition_does_not_depend_on_its_row_tiles(name, monkeypatch):
    tensors, mask = inputs(CASES[name], torch.float32, "cpu")
    whole = flash_ref(*tensors, **mask)
    monkeypatch.setattr("ringspan.kernels.flash.TILE_BYTES", 2048)
    torch.testing.assert_close(flash_ref(*tensors, **mask), whole, rtol=1e-6, atol=1e-6)
    expected = low_precision(*(x.double() for x in tensors), **mask)
    torch.testing.assert_close(whole.out, expected.float(), rtol=1e-5, atol=1e-5)


def test_no_keys_give_an_empty_part():
    part = flash(torch.randn(3, 2, 8), torch.randn(0, 1, 8), torch.randn(0, 1, 8), **FULL, scale=1)
    assert (part.out == 0).all()
    assert part.lse.isneginf().all()


def test_a_last_axis_that_is_not_contiguous_is_refused():
    with pytest.raises(ValueError, match="contiguous last axis"):
        flash(
            torch.randn(3, 2, 16)[..., ::2],
            torch.randn(3, 2, 8),
            torch.randn(3, 2, 8),
            **FULL,
            scale=1,
        )


def test_the_config_is_the_first_that_fits_the_shared_memory(monkeypatch):
    from ringspan.kernels import flash_triton

    for limit, expected in ((227 << 10, 0), (99 << 10, 1), (48 << 10, 2)):
        monkeypatch.setattr(flash_triton, "_shared_limit", lambda _, limit=limit: limit)
        picked = flash_triton.pick_config(torch.device("cuda", 0), 128, 2)
        assert picked == flash_triton.CONFIGS[128][expected]


def test_keys_are_split_only_when_programs_are_few():
    from ringspan.kernels.flash_triton import num_splits

    assert num_splits(programs=1000, keys=1 << 20, num_sms=132) == 1
    assert num_splits(programs=8, keys=1 << 20, num_sms=132) == 33
    assert num_splits(programs=8, keys=600, num_sms=132) == 1


GPU_MASKS = {
    "full": (FULL, 1000, 1531),
    "causal": ({"causal": True, "offset": 0}, 1025, 1025),
    "offset": ({"causal": True, "offset": 700}, 300, 1000),
    "window": ({"causal": True, "offset": 0, "window": 300}, 1000, 1000),
    "softcap": ({"causal": True, "offset": 0, "softcap": 20.0}, 500, 500),
    "one row": (FULL, 1, 20000),
}


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 80, 128, 256])
@pytest.mark.parametrize("name", GPU_MASKS)
def test_bf16_on_a_gpu_errs_at_most_twice_as_much_as_plain_bf16(name, dim, device):
    mask, rows, keys = GPU_MASKS[name]
    tensors, mask = inputs((rows, keys, 8, 2, dim, mask), torch.bfloat16, device)
    assert_as_good_as_ref(flash(*tensors, **mask), tensors, mask, floor=1e-3)


@pytest.mark.gpu
def test_offsets_beyond_two_to_the_31_are_reached(device):
    rows, heads, dim = 150_000, 128, 128  # 2.46e9 elements of out
    k, v = torch.randn(2, 64, 1, dim, device=device, dtype=torch.bfloat16)
    q = torch.randn(1, heads, dim, device=device, dtype=torch.bfloat16).expand(rows, -1, -1)
    part = flash(q, k, v, **FULL, scale=0.1)
    assert torch.equal(part.out[-1], part.out[0])
    assert torch.equal(part.lse[-1], part.lse[0])
