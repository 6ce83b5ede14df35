"""Frames: what is written is what is read, whole or not at all."""

from __future__ import annotations

import itertools
import json
import threading
import warnings
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import xarray as xr
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from entropy_monitor.errors import CorruptFrameError, FrameGoneError, SegmentTakenError
from entropy_monitor.store import (
    CorruptFrameWarning,
    FrameLayout,
    FrameReader,
    FrameWriter,
    GroupLayout,
    Retention,
    create_run,
    list_commits,
    list_segments,
    open_run,
)
from entropy_monitor.store.layout import COMMIT_COLUMNS, commit_key, frames_key

from ..synthetic_trainer import decoded, flip_byte, frame_data, frame_file, frame_layout

if TYPE_CHECKING:
    from pathlib import Path

    from entropy_monitor.store import FrameData, Run
    from entropy_monitor.types import Frame


def written(run: Run, layout: FrameLayout, *steps: int) -> tuple[FrameWriter, FrameReader, list[int]]:
    """A writer that has written these steps, a reader, and the frames' numbers."""
    writer = FrameWriter(run.objects, 0, 1)
    seqs = [writer.write(layout, frame_data(layout, step)) for step in steps]
    return writer, FrameReader(run.objects, run.run_id, 0), seqs


def assert_same(frame: Frame, data: FrameData, layout: FrameLayout) -> None:
    """Everything that was written is there, and nothing else."""
    assert (frame.attempt, frame.step, frame.phase, frame.wall_time_s) == (
        data.attempt,
        data.step,
        data.phase,
        data.wall_time_s,
    )
    assert (frame.num_patches, frame.num_tokens_seen) == (data.num_patches, data.num_tokens_seen)
    assert frame.scalars == data.scalars
    assert len(frame.groups) == len(layout.groups)
    for group, stored, expected in zip(frame.groups, layout.groups, data.groups, strict=True):
        assert group.layers == stored.layers
        assert group.activations.dtype == np.float32
        np.testing.assert_array_equal(group.activations, decoded(expected, stored.dtype)[0])
        if layout.gradients:
            np.testing.assert_array_equal(group.gradients, decoded(expected, stored.dtype)[1])
        else:
            assert group.gradients is None
    if layout.token_window:
        np.testing.assert_array_equal(frame.token_windows, data.tokens)
    else:
        assert frame.token_windows is None
    if layout.alignment_layers:
        assert frame.alignment is not None
        assert frame.alignment.layers == layout.alignment_layers
        np.testing.assert_array_equal(frame.alignment.parts, data.alignment)
        np.testing.assert_array_equal(frame.alignment.info, data.alignment_info)
    else:
        assert frame.alignment is None
    if layout.exact_layers:
        assert frame.exact_alignment is not None
        assert frame.exact_alignment.layers == layout.exact_layers
        np.testing.assert_array_equal(frame.exact_alignment.cosines, data.exact_alignment)
    else:
        assert frame.exact_alignment is None


@st.composite
def layouts(draw: st.DrawFn) -> FrameLayout:
    names = iter("abcdefghijkl")
    groups = tuple(
        GroupLayout(
            layers=tuple(next(names) for _ in range(draw(st.integers(1, 3)))),
            num_tokens=8 * draw(st.integers(1, 3)),
            num_features=draw(st.integers(1, 5)),
            dtype=draw(st.sampled_from(["bfloat16", "float16", "float32"])),
        )
        for _ in range(draw(st.integers(1, 3)))
    )
    return FrameLayout(
        groups=groups,
        gradients=draw(st.booleans()),
        token_window=draw(st.integers(0, 4)),
        alignment_layers=groups[-1].layers if draw(st.booleans()) else (),
        exact_layers=tuple(layer for group in groups for layer in group.layers) if draw(st.booleans()) else (),
    )


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(drawn=st.lists(layouts(), min_size=1, max_size=3), phase=st.sampled_from(["memorize", "compress"]))
def test_every_layout_round_trips_and_a_change_opens_a_fresh_segment(
    tmp_path_factory: pytest.TempPathFactory, drawn: list[FrameLayout], phase: str
) -> None:
    run = create_run(tmp_path_factory.mktemp("run"))
    writer = FrameWriter(run.objects, 3, 1)
    expected = []
    for step, layout in enumerate(drawn):
        data = frame_data(layout, step, phase=phase)
        expected.append((writer.write(layout, data), data, layout))
    reader = FrameReader(run.objects, run.run_id, 3)
    for seq, data, layout in expected:
        frame = reader.read(seq)
        assert frame is not None
        assert (frame.run_id, frame.rank, frame.seq) == (run.run_id, 3, seq)
        assert_same(frame, data, layout)
    changes = sum(before != after for before, after in itertools.pairwise(drawn))
    assert len(list_segments(run.objects, 3)) == 1 + changes
    assert [seq for seq, _, _ in expected] == list(reader.seqs())


