"""Every backend is held to one definition, written here in the plainest way there is."""

from dataclasses import replace

import pytest
import torch

from ringspan.attention.backends.case import Mask, canonical_blocks
from ringspan.attention.local import BACKENDS, attend, case_of, choose, explain
from ringspan.errors import BadInput, UnknownName

FULL = {"causal": False, "offset": 0}

# T, S, Hq, Hkv, D, mask; cpu-flash cuts windows into tiles of 256 rows
CASES = {
    "full": (37, 131, 4, 4, 64, FULL),
    "one row, GQA 3": (1, 700, 9, 3, 64, FULL),
    "few rows, GQA 3": (5, 64, 9, 3, 16, FULL),
    "many rows, GQA 2": (130, 77, 4, 2, 80, FULL),
    "one row, one key": (1, 1, 1, 1, 8, FULL),
    "causal square": (129, 129, 9, 3, 64, {"causal": True, "offset": 0}),
    "causal aligned": (65, 700, 4, 2, 64, {"causal": True, "offset": 635}),
    "causal, last rows see all": (100, 60, 2, 1, 32, {"causal": True, "offset": 20}),
    "causal, first rows see none": (100, 60, 2, 1, 32, {"causal": True, "offset": -30}),
    "causal, keys ahead of all rows": (30, 600, 2, 1, 32, {"causal": True, "offset": 40}),
    "causal, nothing seen": (7, 9, 2, 1, 16, {"causal": True, "offset": -7}),
    "causal that hides nothing": (7, 9, 2, 1, 16, {"causal": True, "offset": 8}),
    "window": (600, 600, 3, 1, 16, {"causal": True, "offset": 0, "window": 77}),
    "window of one key": (33, 50, 2, 2, 16, {"causal": True, "offset": 17, "window": 1}),
    "window wider than the keys": (33, 50, 2, 2, 16, {"causal": True, "offset": 17, "window": 99}),
    "window over older keys": (300, 200, 2, 1, 16, {"causal": False, "offset": 200, "window": 250}),
    "window out of reach": (9, 20, 2, 1, 16, {"causal": True, "offset": 500, "window": 30}),
    "no keys": (5, 0, 2, 1, 16, FULL),
    "no rows": (0, 5, 2, 1, 16, {"causal": True, "offset": 5}),
    "softcap": (33, 65, 4, 2, 32, {"causal": True, "offset": 32, "softcap": 2.0}),
    "softcap window": (40, 40, 2, 2, 8, {"causal": True, "offset": 0, "softcap": 5.0, "window": 9}),
}  # fmt: skip
ON_CPU = ["auto", "cpu-flash", "reference"]
ON_GPU = ["auto", "fa4", "cudnn", "triton", "reference"]


def inputs(case, dtype=torch.float32, device="cpu"):
    rows, keys, q_heads, kv_heads, dim, mask = case
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(q_heads, rows, dim, generator=generator).transpose(0, 1)  # as the hook has it
    k, v = (torch.randn(keys, kv_heads, dim, generator=generator) for _ in range(2))
    return [x.to(device, dtype) for x in (q, k, v)], {**mask, "scale": dim**-0.5}


