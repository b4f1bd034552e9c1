"""The card's accounts: nothing is given beyond the limit, and what is dropped comes back."""

import pytest
import torch
from drivetrain.errors import MemoryBudgetError

from acme_accelerator.card import Card
from acme_accelerator.platform import AcmePlatform


def test_what_is_held_is_counted_and_comes_back() -> None:
    card = Card(1000)
    tensor = card.zeros((10, 5), torch.float32)
    assert (card.held_bytes, card.free_bytes) == (200, 800)
    view = tensor[3:]
    del tensor
    assert card.held_bytes == 200, "a view still holds the memory"
    del view
    assert (card.held_bytes, card.peak_bytes) == (0, 200)


def test_nothing_is_given_beyond_the_limit() -> None:
    card = Card(1000)
    kept = card.zeros((900,), torch.int8)
    with pytest.raises(MemoryBudgetError, match="100 of 1000 bytes are free"):
        card.zeros((101,), torch.int8)
    assert card.held_bytes == 900
    assert card.zeros((100,), torch.int8).shape == (100,)
    assert kept.shape == (900,)


def test_the_platform_tells_what_is_left() -> None:
    platform = AcmePlatform(AcmePlatform.Config(memory_mib=2))
    platform.activate()
    before = platform.memory()
    assert before.total_bytes == 2 * 2**20
    from acme_accelerator.card import zeros

    tensor = zeros((2**20,), torch.int8, platform.device())
    assert platform.memory().free_bytes == before.free_bytes - tensor.nbytes
    assert platform.peak_memory_bytes() >= tensor.nbytes
