"""The planes of many pages in one launch, beside a copy and a sum for each."""

import pytest
import torch

from ringspan.kernels.sum64 import sum64
from ringspan.kvstore import planes
from ringspan.kvstore.codecs.registry import codec

pytestmark = pytest.mark.usefixtures("dirty_empty")


@pytest.fixture(params=["raw", "int8", "int4"])
def held(request, device):
    """layers, specs, pages of 128 tokens: of a shard with room for five."""
    made = codec(request.param)
    specs = made.specs(2, 64, torch.float32 if device == "cpu" else torch.bfloat16)
    units = [spec.units(5 * 128) for spec in specs]
    layers = tuple(
        tuple(
            torch.zeros(count, *spec.shape, dtype=spec.dtype, device=device)
            for count, spec in zip(units, specs, strict=True)
        )
        for _ in range(3)
    )
    return layers, specs


def table_of(layers, specs, row, pages):
    from ringspan.kernels.planes_triton import PlaneTable

    parts = [
        [planes._units(t, spec, row, 128, pages) for t, spec in zip(layer, specs, strict=True)]
        for layer in layers
    ]
    assert PlaneTable.fits(parts, pages)
    return PlaneTable(parts, pages)


def test_pages_copied_and_summed_at_once_are_those_of_a_copy_and_a_sum_each(held, device):
    layers, specs = held
    width = len(layers) * planes.specs_bytes(specs, 128)
    generator = torch.Generator().manual_seed(3)
    wide = torch.randint(0, 256, (3, width + 64), dtype=torch.uint8, generator=generator)
    payloads = wide.to(device)[:, :width]  # rows that lie apart
    table = table_of(layers, specs, 128, 3)
    table.copy(payloads[:1])
    table.copy(payloads[1:], 1)
    back = torch.zeros(3, width, dtype=torch.uint8, device=device)
    planes.gather(layers, specs, 128, 128, back)
    assert torch.equal(back, payloads)
    wanted = [
        planes.payload_sums(memoryview(row.numpy()), specs, len(layers), 128) for row in back.cpu()
    ]
    found = table.sums().cpu()
    assert [[int(x) % 2**64 for x in row] for row in found] == wanted
    assert torch.equal(table.sums(1, 1).cpu(), found[1:2])
    for tensors in layers:
        for tensor, spec in zip(tensors, specs, strict=True):
            before = tensor[: spec.units(128)]
            assert not before.reshape(-1).view(torch.uint8).any()  # neither page 0 nor page 4
            after = tensor[spec.units(4 * 128) :]
            assert not after.reshape(-1).view(torch.uint8).any()


def test_a_sum_of_one_plane_is_sum64s(device):
    data = torch.arange(3 * 40, dtype=torch.uint8).reshape(3, 40).to(device)
    from ringspan.kernels.planes_triton import PlaneTable

    sums = PlaneTable([[data.reshape(-1)]], 3).sums()
    assert sums[:, 0].tolist() == [sum64(row, 1) for row in data]


def test_other_payloads_are_refused(held, device):
    layers, specs = held
    table = table_of(layers, specs, 0, 2)
    with pytest.raises(ValueError, match=r"\(2, 8\) words"):
        table.copy(torch.zeros(2, 64, dtype=torch.uint8, device=device))
    width = table.page_words * 8
    with pytest.raises(ValueError, match="pages 1 on of 2"):
        table.copy(torch.zeros(2, width, dtype=torch.uint8, device=device), 1)
    with pytest.raises(ValueError, match="2 pages from 1 on"):
        table.sums(1, 2)
