"""Memory that is used again: given once at a time, and bounded."""

from __future__ import annotations

import torch

from entropy_hooks.buffers import Buffers


def test_memory_is_given_again_only_when_its_tensor_is_gone() -> None:
    buffers = Buffers()
    first, second = buffers.take((100, 30), torch.float32), buffers.take((100, 30), torch.float32)
    first.fill_(1)
    second.fill_(2)
    assert (first == 1).all()
    address = first.data_ptr()
    del first
    third = buffers.take((90, 40), torch.bfloat16)
    assert third.shape == (90, 40)
    assert third.data_ptr() != second.data_ptr()
    fourth = buffers.take((99, 31), torch.float32)
    assert fourth.data_ptr() == address
    assert (second == 2).all()


def test_held_views_do_not_grow_it_without_bound() -> None:
    buffers = Buffers()
    held = [buffers.take((1 << 20,), torch.float32) for _ in range(100)]
    assert len({tensor.data_ptr() for tensor in held}) == 100
    assert len(buffers._slabs) == 4
    assert buffers.take((1 << 26,), torch.float32).shape == (1 << 26,)


def test_a_tensor_without_entries_can_be_taken() -> None:
    assert Buffers().take((0, 4), torch.float32).shape == (0, 4)


def test_memory_first_taken_in_inference_mode_serves_training() -> None:
    buffers = Buffers()
    with torch.inference_mode():
        address = buffers.take((100,), torch.float32).data_ptr()
    taken = buffers.take((100,), torch.float32)
    torch.index_select(torch.arange(200.0), 0, torch.arange(100, 200), out=taken)
    assert taken.data_ptr() == address
    assert torch.equal(taken, torch.arange(100.0, 200.0))
