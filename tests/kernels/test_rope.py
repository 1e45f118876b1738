import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from ringspan.kernels import rope as module
from ringspan.kernels.rope import apply_rope, why_not

pytestmark = pytest.mark.usefixtures("dirty_empty")


def launch(q, k, cos, sin):
    """The Triton kernel, on the GPU or under the interpreter."""
    from ringspan.kernels.rope_triton import rope_triton

    outs = torch.empty_like(q), torch.empty_like(k)
    rope_triton(q, k, cos, sin, *outs)
    return outs


both = pytest.mark.parametrize("rotate", [apply_rope, launch], ids=["public", "triton"])


def make(batch, q_heads, kv_heads, tokens, dim, dtype, device, seed=0):
    """q and k as an attention module has them: views of [B, T, H, D]; all four entries differ."""
    generator = torch.Generator().manual_seed(seed)
    q, k = (
        torch.randn(batch, tokens, heads, dim, generator=generator)
        .to(device, dtype)
        .transpose(1, 2)
        for heads in (q_heads, kv_heads)
    )
    cos, sin = (
        torch.randn(batch, tokens, dim, generator=generator).to(device, dtype) for _ in range(2)
    )
    return q, k, cos, sin


def real_strides(x):
    """Of the axes that have more than one place."""
    return [stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1]


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1, 2), (1, 5, 1, 13, 80), (2, 8, 2, 33, 64), (1, 3, 3, 9, 128)], ids=str
)
def test_gives_the_bits_of_transformers(rotate, shape, dtype, device):
    arguments = make(*shape, dtype, device)
    for got, wanted in zip(rotate(*arguments), apply_rotary_pos_emb(*arguments), strict=True):
        assert torch.equal(got, wanted)
        assert real_strides(got) == real_strides(wanted)


@both
def test_contiguous_heads_and_slices_of_wider_tensors(rotate, device):
    q, k, cos, sin = make(1, 4, 2, 11, 32, torch.float32, device)
    wide_q = torch.zeros(1, 4, 15, 64, device=device)
    wide_q[:, :, 2:13, :32] = q
    tables = torch.stack((cos, sin), 2)  # [B, T, 2, D]
    got = rotate(wide_q[:, :, 2:13, :32], k.contiguous(), tables[:, :, 0], tables[:, :, 1])
    for x, wanted in zip(got, apply_rotary_pos_emb(q, k, cos, sin), strict=True):
        assert torch.equal(x, wanted)


def test_the_tiles_of_a_cpu_do_not_show(monkeypatch):
    arguments = make(1, 4, 2, 37, 32, torch.float32, torch.device("cpu"))
    monkeypatch.setattr(module, "_TILE_ELEMENTS", 5 * 128)
    for got, wanted in zip(apply_rope(*arguments), apply_rotary_pos_emb(*arguments), strict=True):
        assert torch.equal(got, wanted)


def test_no_tokens_is_no_error(device):
    arguments = make(1, 4, 2, 0, 32, torch.float32, device)
    assert [x.shape for x in apply_rope(*arguments)] == [(1, 4, 0, 32), (1, 2, 0, 32)]


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 80, 128, 256], ids=str)
def test_bf16_on_a_gpu_gives_the_bits_of_transformers(dim, device):
    arguments = make(1, 32, 8, 1001, dim, torch.bfloat16, device)
    for got, wanted in zip(apply_rope(*arguments), apply_rotary_pos_emb(*arguments), strict=True):
        assert torch.equal(got, wanted)


def test_what_does_not_fit_is_refused_in_one_line():
    q, k, cos, sin = make(1, 4, 2, 5, 8, torch.float32, torch.device("cpu"))
    for arguments, said in (
        ((q[..., :7], k[..., :7], cos, sin), "even D"),
        ((q, k[:, :, :4], cos, sin), "to match q"),
        ((q, k, cos[:, :, :4], sin), "cos has shape"),
        ((q, k, cos, sin[:, :4]), "sin has shape"),
        ((q, k, cos.half(), sin), "float16"),
        ((q.mT.contiguous().mT, k, cos, sin), "contiguous last axis"),
    ):
        with pytest.raises(ValueError, match=said):
            apply_rope(*arguments)
        assert "\n" not in str(why_not(*arguments))
