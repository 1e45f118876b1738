import pytest
import torch

from ringspan.kernels import merge as merge_module
from ringspan.kernels.merge import merge, merge_into, merge_many, merge_many_ref, merge_parts
from ringspan.types import Part

pytestmark = pytest.mark.usefixtures("dirty_empty")

SHAPES = [(1, 1, 64), (63, 5, 80), (33, 8, 128)]
SHAPE_IDS = [f"T{t}-Hq{h}-D{d}" for t, h, d in SHAPES]


def launch(parts, out, lse=None, sinks=None):
    """The Triton kernel, on the GPU or under the interpreter."""
    from ringspan.kernels.merge_triton import merge_many_triton

    merge_many_triton(parts, out, lse, sinks)


both = pytest.mark.parametrize("merge_them", [merge_many, launch], ids=["public", "triton"])


def make_parts(shape, dtype, device, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        Part(
            torch.randn(shape, generator=generator).to(device, dtype),
            (5 * torch.randn(shape[:2], generator=generator)).to(device),
        )
        for _ in range(count)
    ]


def empty_result(shape, dtype, device):
    return torch.empty(shape, dtype=dtype, device=device), torch.empty(shape[:2], device=device)


def assert_as_good_as_plain_torch(out, lse, parts, sinks=None):
    """`out` may err from the fp64 truth at most twice what fp32 sums, rounded once, do."""
    truth = merge_many_ref(parts, sinks)
    lses = torch.stack([part.lse for part in parts])
    if sinks is not None:
        lses = torch.cat([lses, sinks.expand_as(lses[:1])])
    weights = lses.softmax(0)[: len(parts), ..., None]
    plain = (weights * torch.stack([part.out.float() for part in parts])).sum(0).to(out.dtype)
    allowed = 2 * (plain.double() - truth.out).abs().max() + 1e-6
    error = (out.double() - truth.out).abs().max()
    assert error <= allowed, f"max error {error:.3g} > allowed {allowed:.3g}"
    if lse is not None:
        torch.testing.assert_close(lse.double(), truth.lse, rtol=1e-6, atol=2e-6)


@both
@pytest.mark.parametrize("count", [1, 2, 3, 7, 16], ids=lambda n: f"P{n}")
@pytest.mark.parametrize("shape", SHAPES, ids=SHAPE_IDS)
def test_many_parts_are_as_good_as_plain_torch(merge_them, shape, count, device):
    parts = make_parts(shape, torch.float32, device, count)
    out, lse = empty_result(shape, torch.float32, device)
    merge_them(parts, out, lse)
    assert_as_good_as_plain_torch(out, lse, parts)


@both
@pytest.mark.parametrize("into", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["of-fp32", "of-fp16"])
def test_the_result_is_rounded_once_to_its_own_dtype(merge_them, dtype, into, device):
    parts = make_parts((9, 3, 48), dtype, device, 4)
    out, lse = empty_result((9, 3, 48), into, device)
    merge_them(parts, out, lse)
    assert_as_good_as_plain_torch(out, lse, parts)


@both
def test_without_an_lse_the_result_has_the_same_bits(merge_them, device):
    parts = make_parts((6, 3, 32), torch.float32, device, 3)
    (with_lse, lse), (alone, _) = (empty_result((6, 3, 32), torch.float32, device),) * 2
    with_lse, alone = with_lse.clone(), alone.clone()
    merge_them(parts, with_lse, lse)
    merge_them(parts, alone)
    assert torch.equal(with_lse, alone)


@both
def test_sinks_are_one_more_term_of_the_denominator(merge_them, device):
    shape = (11, 6, 40)
    parts = make_parts(shape, torch.float32, device, 3)
    parts[0].lse[4], parts[1].lse[4], parts[2].lse[4] = (-torch.inf,) * 3
    sinks = torch.tensor([-50.0, -2.0, 0.0, 3.0, 60.0, -torch.inf], device=device)
    out, lse = empty_result(shape, torch.float32, device)
    merge_them(parts, out, lse, sinks)
    assert_as_good_as_plain_torch(
        out[:4], lse[:4], [Part(p.out[:4], p.lse[:4]) for p in parts], sinks
    )
    assert (out[4] == 0).all()
    torch.testing.assert_close(lse[4], sinks)
    without, _ = empty_result(shape, torch.float32, device)
    merge_them(parts, without)
    assert torch.equal(out[:4, 5], without[:4, 5])  # a sink of -inf is none
    assert out[:4, 4].abs().max() < 1e-9  # a sink far above every key takes all


