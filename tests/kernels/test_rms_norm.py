import pytest
import torch
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from ringspan.kernels import rms_norm as module
from ringspan.kernels.rms_norm import rms_norm, rms_norm_ref

pytestmark = pytest.mark.usefixtures("dirty_empty")

EPS = 1e-5


def launch(x, weight, eps, unit_offset=False):
    """The Triton kernel, on the GPU or under the interpreter."""
    from ringspan.kernels.rms_norm_triton import rms_norm_triton

    out = torch.empty_like(x)
    rms_norm_triton(x, weight, eps, unit_offset, out)
    return out


both = pytest.mark.parametrize("norm", [rms_norm, launch], ids=["public", "triton"])
forms = pytest.mark.parametrize("unit_offset", [False, True], ids=["llama", "gemma"])


def random(shape, dtype, device, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def assert_nearly_all_equal(got, wanted):
    """Nearly all elements equal; in the rest the order of a sum shows, and once more after it."""
    assert got.dtype == wanted.dtype
    ulps = 4 if got.dtype == torch.float32 else 2  # fp32 shows the sum's own rounding
    ulp = torch.finfo(got.dtype).eps * wanted.double().abs().clamp(min=1e-4)
    assert ((got.double() - wanted.double()).abs() <= ulps * ulp).all()
    if got.dtype != torch.float32:
        assert (got != wanted).double().mean() < 0.02


@both
@forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("shape", [(1, 64), (1, 13, 576), (2, 7, 3, 80)], ids=str)
def test_equals_the_definition(norm, shape, dtype, unit_offset, device):
    x, weight = random(shape, dtype, device), random(shape[-1:], dtype, device, 1)
    assert_nearly_all_equal(
        norm(x, weight, EPS, unit_offset), rms_norm_ref(x, weight, EPS, unit_offset)
    )


@both
@pytest.mark.parametrize("theirs", [LlamaRMSNorm, Gemma2RMSNorm], ids=["llama", "gemma"])
def test_equals_the_module_of_transformers(norm, theirs, device):
    reference = theirs(96, eps=EPS).to(device, torch.float16).requires_grad_(False)
    reference.weight.copy_(random((96,), torch.float16, device, 1))
    x = 30 * random((1, 9, 96), torch.float16, device)
    unit_offset = theirs is Gemma2RMSNorm
    assert_nearly_all_equal(norm(x, reference.weight, EPS, unit_offset), reference(x))


@both
def test_swapped_axes_come_out_as_plain_torch_would_leave_them(norm, device):
    x = random((1, 6, 4, 32), torch.float32, device).transpose(1, 2)  # as Gemma 3's q
    weight = random((32,), torch.float32, device, 1)
    got, wanted = norm(x, weight, EPS), rms_norm_ref(x, weight, EPS)
    assert got.stride() == wanted.stride()
    assert_nearly_all_equal(got, wanted)


@both
def test_rows_that_do_not_lie_behind_each_other(norm, device):
    x = random((4, 6, 5, 64), torch.float32, device)[::2, ::3, ::2, :32]
    weight = random((32,), torch.float32, device, 1)
    assert_nearly_all_equal(norm(x, weight, EPS), rms_norm_ref(x, weight, EPS))


@both
def test_a_row_of_zeros_stays_zero(norm, device):
    x = torch.zeros(3, 32, device=device)
    assert not norm(x, torch.ones(32, device=device), EPS).any()


def test_the_tiles_of_a_cpu_do_not_show(monkeypatch):
    x, weight = random((2, 37, 48), torch.float32, "cpu"), random((48,), torch.float32, "cpu", 1)
    monkeypatch.setattr(module, "_TILE_ELEMENTS", 5 * 96)
    assert torch.equal(rms_norm(x, weight, EPS), rms_norm_ref(x, weight, EPS))


def test_a_single_row_and_no_row_at_all(device):
    weight = random((48,), torch.float32, device, 1)
    x = random((48,), torch.float32, device)
    assert_nearly_all_equal(rms_norm(x, weight, EPS), rms_norm_ref(x, weight, EPS))
    assert rms_norm(x[None][:0], weight, EPS).shape == (0, 48)


@pytest.mark.gpu
@forms
@pytest.mark.parametrize("hidden", [128, 576, 4096, 5376, 16384], ids=str)
def test_bf16_on_a_gpu_equals_the_definition(hidden, unit_offset, device):
    x, weight = random((1000, hidden), torch.bfloat16, device), torch.ones(hidden)
    weight = (weight + 0.2 * random((hidden,), torch.float32, "cpu", 1)).to(device, torch.bfloat16)
    got = rms_norm(x, weight, EPS, unit_offset)
    assert_nearly_all_equal(got, rms_norm_ref(x, weight, EPS, unit_offset))


def test_what_does_not_fit_is_refused():
    x = torch.zeros(3, 32)
    with pytest.raises(ValueError, match=r"\[H\]"):
        rms_norm(x, torch.ones(31), EPS)
    with pytest.raises(ValueError, match="float16"):
        rms_norm(x, torch.ones(32, dtype=torch.float16), EPS)
