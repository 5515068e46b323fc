"""Copies of a checkpoint's tensors: equal, separate from the originals, in reused memory."""

import torch

from megatron_prepo.actor.async_save import HostBuffers


def tensors(seed, shapes=((3, 4), (5,), (0, 2), ())):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(torch.bfloat16) for shape in shapes]


def places(copies):
    return [copy.data_ptr() for copy in copies if copy.numel()]


def test_they_are_equal_and_do_not_change_with_the_originals():
    originals = [*tensors(1), torch.arange(12).view(3, 4).t(), torch.ones(2, requires_grad=True)]
    expected = [original.detach().clone() for original in originals]
    copies = HostBuffers().copy(originals)
    for original in originals:
        original.detach().zero_()
    for copy, whole in zip(copies, expected, strict=True):
        assert torch.equal(copy, whole) and copy.dtype == whole.dtype and copy.is_contiguous()


def test_the_next_ones_take_their_room():
    buffers = HostBuffers()
    before = places(buffers.copy(tensors(1)))
    again = buffers.copy(tensors(2))
    assert places(again) == before
    assert all(torch.equal(a, b) for a, b in zip(again, tensors(2), strict=True))


def test_others_get_room_of_their_own():
    buffers = HostBuffers()
    buffers.copy(tensors(1))
    other = buffers.copy(tensors(3, shapes=((3, 4), (6,))))
    assert [tuple(copy.shape) for copy in other] == [(3, 4), (6,)]
    assert all(torch.equal(a, b) for a, b in zip(other, tensors(3, ((3, 4), (6,))), strict=True))
    assert buffers.copy([]) == []