@both
def test_rows_without_keys_give_zero_and_what_lies_there_is_not_looked_at(merge_them, device):
    parts = make_parts((4, 3, 16), torch.float32, device, 2)
    for part, empty_rows in zip(parts, ((0, 1), (0, 2)), strict=True):
        for row in empty_rows:
            part.out[row], part.lse[row] = torch.nan, -torch.inf
    out, lse = empty_result((4, 3, 16), torch.float32, device)
    merge_them(parts, out, lse)
    assert (out[0] == 0).all()
    assert lse[0].isneginf().all()
    for row, only in ((1, parts[1]), (2, parts[0])):
        torch.testing.assert_close((out[row], lse[row]), (only.out[row], only.lse[row]))
    assert out.isfinite().all()


@both
def test_a_broken_lse_shows_in_the_result(merge_them, device):
    parts = make_parts((2, 2, 16), torch.float32, device, 2)
    parts[1].lse[0, 0] = torch.nan
    out, lse = empty_result((2, 2, 16), torch.float32, device)
    merge_them(parts, out, lse)
    assert out[0, 0].isnan().all()
    assert lse[0, 0].isnan()
    assert out[1].isfinite().all()


@both
def test_strides_do_not_matter(merge_them, device):
    shape = (7, 3, 24)
    parts = make_parts(shape, torch.float16, device, 3)
    heads_first = [
        Part(
            part.out.transpose(0, 1).contiguous().transpose(0, 1),
            part.lse.t().contiguous().t(),  # as FlashAttention 4 gives it
        )
        for part in parts[:2]
    ]
    wide = torch.zeros(7, 3, 25, dtype=torch.float16, device=device)
    wide[..., :-1] = parts[2].out
    strided = [*heads_first, Part(wide[..., :-1], parts[2].lse)]
    once = empty_result(shape, torch.float16, device)
    merge_them(parts, *once)
    larger = torch.zeros(3, 20, 24, dtype=torch.float16, device=device).transpose(0, 1)
    lses = torch.zeros(3, 20, device=device).t()
    merge_them(strided, larger[5:12], lses[5:12])
    assert torch.equal(once[0], larger[5:12])
    assert torch.equal(once[1], lses[5:12])
    assert not larger[:5].any()
    assert not larger[12:].any()
    assert not lses[12:].any()


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_the_first_part_can_be_the_result(merge_them, dtype, device):
    shape = (21, 4, 32)
    parts = [*make_parts(shape, torch.float32, device, 1), *make_parts(shape, dtype, device, 3, 1)]
    fresh = empty_result(shape, torch.float32, device)
    merge_them(parts, *fresh)
    out, lse = parts[0].out.clone(), parts[0].lse.clone()
    merge_them([Part(out, lse), *parts[1:]], out, lse)
    assert torch.equal(out, fresh[0])
    assert torch.equal(lse, fresh[1])


