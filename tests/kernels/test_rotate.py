import pytest
import torch

from ringspan.kernels.rotate import hadamard

pytestmark = pytest.mark.usefixtures("dirty_empty")


@pytest.mark.parametrize("dim", [1, 2, 64, 128, 256])
def test_hadamard_is_orthonormal_and_its_own_inverse(dim):
    x = torch.randn(5, 3, dim, generator=torch.Generator().manual_seed(0))
    before = x.clone()
    rotated = hadamard(x)
    torch.testing.assert_close(rotated.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(hadamard(rotated), x, rtol=1e-5, atol=1e-5)
    assert torch.equal(x, before)


def test_hadamard_has_minus_one_where_two_indices_share_an_odd_number_of_bits():
    signs = [[(-1.0) ** (i & j).bit_count() / 4 for j in range(16)] for i in range(16)]
    assert torch.equal(hadamard(torch.eye(16)), torch.tensor(signs))


def test_hadamard_spreads_an_outlier_evenly():
    x = torch.zeros(1, 64)
    x[0, 17] = 8.0
    assert torch.equal(hadamard(x).abs(), torch.ones(1, 64))


def test_hadamard_keeps_dtype_and_takes_strided_input():
    x = torch.randn(6, 4, 96, dtype=torch.bfloat16)[..., :64]
    rotated = hadamard(x.transpose(0, 1))
    assert rotated.dtype == torch.bfloat16
    assert torch.equal(rotated, hadamard(x).transpose(0, 1))


def test_a_row_gets_the_same_bits_alone_and_among_others(device):
    x = torch.randn(70, 3, 128, generator=torch.Generator().manual_seed(0)).to(device)
    rotated = hadamard(x)
    for row in (0, 1, 69):
        assert torch.equal(hadamard(x[row : row + 1])[0], rotated[row])


def test_a_dimension_that_is_no_power_of_two_is_refused():
    with pytest.raises(ValueError, match="power of two"):
        hadamard(torch.zeros(2, 80))
