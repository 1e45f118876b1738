import pytest
import torch

from ringspan.kernels.flash import flash, flash_ref
from ringspan.types import Part

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


CARRIED = {
    "full": (37, 75, 2, 2, 16, FULL),
    "causal": (65, 65, 4, 2, 16, {"causal": True, "offset": 0}),
    "window": (70, 70, 2, 1, 32, {"causal": True, "offset": 0, "window": 13}),
    "softcap": (33, 65, 2, 1, 16, {"causal": True, "offset": 32, "softcap": 3.0}),
    "rows without keys": (70, 40, 1, 1, 16, {"causal": True, "offset": -35}),
    "nothing seen": (4, 5, 1, 1, 16, {"causal": True, "offset": -9}),
    "few rows over heads of a group": (3, 70, 4, 2, 16, FULL),
    "split keys": (2, 1100, 4, 2, 16, FULL),
}


def carried_case(name, dtype, device):
    """-> q, k, v, mask, what is carried (its first two rows have seen nothing), sinks, the truth.

    The truth is fp64: the keys of both parts and the sinks in one softmax.
    """
    (q, k, v), mask = inputs(CARRIED[name], dtype, device)
    generator = torch.Generator().manual_seed(1)
    before = torch.randn(50, k.shape[1], 2 * k.shape[2], generator=generator).to(device, dtype)
    k_before, v_before = before.chunk(2, -1)
    sinks = torch.randn(q.shape[1], generator=generator).to(device) * 2
    first = flash_ref(
        q.double(), k_before.double(), v_before.double(), **mask | {"causal": True, "offset": -2,
        "window": None}
    )  # fmt: skip
    second = flash_ref(*(x.double() for x in (q, k, v)), **mask)
    lses = torch.stack(
        (first.lse.double(), second.lse.double(), sinks.double().expand(q.shape[:2]))
    )
    outs = torch.stack((first.out, second.out, torch.zeros_like(first.out)))
    return (q, k, v), mask, first, sinks, (outs, lses)


def softmax_merged(outs, lses):
    """Parts [P, T, Hq, D] and [P, T, Hq] as one, in fp64, without the code under test."""
    lse = lses.logsumexp(0)
    weights = (lses - torch.where(lse.isneginf(), 0.0, lse)).exp()
    return Part((weights[..., None] * outs).sum(0), lse)


def accumulator(part, strided):
    """An fp32 copy of the part, as slices of longer rows if `strided`."""
    rows, heads, dim = part.out.shape
    pad = 3 if strided else 0
    out = torch.zeros(heads, rows, dim + pad, device=part.out.device)[..., :dim].transpose(0, 1)
    lse = torch.zeros(heads, rows, device=part.lse.device).t()
    if not strided:
        out, lse = out.contiguous(), lse.contiguous()
    return Part(out.copy_(part.out), lse.copy_(part.lse))


@pytest.mark.parametrize(
    ("parts", "strided"),
    [("into", False), ("into", True), ("sinks", False), ("both", True)],
    ids=["into", "into strided", "sinks", "both strided"],
)
@pytest.mark.parametrize("run", ["kernel", "definition"])
@pytest.mark.parametrize("name", CARRIED)
def test_a_carried_part_and_sinks_are_further_terms_of_one_softmax(
    name, run, strided, parts, device
):
    tensors, mask, first, sinks, (outs, lses) = carried_case(name, torch.float32, device)
    chosen = {"into": [0, 1], "sinks": [1, 2], "both": [0, 1, 2]}[parts]
    truth = softmax_merged(outs[chosen], lses[chosen])
    into = None if parts == "sinks" else accumulator(first, strided)
    extra = {"into": into, "sinks": None if parts == "into" else sinks}
    splits = {"splits": 3} if name == "split keys" and run == "kernel" else {}
    if run == "kernel":
        got = launch(tensors, mask, **extra, **splits)
    else:
        got = flash_ref(*tensors, **mask, **extra)
    if into is not None:
        assert got.out is into.out
        assert got.lse is into.lse
    torch.testing.assert_close(got.out, truth.out.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.lse, truth.lse.float(), rtol=1e-5, atol=1e-5)


def test_carrying_over_hops_equals_one_call(device):
    """What a ring does: the keys arrive in three blocks, the accumulators start empty."""
    (q, k, v), mask = inputs(
        (40, 90, 2, 1, 16, {"causal": True, "offset": 50}), torch.float16, device
    )
    part = Part(
        torch.zeros(q.shape, device=device), torch.full(q.shape[:2], -torch.inf, device=device)
    )
    for start, stop in ((64, 90), (0, 40), (40, 64)):
        hop = mask | {"offset": mask["offset"] - start, "into": part}
        part = launch((q, k[start:stop], v[start:stop]), hop)
    assert_as_good_as_ref(part, (q, k, v), mask)


@pytest.mark.parametrize("scale", [0.0, -0.3])
def test_a_scale_that_is_not_positive_is_served(scale, monkeypatch):
    """The kernels want a positive one: q takes the sign."""
    from ringspan.kernels import flash_tune

    monkeypatch.setattr(flash_tune, "choose", lambda *args, **kwargs: None)
    tensors, mask = inputs((20, 30, 2, 1, 16, {"causal": True, "offset": 10}), torch.float32, "cpu")
    mask["scale"] = scale
    part = flash_tune.flash_gpu(*tensors, **mask, into=None, sinks=None)
    torch.testing.assert_close(part, flash_ref(*tensors, **mask), rtol=1e-5, atol=1e-5)


def test_sinks_and_a_carried_part_are_kept_where_there_are_no_keys():
    q, none = torch.randn(3, 2, 8), torch.randn(0, 1, 8)
    sinks = torch.tensor([0.5, -1.0])
    part = flash(q, none, none, **FULL, scale=1, sinks=sinks)
    torch.testing.assert_close(part.lse, sinks.expand(3, 2))
    into = Part(torch.randn(3, 2, 8), torch.randn(3, 2))
    kept = Part(into.out.clone(), into.lse.clone())
    torch.testing.assert_close(flash(q, none, none, **FULL, scale=1, into=into), kept)


BAD = {
    "16-bit accumulators": (
        {"into": Part(torch.zeros(3, 2, 8).half(), torch.zeros(3, 2))},
        "expected float32",
    ),
    "another shape": (
        {"into": Part(torch.zeros(3, 1, 8), torch.zeros(3, 1))},
        "expected those of q",
    ),
    "a strided last axis": (
        {"into": Part(torch.zeros(3, 2, 16)[..., ::2], torch.zeros(3, 2))},
        "contiguous last axis",
    ),
    "sinks of kv heads": (
        {"sinks": torch.zeros(1)},
        r"expected contiguous float32 \[Hq\] = \(2,\)",
    ),
    "16-bit sinks": ({"sinks": torch.zeros(2).half()}, "expected contiguous float32"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_carried_parts_and_sinks_are_refused(name):
    extra, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        flash(torch.randn(3, 2, 8), *torch.randn(2, 5, 1, 8), **FULL, scale=1, **extra)


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