def test_padding_is_kept_as_it_is_and_the_commit_says_where_it_begins(tmp_path: Path) -> None:
    run, layout = create_run(tmp_path), frame_layout()
    data = frame_data(layout, 0, num_patches=2)
    data.groups[0][:, :, 16:] = 0
    assert data.tokens is not None
    data.tokens[16:] = -1
    seq = FrameWriter(run.objects, 0, 1).write(layout, data)
    frame = FrameReader(run.objects, run.run_id, 0).read(seq)
    assert frame is not None
    assert frame.num_patches == 2
    assert frame.activations.shape == (2, 32, 6)
    assert not frame.activations[:, 16:].any()
    assert frame.token_windows is not None
    assert (frame.token_windows[16:] == -1).all()


def test_a_step_that_was_not_audited_is_nan_and_one_array_of_a_segment(tmp_path: Path) -> None:
    run = create_run(tmp_path)
    layout = replace(frame_layout(), exact_layers=("a", "b"))
    audited, other = frame_data(layout, 0), frame_data(layout, 1, exact_alignment=np.full((2, 2), np.nan, np.float32))
    writer = FrameWriter(run.objects, 0, 1)
    seqs = [writer.write(layout, data) for data in (audited, other)]
    assert seqs == [0, 1]
    reader = FrameReader(run.objects, run.run_id, 0)
    for seq, data in zip(seqs, (audited, other), strict=True):
        frame = reader.read(seq)
        assert frame is not None
        assert_same(frame, data, layout)
    stored = zarr.open_group(str(tmp_path / frames_key(0, 0)), mode="r")
    assert stored["exact_alignment"].shape == (64, 2, 2)
    assert stored.attrs["exact_layers"] == ["a", "b"]
    np.testing.assert_array_equal(stored["exact_alignment"][0], audited.exact_alignment)


def test_a_segment_written_before_there_were_audits_is_read(tmp_path: Path) -> None:
    run, layout = create_run(tmp_path), frame_layout()
    data = frame_data(layout, 0)
    seq = FrameWriter(run.objects, 0, 1).write(layout, data)
    metadata = tmp_path / frames_key(0, 0) / "zarr.json"
    group = json.loads(metadata.read_text())
    del group["attributes"]["exact_layers"]
    metadata.write_text(json.dumps(group))
    frame = FrameReader(run.objects, run.run_id, 0).read(seq)
    assert frame is not None
    assert_same(frame, data, layout)


def test_a_damaged_audit_makes_the_frame_undetermined(tmp_path: Path) -> None:
    run = create_run(tmp_path)
    layout = replace(frame_layout(), exact_layers=("a", "b"))
    seq = FrameWriter(run.objects, 0, 1).write(layout, frame_data(layout, 0))
    flip_byte(frame_file(run, seq, 0, "exact_alignment"), 3)
    with pytest.raises(CorruptFrameError, match="exact_alignment"):
        FrameReader(run.objects, run.run_id, 0).read(seq)


def test_an_all_zero_frame_is_data(tmp_path: Path) -> None:
    run, layout = create_run(tmp_path), frame_layout()
    data = frame_data(layout, 0)
    for array in (*data.groups, data.tokens, data.alignment, data.alignment_info):
        array[:] = 0
    seq = FrameWriter(run.objects, 0, 1).write(layout, data)
    for name in ("g0", "tokens", "alignment", "alignment_info"):
        assert frame_file(run, seq, 0, name).stat().st_size > 0
    frame = FrameReader(run.objects, run.run_id, 0).read(seq)
    assert frame is not None
    assert_same(frame, data, layout)


