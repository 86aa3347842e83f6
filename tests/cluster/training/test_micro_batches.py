"""The pieces of a global batch: their seeds, their order, and whose they are."""

from __future__ import annotations

from itertools import islice
from types import SimpleNamespace

import pytest
import torch

from cluster.training.micro_batches import batches_from, seed_of


class FakeLoader:
    """Batches named by (epoch, number), five an epoch."""

    batches_per_epoch = 5

    def epoch(self, epoch: int, start_batch: int = 0):
        return iter([(epoch, number) for number in range(start_batch, self.batches_per_epoch)])


def test_seeds_depend_on_every_part_and_on_their_order_and_fit_torch():
    seeds = {seed_of(seed, step, rank) for seed in range(4) for step in range(50) for rank in range(4)}
    assert len(seeds) == 4 * 50 * 4
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert seed_of(1, 2, 3) == seed_of(1, 2, 3) != seed_of(3, 2, 1)
    torch.Generator().manual_seed(max(seeds))


@pytest.mark.parametrize("step", [0, 1, 4, 5, 12])
def test_batches_from_a_step_are_those_that_come_after_skipping_it(step: int):
    everything = list(islice(batches_from(FakeLoader(), 0), 20))
    assert everything[:7] == [(0, 0), (0, 1), (0, 2), (0, 3), (0, 4), (1, 0), (1, 1)]
    assert list(islice(batches_from(FakeLoader(), step), 20 - step)) == everything[step:]


def test_an_epoch_is_read_only_when_its_turn_comes():
    opened = []
    loader = SimpleNamespace(batches_per_epoch=2, epoch=lambda epoch, start_batch: opened.append(epoch) or iter("ab"))
    batches = batches_from(loader, 0)
    assert [next(batches), next(batches), opened] == ["a", "b", [0]]
    assert [next(batches), opened] == ["a", [0, 1]]
