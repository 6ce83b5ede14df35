"""One image is always a decoded one."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from entropy_dashboard.double_buffer import Buffers, advance


@given(images=st.lists(st.sampled_from([b"a", b"b", b"c", b"d"]), min_size=1, max_size=20))
def test_a_change_replaces_one_image_and_shows_the_newest(images):
    buffers: Buffers | None = None
    for image in images:
        before, buffers = buffers, advance(buffers, "view", image)
        assert image in {buffers.below, buffers.above}
        if before is not None:
            kept = (buffers.below == before.below) + (buffers.above == before.above)
            assert kept >= 1


@given(images=st.lists(st.sampled_from([b"a", b"b", b"c"]), min_size=1, max_size=20))
def test_two_quiet_looks_settle_both_images(images):
    buffers: Buffers | None = None
    for image in [*images, images[-1], images[-1]]:
        buffers = advance(buffers, "view", image)
    assert buffers is not None
    assert (buffers.below, buffers.above) == (images[-1], images[-1])
    assert advance(buffers, "view", images[-1]) is buffers


def test_another_view_replaces_both():
    buffers = advance(advance(None, "one", b"a"), "other", b"b")
    assert (buffers.below, buffers.above) == (b"b", b"b")