def test_a_fill_valued_frame_is_data_too(tmp_path: Path) -> None:
    run, layout = create_run(tmp_path), frame_layout()
    data = frame_data(layout, 0)
    assert data.tokens is not None
    assert data.alignment is not None
    data.tokens[:], data.alignment[:] = -1, np.nan
    seq = FrameWriter(run.objects, 0, 1).write(layout, data)
    frame = FrameReader(run.objects, run.run_id, 0).read(seq)
    assert frame is not None
    assert_same(frame, data, layout)


def test_a_scalar_that_is_missing_is_nan(tmp_path: Path) -> None:
    run, layout = create_run(tmp_path), frame_layout()
    FrameWriter(run.objects, 0, 1).write(layout, frame_data(layout, 0, scalars={"loss": 2.0}))
    (frame,) = run.frames()
    assert frame.scalars["loss"] == 2.0
    assert np.isnan(frame.scalars["lr"])


def test_the_only_group_has_shortcuts_and_several_groups_are_named(tmp_path: Path) -> None:
    run, layout = create_run(tmp_path), frame_layout()
    two = replace(layout, groups=(*layout.groups, replace(layout.groups[0], layers=("c",), num_features=3)))
    FrameWriter(run.objects, 0, 1).write(layout, frame_data(layout, 0))
    FrameWriter(run.objects, 0, 1).write(two, frame_data(two, 1))
    single, several = run.frames()
    assert single.activations is single.groups[0].activations
    assert single.gradients is single.groups[0].gradients
    for shortcut in ("activations", "gradients"):
        with pytest.raises(ValueError, match=r"2 groups of layers: use Frame\.groups"):
            getattr(several, shortcut)
    (bare, _) = run.frames(arrays=False)
    assert (bare.groups, bare.token_windows, bare.alignment) == ((), None, None)
    assert bare.step == 0
    with pytest.raises(ValueError, match="read without arrays"):
        _ = bare.activations


def test_frames_of_all_ranks_come_by_attempt_and_step(tmp_path: Path) -> None:
    run, layout = create_run(tmp_path), frame_layout()
    for attempt, rank, steps in ((1, 0, (0, 1, 2)), (1, 1, (0, 2)), (2, 1, (0,)), (2, 0, (0, 1))):
        writer = FrameWriter(run.objects, rank, attempt)
        for step in steps:
            writer.write(layout, frame_data(layout, step, attempt=attempt))
    order = [(frame.attempt, frame.step, frame.rank) for frame in run.frames()]
    assert order == [(1, 0, 0), (1, 0, 1), (1, 1, 0), (1, 2, 0), (1, 2, 1), (2, 0, 0), (2, 0, 1), (2, 1, 0)]


# ---- the commit protocol ---------------------------------------------------------------------------------------------


def test_arrays_without_a_commit_record_are_no_frame(tmp_path: Path) -> None:
    run, layout = create_run(tmp_path), frame_layout()
    _, reader, (first, second) = written(run, layout, 0, 1)
    frame_file(run, second, 0, "commit").unlink()  # where a kill leaves a writer that has written its arrays
    assert frame_file(run, second, 0, "g0").exists()
    assert reader.read(second) is None
    assert list(reader.seqs()) == [first]
    assert [frame.step for frame in run.frames()] == [0]


def test_the_commit_record_is_the_last_thing_written(tmp_path: Path) -> None:
    """An observer that sees a commit record can read the frame at once, however fast it looks."""
    run, layout = create_run(tmp_path), frame_layout(num_features=64)
    stop, bad, seen = threading.Event(), [], set()

    def observe() -> None:
        reader = FrameReader(run.objects, run.run_id, 0)
        while True:
            last_look = stop.is_set()
            for seq in set(reader.seqs()) - seen:
                seen.add(seq)
                try:
                    frame = reader.read(seq)
                    assert frame is not None
                    assert_same(frame, expected[frame.step], layout)
                except (CorruptFrameError, AssertionError) as error:
                    bad.append(error)
            if last_look:
                return

    expected = {step: frame_data(layout, step) for step in range(200)}
    observer = threading.Thread(target=observe)
    observer.start()
    writer = FrameWriter(run.objects, 0, 1)
    seqs = [writer.write(layout, data) for data in expected.values()]
    stop.set()
    observer.join()
    assert not bad
    assert seen == set(seqs)


