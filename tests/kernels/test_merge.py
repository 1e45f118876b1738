import pytest
import torch

from ringspan.kernels.merge import merge, merge_into, merge_parts, merge_ref
from ringspan.types import Part

pytestmark = pytest.mark.usefixtures("dirty_empty")

SHAPES = [(1, 1, 64), (63, 5, 80), (33, 8, 128)]
SHAPE_IDS = [f"T{t}-Hq{h}-D{d}" for t, h, d in SHAPES]


def launch(out, lse, part_out, part_lse):
    """The Triton kernel, on the GPU or under the interpreter."""
    from ringspan.kernels.merge_triton import merge_into_triton

    merge_into_triton(out, lse, part_out, part_lse)


def make_part(shape, dtype, device, seed):
    generator = torch.Generator().manual_seed(seed)
    out = torch.randn(shape, generator=generator).to(device, dtype)
    return Part(out, (5 * torch.randn(shape[:2], generator=generator)).to(device))


def assert_as_good_as_ref(got, args, factor=2.0, floor=1e-5):
    """`got` may err from the fp64 truth at most `factor` times what the reference does."""
    out_a, lse_a, out_b, lse_b = (a.double() for a in args)
    lse = torch.logaddexp(lse_a, lse_b)
    truth = (lse_a - lse).exp()[..., None] * out_a + (lse_b - lse).exp()[..., None] * out_b
    allowed = factor * (merge_ref(*args)[0].double() - truth).abs().max() + floor
    error = (got.double() - truth).abs().max()
    assert error <= allowed, f"max error {error:.3g} > allowed {allowed:.3g}"


@pytest.mark.parametrize("shape", SHAPES, ids=SHAPE_IDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("merge_in_place", [merge_into, launch], ids=["public", "triton"])
def test_accumulating_a_part_is_as_good_as_the_definition(merge_in_place, shape, dtype, device):
    a = make_part(shape, torch.float32, device, 1)
    b = make_part(shape, dtype, device, 2)
    out, lse = a.out.clone(), a.lse.clone()
    merge_in_place(out, lse, b.out, b.lse)
    assert_as_good_as_ref(out, (*a, *b))
    torch.testing.assert_close(lse, torch.logaddexp(a.lse, b.lse))


@pytest.mark.parametrize("merge_in_place", [merge_into, launch], ids=["public", "triton"])
def test_parts_that_saw_no_key_give_zero_and_change_nothing(merge_in_place, device):
    a, b = (make_part((4, 3, 16), torch.float32, device, seed) for seed in (1, 2))
    for part, empty_rows in ((a, (0, 1)), (b, (0, 2))):
        for row in empty_rows:
            part.out[row], part.lse[row] = 0.0, -torch.inf
    out, lse = a.out.clone(), a.lse.clone()
    merge_in_place(out, lse, b.out, b.lse)
    assert (out[0] == 0).all()
    assert lse[0].isneginf().all()
    torch.testing.assert_close((out[1], lse[1]), (b.out[1], b.lse[1]))
    torch.testing.assert_close((out[2], lse[2]), (a.out[2], a.lse[2]))
    assert out.isfinite().all()


@pytest.mark.parametrize("merge_in_place", [merge_into, launch], ids=["public", "triton"])
def test_a_strided_part_merges_like_its_contiguous_copy(merge_in_place, device):
    a = make_part((7, 3, 24), torch.float32, device, 1)
    b = make_part((3, 7, 24), torch.float16, device, 2)
    strided = Part(b.out.transpose(0, 1), b.lse.transpose(0, 1))
    once, twice = (Part(a.out.clone(), a.lse.clone()) for _ in range(2))
    merge_in_place(*once, *strided)
    merge_in_place(*twice, strided.out.contiguous(), strided.lse.contiguous())
    assert torch.equal(once.out, twice.out)
    assert torch.equal(once.lse, twice.lse)


@pytest.mark.gpu
def test_bf16_part_on_a_gpu_is_as_good_as_the_definition(device):
    a = make_part((1000, 32, 128), torch.float32, device, 1)
    b = make_part((1000, 32, 128), torch.bfloat16, device, 2)
    out, lse = a.out.clone(), a.lse.clone()
    merge_into(out, lse, b.out, b.lse)
    assert_as_good_as_ref(out, (*a, *b))


def test_merge_leaves_its_arguments_alone_and_keeps_the_dtype(device):
    a, b = (make_part((5, 2, 16), torch.float16, device, seed) for seed in (1, 2))
    before = a.out.clone(), a.lse.clone()
    merged = merge(a, b)
    assert merged.out.dtype == torch.float16
    assert torch.equal(a.out, before[0])
    assert torch.equal(a.lse, before[1])
    assert_as_good_as_ref(merged.out, (*a, *b))


def test_merging_many_parts_equals_merging_them_one_by_one(device):
    parts = [make_part((9, 4, 16), torch.float32, device, seed) for seed in range(3)]
    parts[1].out[4], parts[1].lse[4] = 0.0, -torch.inf
    for part in parts:
        part.out[5], part.lse[5] = 0.0, -torch.inf
    merged = merge_parts(torch.stack([p.out for p in parts]), torch.stack([p.lse for p in parts]))
    one_by_one = merge(merge(parts[0], parts[1]), parts[2])
    torch.testing.assert_close(merged, one_by_one)
    assert (merged.out[5] == 0).all()
    assert merged.lse[5].isneginf().all()


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


def test_accumulators_that_are_not_fp32_are_refused():
    half = torch.zeros(4, 2, 8, dtype=torch.float16)
    with pytest.raises(ValueError, match="float32"):
        merge_into(half, torch.zeros(4, 2), half, torch.zeros(4, 2))
