"""The Hopper kernel against the definition, on a Hopper GPU: no interpreter runs Gluon."""

import pytest
import torch

from ringspan.kernels.flash import flash_ref
from ringspan.types import Part

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("dirty_empty")]

FULL = {"causal": False, "offset": 0}
CAUSAL = {"causal": True, "offset": 0}

# T, S, mask
CASES = {
    "full": (512, 1024, FULL),
    "full, ragged": (1000, 1531, FULL),
    "causal": (2048, 2048, CAUSAL),
    "causal, ragged": (1025, 1025, CAUSAL),
    "offset": (301, 1000, {"causal": True, "offset": 399}),
    "rows without keys": (900, 700, {"causal": True, "offset": -333}),
    "tiles without keys, several a program": (4000, 700, {"causal": True, "offset": -2500}),
    "nothing seen": (200, 300, {"causal": True, "offset": -1000}),
    "window": (1500, 1500, CAUSAL | {"window": 300}),
    "window of one key": (700, 900, {"causal": True, "offset": 200, "window": 1}),
    "window behind": (400, 640, {"causal": False, "offset": 640, "window": 400}),
    "softcap": (500, 500, CAUSAL | {"softcap": 20.0}),
    "one key": (300, 1, FULL),
    "one row": (1, 3000, FULL),
    "several tiles a program": (5000, 700, FULL),
}


@pytest.fixture
def hopper(device):
    """flash_hopper, where there is a GPU for it."""
    if torch.cuda.get_device_capability(device)[0] != 9:
        pytest.skip("wants a Hopper GPU")
    from ringspan.kernels.flash_hopper import flash_hopper

    return flash_hopper


def random(generator, device, dtype, *shape):
    return torch.randn(*shape, generator=generator).to(device, dtype)


def assert_close(got, truth, dtype):
    """The error of bf16 weights is 2^-9 of each: relative to the norm, half of that is usual."""
    limit = 4e-3 if dtype == torch.bfloat16 else 1e-3
    assert torch.isfinite(got.out).all()
    assert (got.out.double() - truth.out).norm() <= limit * truth.out.norm()
    assert torch.equal(got.lse.isneginf(), truth.lse.isneginf())
    assert (got.out[truth.lse.isneginf()] == 0).all()
    seen = truth.lse.isfinite()
    torch.testing.assert_close(got.lse[seen].double(), truth.lse[seen], rtol=1e-5, atol=2e-4)


def merged(a, b):
    lse = torch.logaddexp(a.lse, b.lse)
    pivot = torch.where(lse.isneginf(), 0.0, lse)
    weights = ((x.lse - pivot).exp()[..., None] for x in (a, b))
    return Part(sum(w * x.out for w, x in zip(weights, (a, b), strict=True)), lse)


def in_fp64(part):
    return Part(part.out.double(), part.lse.double())


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("carried", [False, True], ids=["", "into and sinks"])
@pytest.mark.parametrize("name", CASES)
def test_the_kernel_is_the_definition_in_low_precision(name, carried, dim, hopper, device):
    rows, keys, mask = CASES[name]
    generator = torch.Generator().manual_seed(0)
    dtype = torch.float16 if name == "causal, ragged" else torch.bfloat16
    q = random(generator, device, dtype, rows, 8, dim)
    k, v = (random(generator, device, dtype, keys, 2, dim) for _ in range(2))
    call = {"scale": dim**-0.5} | mask
    truth = in_fp64(flash_ref(q.double(), k.double(), v.double(), **call))
    if not carried:
        assert_close(hopper(q, k, v, **call), truth, dtype)
        return
    before = random(generator, device, torch.float64, 70, 2, dim)
    first = flash_ref(q.double(), before, before, causal=True, offset=-20, scale=0.1)
    sinks = torch.randn(8, generator=generator).to(device)
    part = Part(first.out.float(), first.lse.clone())
    got = hopper(q, k, v, **call, into=part, sinks=sinks)
    assert got.out is part.out
    sink = Part(torch.zeros_like(truth.out), sinks.double().expand(rows, -1))
    assert_close(got, merged(merged(truth, in_fp64(first)), sink), dtype)


@pytest.mark.parametrize("dim", [64, 128])
def test_every_config_gives_the_same(dim, hopper, device):
    from ringspan.kernels.flash_hopper import HOPPER_CONFIGS

    generator = torch.Generator().manual_seed(0)
    q = random(generator, device, torch.bfloat16, 1111, 4, dim)
    k, v = (random(generator, device, torch.bfloat16, 1111, 1, dim) for _ in range(2))
    truth = in_fp64(flash_ref(q.double(), k.double(), v.double(), **CAUSAL, scale=0.1))
    for config in HOPPER_CONFIGS[dim]:
        got = hopper(q, k, v, **CAUSAL, scale=0.1, config=config)
        assert_close(got, truth, torch.bfloat16)


def test_heads_may_lie_before_tokens(hopper, device):
    """As in the pool of pages: [Hkv, tokens, D], read in place."""
    generator = torch.Generator().manual_seed(0)
    q = random(generator, device, torch.bfloat16, 4, 500, 128).transpose(0, 1)
    pool = random(generator, device, torch.bfloat16, 2, 2, 1024, 128)
    k, v = (x[:, 100:800].transpose(0, 1) for x in pool)
    truth = in_fp64(flash_ref(q.double(), k.double(), v.double(), **FULL, scale=0.1))
    assert_close(hopper(q, k, v, **FULL, scale=0.1), truth, torch.bfloat16)


def test_offsets_beyond_two_to_the_31_are_reached(hopper, device):
    rows, heads, dim = 150_000, 128, 128  # 2.46e9 elements of q and out
    k, v = torch.randn(2, 64, 1, dim, device=device, dtype=torch.bfloat16)
    q = torch.randn(1, heads, dim, device=device, dtype=torch.bfloat16).repeat(rows, 1, 1)
    part = hopper(q, k, v, **FULL, scale=0.1)
    assert torch.equal(part.out[-1], part.out[0])
    assert torch.equal(part.lse[-1], part.lse[0])