@pytest.mark.parametrize("name", ["g0", "tokens", "alignment", "alignment_info"])
def test_a_commit_without_its_data_is_corrupt_not_zeros(tmp_path: Path, name: str) -> None:
    run, layout = create_run(tmp_path), frame_layout()
    _, reader, (seq,) = written(run, layout, 0)
    frame_file(run, seq, 0, name).unlink()
    with pytest.raises(CorruptFrameError, match=rf"expected an intact chunk in .*/{name}"):
        reader.read(seq)
    with pytest.warns(CorruptFrameWarning, match=name):
        assert list(run.frames()) == []
    assert reader.read(seq, arrays=False) is not None


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", ["g0", "tokens", "alignment", "alignment_info"])
def test_no_flipped_byte_goes_unnoticed(tmp_path: Path, name: str, dtype: str) -> None:
    run, layout = create_run(tmp_path), frame_layout(dtype=dtype)
    _, reader, (seq, intact) = written(run, layout, 0, 1)
    file = frame_file(run, seq, 0, name)
    for index in np.linspace(0, file.stat().st_size - 1, 25).astype(int):
        flip_byte(file, index)
        with pytest.raises(CorruptFrameError):
            reader.read(seq)
        flip_byte(file, index)
    assert reader.read(seq) is not None
    assert reader.read(intact) is not None