@pytest.mark.parametrize("into", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_more_parts_than_one_launch_takes(into, device):
    shape = (5, 2, 16)
    parts = make_parts(shape, torch.float32, device, 35)
    sinks = torch.tensor([1.0, 4.0], device=device)
    out, lse = empty_result(shape, into, device)
    merge_many(parts, out, lse, sinks)
    assert_as_good_as_plain_torch(out, lse, parts, sinks)


def test_folding_gives_what_one_launch_would(monkeypatch, device):
    """On a CPU too: the launches of a GPU are replayed with the interpreter's kernel."""
    from ringspan.kernels import merge_triton

    monkeypatch.setattr(merge_triton, "MAX_PARTS", 3)
    parts = make_parts((5, 2, 16), torch.float32, device, 8)
    once, folded = (empty_result((5, 2, 16), torch.float16, device) for _ in range(2))
    launch(parts, *once)
    merge_module.fold(parts, *folded, None)
    torch.testing.assert_close(folded, once)


def test_the_tiles_of_a_cpu_do_not_show(monkeypatch):
    parts = make_parts((37, 3, 16), torch.float32, torch.device("cpu"), 3)
    parts[1].lse[20:], parts[1].out[20:] = -torch.inf, torch.nan
    whole, tiled = (empty_result((37, 3, 16), torch.float32, torch.device("cpu")) for _ in range(2))
    merge_many(parts, *whole)
    monkeypatch.setattr(merge_module, "_TILE_ELEMENTS", 5 * 48)
    merge_many(parts, *tiled)
    assert torch.equal(whole[0], tiled[0])
    assert torch.equal(whole[1], tiled[1])


@pytest.mark.parametrize("shape", [(0, 4, 16), (3, 0, 16)], ids=["no-rows", "no-heads"])
def test_nothing_to_merge_is_no_error(shape, device):
    parts = make_parts(shape, torch.float32, device, 2)
    merge_many(parts, *empty_result(shape, torch.float32, device))


@pytest.mark.gpu
@pytest.mark.parametrize("count", [2, 7, 16], ids=lambda n: f"P{n}")
def test_bf16_parts_on_a_gpu_are_as_good_as_plain_torch(count, device):
    shape = (1000, 32, 128)
    parts = make_parts(shape, torch.bfloat16, device, count)
    out, lse = empty_result(shape, torch.bfloat16, device)
    merge_many(parts, out, lse)
    assert_as_good_as_plain_torch(out, lse, parts)


def test_accumulating_part_after_part_equals_merging_them_at_once(device):
    shape = (9, 4, 16)
    parts = make_parts(shape, torch.float16, device, 3)
    parts[1].out[4], parts[1].lse[4] = 0.0, -torch.inf
    out = torch.zeros(shape, device=device)
    lse = torch.full(shape[:2], -torch.inf, device=device)
    for part in parts:
        merge_into(out, lse, *part)
    assert_as_good_as_plain_torch(out, lse, parts)
    merged = merge_parts(torch.stack([p.out for p in parts]), torch.stack([p.lse for p in parts]))
    assert merged.out.dtype == torch.float16
    assert_as_good_as_plain_torch(*merged, parts)


def test_a_part_with_a_strided_last_axis_can_be_accumulated(device):
    (part,) = make_parts((5, 3, 8), torch.float32, device, 1)
    strided = part.out.transpose(1, 2).contiguous().transpose(1, 2)
    out, lse = torch.zeros_like(part.out), torch.full_like(part.lse, -torch.inf)
    merge_into(out, lse, strided, part.lse)
    torch.testing.assert_close((out, lse), (part.out, part.lse))


def test_merge_leaves_its_arguments_alone_and_keeps_the_dtype(device):
    a, b = make_parts((5, 2, 16), torch.float16, device, 2)
    before = a.out.clone(), a.lse.clone()
    merged = merge(a, b)
    assert merged.out.dtype == torch.float16
    assert torch.equal(a.out, before[0])
    assert torch.equal(a.lse, before[1])
    assert_as_good_as_plain_torch(*merged, (a, b))


@pytest.mark.parametrize(
    ("part_shape", "lse_shape", "said"),
    [((4, 2, 8), (4, 3), "[T, Hq]"), ((4, 2, 9), (4, 2), "[T, Hq, D]")],
    ids=["lse", "out"],
)
def test_shapes_that_do_not_fit_are_refused_with_what_was_wanted(part_shape, lse_shape, said):
    with pytest.raises(ValueError, match=said.replace("[", r"\[")):
        merge_into(
            torch.zeros(4, 2, 8), torch.zeros(4, 2), torch.zeros(part_shape), torch.zeros(lse_shape)
        )


def test_what_is_not_a_part_is_refused_by_name():
    out, lse = torch.zeros(4, 2, 8), torch.zeros(4, 2)
    good = Part(out, lse)
    for parts, options, said in (
        ([], {}, "at least one"),
        ([good, Part(out.long(), lse)], {}, "out of part 1 .*int64"),
        ([good, Part(out, lse.half())], {}, "lse of part 1 .*float16"),
        ([good, Part(torch.zeros(4, 8, 2).mT, lse)], {}, "out of part 1 .*contiguous last axis"),
        ([good], {"sinks": torch.zeros(3)}, r"\[Hq\] = \(2,\)"),
        ([good], {"lse": torch.zeros(4, 3)}, "lse of the result"),
        ([good], {"out": torch.zeros(4, 8, 2).mT}, "the result has strides"),
    ):
        with pytest.raises(ValueError, match=said):
            merge_many(parts, **{"out": out.clone(), **options})


def test_accumulators_that_are_not_fp32_are_refused():
    half = torch.zeros(4, 2, 8, dtype=torch.float16)
    with pytest.raises(ValueError, match="float32"):
        merge_into(half, torch.zeros(4, 2), half, torch.zeros(4, 2))
