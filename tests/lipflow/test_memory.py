"""Memory of pixels is written again only once nobody holds them, and no more is kept than was said."""

import gc

import pytest
import torch

from lipflow.memory import ReusedMemory

MIB = 2**20


def address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def test_dropped_memory_is_taken_again_by_the_same_number_of_bytes():
    memory = ReusedMemory(100 * MIB)
    first = memory.take((MIB, 2), torch.float32)
    place = address(first)
    other = memory.take((MIB, 2), torch.float32)
    assert address(other) != place
    del first
    assert address(memory.take((2, MIB), torch.int32)) == place


@pytest.mark.parametrize(
    "hold",
    [
        lambda tensor: tensor[3:5],
        lambda tensor: tensor.detach().T,
        lambda tensor: tensor.numpy(),
        lambda tensor: tensor.numpy()[7:],
        lambda tensor: tensor.requires_grad_().square(),
    ],
    ids=["slice", "transposed", "array", "slice of an array", "saved for backward"],
)
def test_memory_is_not_taken_while_a_view_of_it_is_held(hold):
    memory = ReusedMemory(100 * MIB)
    tensor = memory.take((1024, 1024), torch.float32).fill_(1.5)
    place, held = address(tensor), hold(tensor)
    del tensor
    gc.collect()
    taken = memory.take((1024, 1024), torch.float32).fill_(-1.0)
    assert address(taken) != place
    if isinstance(held, torch.Tensor) and held.requires_grad:
        (gradient,) = torch.autograd.grad(held.sum(), [held.grad_fn.next_functions[0][0].variable])
        assert (gradient == 3).all()
    else:
        assert (held == 1.5).all()


def test_no_more_is_kept_than_said_and_the_sizes_dropped_last_stay():
    memory = ReusedMemory(5 * MIB)
    sizes = {size: memory.take((size * MIB,), torch.uint8) for size in (2, 3, 1, 6)}
    place = address(sizes[3])
    del sizes[2]
    del sizes[3]
    assert memory.kept_bytes == 5 * MIB
    del sizes[1]
    assert memory.kept_bytes == 4 * MIB
    del sizes[6]
    assert memory.kept_bytes == 4 * MIB
    assert address(memory.take((3 * MIB,), torch.uint8)) == place