@pytest.mark.parametrize("name", ["g0", "tokens", "alignment"])
def test_a_truncated_file_is_corrupt_at_any_length(tmp_path: Path, name: str) -> None:
    run, layout = create_run(tmp_path), frame_layout()
    _, reader, (seq,) = written(run, layout, 0)
    file = frame_file(run, seq, 0, name)
    whole = file.read_bytes()
    for length in np.linspace(0, len(whole) - 1, 40).astype(int):
        file.write_bytes(whole[:length])
        with pytest.raises(CorruptFrameError):
            reader.read(seq)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_commit_record_is_corrupt_or_a_frame_but_never_another_exception(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    run, layout = create_run(tmp_path_factory.mktemp("run")), frame_layout()
    _, reader, (seq,) = written(run, layout, 0)
    file = frame_file(run, seq, 0, "commit")
    columns = list(np.frombuffer(file.read_bytes(), "<f8"))
    column = data.draw(st.sampled_from(range(len(COMMIT_COLUMNS))))
    columns[column] = data.draw(st.floats(width=64) | st.sampled_from([-1.0, 0.0, 0.5, 2.0, 1e300]))
    damaged = np.array(columns, "<f8").tobytes()
    file.write_bytes(damaged[: data.draw(st.sampled_from([len(damaged), len(damaged) - 1, 8, 0]))])
    try:
        frame = reader.read(seq)
    except CorruptFrameError:
        return
    assert frame is not None
    assert frame.phase in {"memorize", "compress"}
    assert frame.attempt >= 1
    assert frame.step >= 0


def test_a_record_of_zeros_is_no_frame_zero(tmp_path: Path) -> None:
    run = create_run(tmp_path)
    _, reader, (seq,) = written(run, frame_layout(), 0)
    assert seq == 0
    frame_file(run, seq, 0, "commit").write_bytes(bytes(88))  # what a power cut may leave
    with pytest.raises(CorruptFrameError):
        reader.read(seq)


@pytest.mark.parametrize("name", ["zarr.json", "g0/zarr.json", "tokens/zarr.json", "alignment_info/zarr.json"])
@pytest.mark.parametrize("content", [None, b"", b"{}", b"[1]", b'{"attributes": {"layers": 3}}'])
def test_damaged_metadata_make_the_frame_corrupt(tmp_path: Path, name: str, content: bytes | None) -> None:
    run = create_run(tmp_path)
    _, reader, (seq,) = written(run, frame_layout(), 0)
    metadata = tmp_path / frames_key(0, 0) / name
    metadata.unlink()
    if content is not None:
        metadata.write_bytes(content)
    with pytest.raises(CorruptFrameError):
        reader.read(seq)


def test_a_frame_that_retention_removes_while_it_is_read_is_gone(tmp_path: Path) -> None:
    """The reader holds an open segment; the ring removes it under its feet."""
    run, layout = create_run(tmp_path), frame_layout()
    writer, reader, seqs = written(run, layout, *range(64))
    assert reader.read(seqs[0]) is not None
    stop, gone, read = threading.Event(), [], []

    def read_on() -> None:
        while not stop.is_set():
            for seq in seqs:
                try:
                    frame = reader.read(seq)
                except FrameGoneError as error:
                    gone.append(str(error))
                    return
                if frame is None:
                    return  # removed between two reads
                read.append(seq)

    follower = threading.Thread(target=read_on)
    follower.start()
    retention = Retention(run.objects, 0, 1)
    retention.committed(writer.write(layout, frame_data(layout, 64)))
    stop.set()
    follower.join()
    assert list_segments(run.objects, 0) == [1]
    assert all("removed by retention while read" in message for message in gone)
    for seq in seqs:
        assert reader.read(seq) is None


@pytest.mark.parametrize("moment", ["before the data", "between the arrays", "after the data"])
def test_gone_between_commit_and_data_is_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    """A real retention strikes at a chosen moment of a real read."""
    run, layout = create_run(tmp_path), frame_layout()
    writer, reader, seqs = written(run, layout, *range(64))
    retention = Retention(run.objects, 0, 1)
    newest = writer.write(layout, frame_data(layout, 64))
    inner = FrameReader._open_segment if moment != "after the data" else FrameReader._read_arrays

    def strike(self: FrameReader, number: int) -> object:
        if moment == "before the data":
            retention.committed(newest)
        result = inner(self, number)
        if moment != "before the data":
            retention.committed(newest)
        return result

    monkeypatch.setattr(FrameReader, inner.__name__, strike)
    with pytest.raises(FrameGoneError, match="frame 5 of rank 0 was removed by retention while read"):
        reader.read(seqs[5])


# ---- writers ---------------------------------------------------------------------------------------------------------


def test_each_writer_claims_a_segment_of_its_own(tmp_path: Path) -> None:
    run, layout = create_run(tmp_path), frame_layout()
    for attempt in range(1, 4):
        writer = FrameWriter(run.objects, 0, attempt)
        seqs = [writer.write(layout, frame_data(layout, step, attempt=attempt)) for step in range(2)]
        assert seqs == [64 * (attempt - 1), 64 * (attempt - 1) + 1]
        assert writer.claimed == [attempt - 1]


def test_two_writers_at_once_never_share_a_segment(tmp_path: Path) -> None:
    run, layout = create_run(tmp_path), frame_layout()
    barrier, claimed, refused = threading.Barrier(8), [], []

    def write() -> None:
        writer = FrameWriter(create_run(tmp_path).objects, 0, 1)
        barrier.wait()
        try:
            writer.write(layout, frame_data(layout, 0))
        except SegmentTakenError:
            refused.append(writer)
        claimed.extend(writer.claimed)

    threads = [threading.Thread(target=write) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(claimed) == list(range(8))
    assert len(list(run.frames())) == 8 - len(refused)


def test_a_writer_whose_place_was_taken_is_refused(tmp_path: Path) -> None:
    run, layout = create_run(tmp_path), frame_layout()
    zombie, reader, (first,) = written(run, layout, 0)
    heir = FrameWriter(run.objects, 0, 2)
    newest = heir.write(layout, frame_data(layout, 0, attempt=2))
    for _ in range(2):  # it does not recover by trying again
        with pytest.raises(SegmentTakenError, match="a newer trainer writes this run: stop one of the two"):
            zombie.write(layout, frame_data(layout, 1))
    with pytest.raises(SegmentTakenError):  # nor by claiming a segment behind the heir's
        zombie.write(frame_layout(gradients=False), frame_data(frame_layout(gradients=False), 1))
    assert list(reader.seqs()) == [first, newest]


def test_a_writer_whose_segment_and_heir_were_removed_is_refused(tmp_path: Path) -> None:
    """Stopped for so long that the newer trainer's ring has removed everything that would tell."""
    run, layout = create_run(tmp_path), frame_layout()
    zombie, reader, (first,) = written(run, layout, 0)
    heir, retention = FrameWriter(run.objects, 0, 2), Retention(run.objects, 0, 1)
    for step in range(130):
        retention.committed(heir.write(layout, frame_data(layout, step, attempt=2)))
    assert list_segments(run.objects, 0) == [3]
    with pytest.raises(SegmentTakenError):
        zombie.write(layout, frame_data(layout, 1))
    assert reader.read(first + 1) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert {frame.attempt for frame in run.frames()} == {2}


def test_numbers_are_never_used_again_when_everything_was_removed(tmp_path: Path) -> None:
    run, layout = create_run(tmp_path), frame_layout()
    _, _, seqs = written(run, layout, *range(65))
    Retention(run.objects, 0, 1).committed(seqs[-1])
    for seq in list_commits(run.objects, 0, 1):  # and somebody clears the rest by hand
        run.objects.delete(commit_key(0, seq))
    fresh = FrameWriter(run.objects, 0, 2).write(layout, frame_data(layout, 0, attempt=2))
    assert fresh == 128
    run.objects.delete_tree(frames_key(0))
    again = FrameWriter(run.objects, 0, 3).write(layout, frame_data(layout, 0, attempt=3))
    assert again == 64  # the ring's record alone is left: nothing that it removed comes back
    assert again > max(seqs[:64])


def test_a_bell_that_cannot_be_rung_does_not_unmake_a_committed_frame(tmp_path: Path) -> None:
    run, layout = create_run(tmp_path), frame_layout()
    (tmp_path / "bell" / "r00000").mkdir(parents=True)
    _, reader, (seq,) = written(run, layout, 0)
    assert reader.read(seq) is not None


# ---- other readers ---------------------------------------------------------------------------------------------------


@pytest.fixture
def mixed_run(tmp_path: Path) -> Run:
    """Two ranks, two groups of layers, every array there is."""
    run, layout = create_run(tmp_path / "ra n%20é"), frame_layout(dtype="bfloat16")
    two = replace(layout, groups=(*layout.groups, replace(layout.groups[0], layers=("c",), num_features=3)))
    for rank, chosen in ((0, layout), (1, two)):
        writer = FrameWriter(run.objects, rank, 1)
        for step in range(3):
            writer.write(chosen, frame_data(chosen, step, seed=rank))
    return run


def test_plain_zarr_walks_every_group_and_array(mixed_run: Run) -> None:
    root = zarr.open_group(f"{mixed_run.objects.url}/store.zarr", mode="r")
    found = {path: node for path, node in root.members(max_depth=None)}
    arrays = {path for path, node in found.items() if isinstance(node, zarr.Array)}
    expected = {
        f"frames/r0000{rank}/s000000/{name}"
        for rank, groups in ((0, ("g0",)), (1, ("g0", "g1")))
        for name in (*groups, "tokens", "alignment", "alignment_info", "commit")
    }
    assert arrays == expected
    assert {"frames", "frames/r00000", "frames/r00001/s000000"} <= set(found)
    for path in arrays:
        assert found[path][:3].shape[0] == 3
    assert mixed_run.zarr["frames/r00000/s000000/commit"][:3, 0].tolist() == [0, 1, 2]


@pytest.mark.parametrize("rank", [0, 1])
def test_xarray_opens_every_segment_and_gives_the_same_numbers(mixed_run: Run, rank: int) -> None:
    url = f"{mixed_run.objects.url}/{frames_key(rank, 0)}"
    opened = xr.open_zarr(url, consolidated=False, zarr_format=3, chunks=None)
    frames = [frame for frame in mixed_run.frames() if frame.rank == rank]
    assert opened.sizes["frame"] == 64
    for slot, frame in enumerate(frames):
        assert opened["commit"].values[slot, COMMIT_COLUMNS.index("step")] == frame.step
        for index, group in enumerate(frame.groups):
            block = decoded(opened[f"g{index}"].values[slot], "bfloat16")
            assert opened[f"g{index}"].dims == (
                "frame",
                *(f"{name}_{index}" for name in ("kind", "layer", "token", "feature")),
            )
            np.testing.assert_array_equal(block[0], group.activations)
            np.testing.assert_array_equal(block[1], group.gradients)
        np.testing.assert_array_equal(opened["tokens"].values[slot], frame.token_windows)
        assert frame.alignment is not None
        np.testing.assert_array_equal(opened["alignment"].values[slot], frame.alignment.parts)
    assert opened.attrs["layers"] == [list(group.layers) for group in frames[0].groups]
    assert opened.attrs["first_seq"] == 0
    assert np.isnan(opened["commit"].values[3:]).all()


def test_a_run_reopened_from_a_strange_path_is_the_same(mixed_run: Run) -> None:
    again = open_run(f"file://{mixed_run.objects.url}")
    assert again.run_id == mixed_run.run_id
    assert len(list(again.frames())) == 6