def definition(q, k, v, *, causal, offset, scale, window=None, softcap=0.0):
    """Plain torch in the dtype of its inputs -> out [T, Hq, D], lse [T, Hq]."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    scores = torch.einsum("thd,shd->ths", q, k) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    ahead = torch.arange(q.shape[0])[:, None] + offset - torch.arange(k.shape[0])
    hidden = (ahead < 0) & causal | (ahead >= (1 << 40 if window is None else window))
    scores = scores.masked_fill(hidden[:, None].to(q.device), -torch.inf)
    weights = scores.softmax(-1).nan_to_num(0.0)
    return torch.einsum("ths,shd->thd", weights, v), scores.double().logsumexp(-1)


def lacks(backend, mask):
    return "softcap" in mask and backend == "cpu-flash"


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", ON_CPU)
def test_backend_computes_the_definition(backend, name):
    tensors, mask = inputs(CASES[name])
    if lacks(backend, mask):
        with pytest.raises(BadInput, match="softcap"):
            attend(*tensors, **mask, backend=backend)
        return
    part = attend(*tensors, **mask, backend=backend)
    out, lse = definition(*(x.double() for x in tensors), **mask)
    assert part.lse.dtype == torch.float32
    assert part.out.shape == tensors[0].shape
    torch.testing.assert_close(part.out, out.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(part.lse, lse.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", ["few rows, GQA 3", "causal aligned", "window"])
@pytest.mark.parametrize("backend", ["cpu-flash", "reference"])
def test_half_precision_errs_at_most_twice_as_much_as_plain_torch(backend, name, dtype):
    assert_as_good_as_plain(backend, *inputs(CASES[name], dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", ON_GPU)
def test_backend_on_a_gpu_errs_at_most_twice_as_much_as_plain_torch(backend, name, device):
    tensors, mask = inputs(CASES[name], torch.bfloat16, device)
    if backend != "auto" and BACKENDS[backend].available("cuda") is not None:
        pytest.skip(BACKENDS[backend].available("cuda"))
    blocks = canonical_blocks(
        tensors[0].shape[0],
        tensors[1].shape[0],
        Mask(mask["causal"], mask["offset"], mask.get("window")),
    )
    for block in blocks:
        rows, keys = (block.row_start, block.row_stop), (block.key_start, block.key_stop)
        case = case_of(
            tensors[0][slice(*rows)], tensors[1][slice(*keys)], block.mask,
            mask.get("softcap", 0.0), mask["scale"],
        )  # fmt: skip
        if backend != "auto" and BACKENDS[backend].why_not(case) is not None:
            with pytest.raises(BadInput, match=backend):
                attend(*tensors, **mask, backend=backend)
            return
    assert_as_good_as_plain(backend, tensors, mask)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["fa4", "cudnn", "triton"])
@pytest.mark.parametrize("rows", [1, 777, 4096])
def test_gpu_backend_is_right_over_many_keys(backend, rows, device):
    if BACKENDS[backend].available("cuda") is not None:
        pytest.skip(BACKENDS[backend].available("cuda"))
    case = (rows, 20001, 8, 2, 128, {"causal": True, "offset": 20001 - rows})
    assert_as_good_as_plain(backend, *inputs(case, torch.bfloat16, device))


def assert_as_good_as_plain(backend, tensors, mask, factor=2.0, floor=1e-3):
    """Errors from the fp64 truth, against those of plain torch in the same precision."""
    part = attend(*tensors, **mask, backend=backend)
    truth, truth_lse = definition(*(x.double() for x in tensors), **mask)
    assert part.out.shape == truth.shape
    if not truth.numel():
        return
    allowed = factor * (definition(*tensors, **mask)[0].double() - truth).abs().max() + floor
    error = (part.out.double() - truth).abs().max()
    assert error <= allowed, f"max error {error:.3g} > allowed {allowed:.3g}"
    torch.testing.assert_close(part.lse, truth_lse.float(), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("backend", ON_CPU)
def test_lse_is_natural_log_one_row_a_token(backend):
    q, k, v = torch.zeros(2, 3, 8), torch.randn(5, 3, 8), torch.ones(5, 3, 8)
    part = attend(q, k, v, **FULL, scale=1.0, backend=backend)
    torch.testing.assert_close(part.lse, torch.full((2, 3), 1.6094379))  # ln 5
    torch.testing.assert_close(part.out, torch.ones(2, 3, 8))


def test_q_that_lies_head_first_gives_the_same_bits_as_its_copy():
    (q, k, v), mask = inputs(CASES["causal square"])
    assert not q.is_contiguous()
    strided, copied = attend(q, k, v, **mask), attend(q.contiguous(), k, v, **mask)
    assert torch.equal(strided.out, copied.out)
    assert torch.equal(strided.lse, copied.lse)


@pytest.mark.parametrize("rows", [0, 1, 7])
@pytest.mark.parametrize("keys", [1, 5, 9])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 3, 100])
def test_canonical_blocks_hold_exactly_what_the_mask_shows(rows, keys, causal, window):
    for offset in range(-rows - 2, keys + 3):
        ahead = torch.arange(rows)[:, None] + offset - torch.arange(keys)
        shown = (ahead >= 0) | (not causal)
        shown &= ahead < (1 << 40 if window is None else window)
        seen = torch.zeros_like(shown)
        last_row = 0
        for block in canonical_blocks(rows, keys, Mask(causal, offset, window)):
            assert last_row <= block.row_start < block.row_stop <= rows
            assert 0 <= block.key_start < block.key_stop <= keys
            last_row = block.row_stop
            count = (block.row_stop - block.row_start, block.key_stop - block.key_start)
            local = torch.arange(count[0])[:, None] + block.mask.offset - torch.arange(count[1])
            here = (local >= 0) | (not block.mask.causal)
            here &= local < (1 << 40 if block.mask.window is None else block.mask.window)
            assert here.any(1).all(), "a row of a block sees no key"
            assert here.any(0)[-1], "no row of a block sees its last key"
            if block.mask.causal and block.mask.window is None:
                assert block.mask.offset == count[1] - count[0], "causal but not aligned"
            seen[block.row_start : block.row_stop, block.key_start : block.key_stop] = here
        assert torch.equal(seen, shown), f"offset {offset}"


def test_auto_takes_cpu_flash_on_a_cpu_and_the_reference_where_it_cannot():
    (q, k, _), _ = inputs(CASES["full"])
    mask = Mask(False, 0, None)
    assert choose(case_of(q, k, mask, 0.0, 0.1)).name == "cpu-flash"
    assert choose(case_of(q, k, mask, 30.0, 0.1)).name == "reference"


def gpu_case(rows, keys, **changes):
    q, k = torch.zeros(1, 32, 128, dtype=torch.bfloat16), torch.zeros(1, 8, 128)
    case = case_of(q, k, Mask(False, 0, None), 0.0, 0.1)
    on_gpu = {"rows": rows, "keys": keys, "device_type": "cuda", "capability": (9, 0)}
    return case._replace(**{**on_gpu, **changes})


def test_auto_on_a_gpu_prefers_fa4_but_cudnn_for_few_rows_over_many_keys(monkeypatch):
    for name, backend in BACKENDS.items():
        reason = "it runs on CPUs only" if name == "cpu-flash" else None
        usable = replace(backend, available=lambda _, reason=reason: reason)
        monkeypatch.setitem(BACKENDS, name, usable)
    choose.cache_clear()
    try:
        assert choose(gpu_case(4096, 4096), by_rule=True).name == "fa4"
        assert choose(gpu_case(1, 100_000), by_rule=True).name == "cudnn"
        assert choose(gpu_case(1, 100), by_rule=True).name == "fa4"
        assert choose(gpu_case(1, 100_000, softcap=50.0), by_rule=True).name == "triton"
        assert choose(gpu_case(4096, 4096, dtype=torch.float32), by_rule=True).name == "triton"
        assert choose(gpu_case(4096, 4096, dtype=torch.float64), by_rule=True).name == "reference"
    finally:
        choose.cache_clear()


def test_a_named_backend_that_cannot_serve_is_refused_with_its_reason():
    tensors, mask = inputs(CASES["full"])
    with pytest.raises(BadInput, match=r"'fa4' cannot serve .* runs on CUDA devices only"):
        attend(*tensors, **mask, backend="fa4")
    with pytest.raises(UnknownName, match="unknown attention backend 'flash9'; known: auto"):
        attend(*tensors, **mask, backend="flash9")
    with pytest.raises(UnknownName):
        attend(*inputs(CASES["no keys"])[0], **mask, backend="flash9")


def test_explain_says_of_every_backend_whether_and_why():
    rows = explain("cpu")
    assert [name for name, _, _ in rows] == list(BACKENDS)
    assert {name for name, usable, _ in rows if usable} == {"cpu-flash", "reference"}
    assert all(reason for _, _, reason in rows)


@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        (((4, 3, 8), (5, 2, 8), (5, 2, 8)), "no multiple"),
        (((4, 2, 8), (5, 2, 8), (6, 2, 8)), "T, Hq, D"),
        (((4, 2, 8), (5, 2, 16), (5, 2, 16)), "T, Hq, D"),
    ],
    ids=["heads", "k and v", "head_dim"],
)
def test_shapes_that_do_not_fit_are_refused(shapes, said):
    with pytest.raises(ValueError, match=said):
        attend(*(torch.zeros(s) for s in shapes), **FULL, scale=1.0)


def test_a_window_of_no_keys_is_refused():
    tensors, mask = inputs(CASES["full"])
    with pytest.raises(ValueError, match="at least 1 key"):
        attend(*tensors, **mask, window=0)
