import pytest
import torch

from ringspan.kernels import swiglu as module
from ringspan.kernels.swiglu import ACTIVATIONS, swiglu, swiglu_ref

pytestmark = [
    pytest.mark.usefixtures("dirty_empty"),
    # numpy's, in Triton's interpreter: exp(-x) is inf for a gate far below zero, and x / inf is 0
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
]


def launch(gate, up, act="silu", out=None):
    """The Triton kernel, on the GPU or under the interpreter."""
    from ringspan.kernels.swiglu_triton import swiglu_triton

    out = torch.empty_like(gate) if out is None else out
    swiglu_triton(*(x.view(-1, x.shape[-1]) for x in (gate, up, out)), act)
    return out


both = pytest.mark.parametrize("multiply", [swiglu, launch], ids=["public", "triton"])
acts = pytest.mark.parametrize("act", sorted(ACTIVATIONS))


def random(shape, dtype, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 4 * torch.randn(shape, generator=generator).to(device, dtype)


def assert_as_good_as_torch(got, gate, up, act):
    """At most two units in the last place from the fp64 truth: each rounding may add half of one,
    and torch's own fp32 tanh errs by some 1e-7 of what its tail is multiplied with."""
    truth = swiglu_ref(gate.double(), up.double(), act)
    plain = swiglu_ref(gate, up, act)
    eps = torch.finfo(got.dtype).eps
    tail = 2e-7 * (gate.double() * up.double()).abs()
    smallest = torch.finfo(got.dtype).smallest_normal
    assert ((got.double() - truth).abs() <= 2 * eps * truth.abs() + tail + smallest).all()
    assert ((got.double() - plain.double()).abs() <= 2 * eps * truth.abs() + tail + smallest).all()
    if got.dtype != torch.float32:
        assert (got != plain)[gate > -1].double().mean() < 0.02  # torch's own tail is not exact


@both
@acts
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("shape", [(1, 1), (7, 96), (1, 5, 2300)], ids=str)
def test_is_as_good_as_plain_torch(multiply, shape, dtype, act, device):
    gate, up = random(shape, dtype, device), random(shape, dtype, device, 1)
    assert_as_good_as_torch(multiply(gate, up, act), gate, up, act)


@both
@acts
def test_large_gates_pass_and_block(multiply, act, device):
    gate = torch.tensor([[200.0, -200.0, 0.0, -0.0, 1e30, -1e30]], device=device)
    got = multiply(gate, torch.ones_like(gate), act)
    torch.testing.assert_close(got, gate.clamp(min=0.0))


@both
@acts
def test_the_product_may_take_the_place_of_the_gate(multiply, act, device):
    gate, up = random((6, 48), torch.float32, device), random((6, 48), torch.float32, device, 1)
    fresh = multiply(gate, up, act)
    again = multiply(gate, up, act, out=gate)
    assert again is gate
    assert torch.equal(fresh, gate)


@both
def test_halves_of_one_projection(multiply, device):
    both_halves = random((5, 2 * 40), torch.float32, device)
    gate, up = both_halves.chunk(2, -1)
    out = torch.empty(5, 40, device=device)
    assert torch.equal(multiply(gate, up, out=out), multiply(gate.contiguous(), up.contiguous()))


def test_the_tiles_of_a_cpu_do_not_show(monkeypatch):
    gate, up = random((37, 16), torch.float32, "cpu"), random((37, 16), torch.float32, "cpu", 1)
    monkeypatch.setattr(module, "_TILE_ELEMENTS", 5 * 16)
    assert torch.equal(swiglu(gate, up), swiglu_ref(gate, up))


def test_no_rows_is_no_error(device):
    nothing = torch.zeros(0, 16, device=device)
    assert swiglu(nothing, nothing).shape == (0, 16)


@pytest.mark.gpu
@acts
@pytest.mark.parametrize("width", [96, 11008, 14336], ids=str)
def test_bf16_on_a_gpu_is_as_good_as_plain_torch(width, act, device):
    gate, up = (random((300, width), torch.bfloat16, device, seed) for seed in (0, 1))
    assert_as_good_as_torch(swiglu(gate, up, act), gate, up, act)


def test_what_does_not_fit_is_refused():
    x = torch.zeros(3, 8)
    for arguments, options, said in (
        ((x, x), {"act": "relu"}, "known: gelu_tanh, silu"),
        ((x, x[:2]), {}, "up is"),
        ((x, x.half()), {}, "up is .*float16"),
        ((x, torch.zeros(8, 3).t()), {}, "contiguous last axis"),
        ((x, x), {"out": torch.zeros(3, 9)}, "out is"),
        ((x.long(), x.long()), {}, "int64"),
    ):
        with pytest.raises(ValueError, match=said):
            swiglu(*arguments, **options)
