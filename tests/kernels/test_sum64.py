import pytest
import torch

from ringspan.kernels.sum64 import sum64, sum64_ref, sum64_rows

pytestmark = pytest.mark.usefixtures("dirty_empty")

SIZES = [0, 1, 7, 8, 9, 1000, 16384 * 8, 16384 * 8 + 3]


def launch(rows, seed=0):
    """The Triton kernel, on the GPU or under the interpreter, as sum64_rows calls it."""
    from ringspan.kernels.sum64 import _signed, mix
    from ringspan.kernels.sum64_triton import sum64_rows_triton

    start = mix(seed)
    return sum64_rows_triton(rows, start, _signed(mix(rows.shape[1] ^ start)))


def random_bytes(*shape, seed=0):
    return torch.randint(
        0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("seed", [0, 5, 2**64 - 1])
def test_cpu_sum_is_the_definition_bit_for_bit(size, seed):
    rows = random_bytes(3, size)
    expected = [sum64_ref(bytes(row.numpy()), seed) for row in rows]
    assert sum64_rows(rows, seed).tolist() == expected
    assert [sum64(row, seed) for row in rows] == expected


@pytest.mark.parametrize("size", [1, 8, 1000, 8192 * 8 + 8, 70001])
def test_kernel_sum_is_the_cpu_sum_bit_for_bit(size, device):
    rows = random_bytes(3, size)
    assert launch(rows.to(device), 5).tolist() == sum64_rows(rows, 5).tolist()


def test_kernel_sum_of_rows_that_lie_apart_and_off_words_is_right(device):
    wide = random_bytes(3, 67)
    assert launch(wide.to(device)[:, 3:59]).tolist() == sum64_rows(wide[:, 3:59]).tolist()
    assert sum64_rows(wide[:, 3:59]).tolist() == [sum64(row[3:59]) for row in wide]


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.float64, torch.bool], ids=str
)
def test_any_dtype_sums_as_its_bytes(dtype):
    data = random_bytes(4, 24).bitwise_and(1).view(dtype)
    as_bytes = data.view(torch.uint8).numpy().tobytes()
    assert sum64(data) == sum64_ref(as_bytes)
    assert sum64_rows(data).tolist() == [
        sum64_ref(as_bytes[i * 24 : i * 24 + 24]) for i in range(4)
    ]


def test_the_sum_is_pinned():
    """Pages on disk carry it: a change of the formula is a change of the format."""
    assert sum64_ref(b"") == 0
    assert sum64_ref(bytes(range(20))) == 115298736089539773
    assert sum64_ref(bytes(range(20)), seed=1) == 1996312086436332462


@pytest.mark.parametrize(
    "spoil",
    [
        lambda d: d.index_copy(0, torch.tensor([3, 900]), d[[900, 3]]),
        lambda d: d.roll(8),
        lambda d: torch.cat((d[:8], d[:8], d[16:])),
        lambda d: d.index_fill(0, torch.arange(64, 128), 0),
        lambda d: d.index_put((torch.tensor([999]),), d[999] ^ 1),
        lambda d: d[:-1],
        lambda d: torch.cat((d, d.new_zeros(1))),
    ],
    ids=["swap", "moved", "repeated word", "zeroed", "one bit", "cut off", "one more zero"],
)
def test_an_accident_changes_the_sum(spoil):
    data = random_bytes(1000)
    assert sum64(spoil(data)) != sum64(data)


def test_zeros_of_another_length_or_seed_have_another_sum():
    zeros = [torch.zeros(n, dtype=torch.uint8) for n in (1, 8, 16)]
    sums = {sum64(z, seed) for z in zeros for seed in (0, 1)}
    assert len(sums) == 6


def test_a_tensor_that_is_not_contiguous_is_refused():
    with pytest.raises(ValueError, match="contiguous"):
        sum64(random_bytes(4, 6).T)
    with pytest.raises(ValueError, match="contiguous rows"):
        sum64_rows(random_bytes(3, 4, 6).transpose(1, 2))


def test_no_rows_give_no_sums_and_empty_rows_the_sum_of_nothing():
    assert sum64_rows(torch.zeros(0, 5)).shape == (0,)
    assert sum64_rows(torch.zeros(2, 0), 3).tolist() == [sum64_ref(b"", 3)] * 2
