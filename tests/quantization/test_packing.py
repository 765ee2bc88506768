import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_distill.quantization.packing import pack, pack_zeros, unpack, unpack_zeros


@settings(deadline=None, max_examples=60)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    units=st.integers(1, 4),
    columns=st.integers(1, 5),
    seed=st.integers(0, 2**16),
)
def test_round_trip(bits: int, units: int, columns: int, seed: int) -> None:
    codes = torch.randint(0, 2**bits, (32 * units, columns), generator=torch.Generator().manual_seed(seed))
    packed = pack(codes, bits)
    assert packed.dtype == torch.int32
    assert packed.shape == (bits * units, columns)
    assert torch.equal(unpack(packed, bits), codes.int())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_column_is_one_stream_of_bits_with_the_low_ones_first(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (64, 3))
    for column in range(3):
        stream = sum(int(code) << (bits * i) for i, code in enumerate(codes[:, column]))
        words = [int(word) & 0xFFFFFFFF for word in pack(codes, bits)[:, column]]
        assert words == [(stream >> (32 * i)) & 0xFFFFFFFF for i in range(2 * bits)]


@settings(deadline=None, max_examples=40)
@given(bits=st.sampled_from([2, 3, 4, 8]), version=st.sampled_from([1, 2]), seed=st.integers(0, 2**16))
def test_zero_points_round_trip(bits: int, version: int, seed: int) -> None:
    lowest = 1 if version == 1 else 0
    zeros = torch.randint(lowest, 2**bits, (3, 64), generator=torch.Generator().manual_seed(seed))
    packed = pack_zeros(zeros, bits, version)
    assert packed.shape == (3, 64 * bits // 32)
    assert torch.equal(unpack_zeros(packed, bits, version), zeros.int())


def test_versions_differ_by_one_and_a_wrapped_zero_reads_as_zero() -> None:
    zeros = torch.full((1, 8), 8)
    assert pack_zeros(zeros, 4, 1).item() == 0x77777777
    assert pack_zeros(zeros, 4, 2).item() & 0xFFFFFFFF == 0x88888888
    wrapped = torch.tensor([[-1]], dtype=torch.int32)  # what other tools wrote for zeros of 0
    assert torch.equal(unpack_zeros(wrapped, 4, 1), torch.zeros(1, 8, dtype=torch.int32))


def test_what_does_not_fit_is_said() -> None:
    with pytest.raises(ValueError, match="whole 32-bit words"):
        pack(torch.zeros(31, 1, dtype=torch.int32), 4)
    with pytest.raises(ValueError, match="version 2"):
        pack_zeros(torch.zeros(1, 8), 4, 1)
