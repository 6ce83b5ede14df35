"""Zarr v3 groups and arrays, written and read through TensorStore, readable by plain zarr and xarray."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import tensorstore as ts

from entropy_monitor.errors import CorruptFrameError, StoreError
from entropy_monitor.store.objects import encode_json

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from entropy_monitor.store.objects import Objects

_ZARR_TYPES = {"u2": "uint16", "f2": "float16", "f4": "float32", "f8": "float64", "i4": "int32", "i8": "int64"}
_BYTES = {"name": "bytes", "configuration": {"endian": "little"}}
_CRC = {"name": "crc32c"}


def create_group(objects: Objects, key: str, attributes: Mapping[str, Any] | None = None) -> bool:
    """Create a zarr group by conditional create.

    Returns:
        Whether this call created it: False means that somebody else has.
    """
    metadata = {"zarr_format": 3, "node_type": "group", "attributes": dict(attributes or {})}
    return objects.create(f"{key}/zarr.json", encode_json(metadata))


def create_group_path(objects: Objects, key: str) -> None:
    """Create a group and every group above it, so that plain zarr can walk the whole run."""
    parts = key.split("/")
    for depth in range(2, len(parts) + 1):
        create_group(objects, "/".join(parts[:depth]))


def read_group_attributes(objects: Objects, key: str) -> dict[str, Any] | None:
    """Attributes of a group.

    Returns:
        The attributes, or None where there is no readable group.
    """
    metadata = objects.get_json(f"{key}/zarr.json")
    return None if metadata is None else metadata.get("attributes", {})


class Array:
    """One zarr array on disk."""

    def __init__(self, objects: Objects, key: str, array: ts.TensorStore) -> None:
        self._objects, self._key, self._array = objects, key, array
        self.shape: tuple[int, ...] = tuple(array.shape)

    @classmethod
    def create(
        cls,
        objects: Objects,
        key: str,
        *,
        shape: Sequence[int],
        chunk: Sequence[int],
        dtype: str,
        dimensions: Sequence[str],
        fill: float = 0,
        inner_chunk: Sequence[int] | None = None,
        checksum: bool = True,
        attributes: Mapping[str, Any] | None = None,
    ) -> Array:
        """Create an array.

        Args:
            objects: the run.
            key: the array's key.
            shape: extent of each dimension.
            chunk: extent of one stored object.
            dtype: ``u2``, ``f2``, ``f4``, ``f8``, ``i4`` or ``i8``.
            dimensions: a name for each dimension; xarray refuses an array without them.
            fill: value of what was never written.
            inner_chunk: makes each object a shard of such chunks.
            checksum: whether each chunk carries a CRC-32C.
            attributes: the array's attributes.

        Returns:
            The open array.

        Raises:
            StoreError: the store cannot be written.
        """
        codecs: list[dict[str, Any]] = [_BYTES, _CRC] if checksum else [_BYTES]
        if inner_chunk is not None:
            sharding = {"chunk_shape": list(inner_chunk), "codecs": codecs, "index_codecs": [_BYTES, _CRC]}
            codecs = [{"name": "sharding_indexed", "configuration": sharding}]
        metadata = {
            "shape": list(shape),
            "data_type": _ZARR_TYPES[dtype],
            "fill_value": "NaN" if fill != fill else fill,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunk)}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
            "codecs": codecs,
            "dimension_names": list(dimensions),
            "attributes": dict(attributes or {}),
        }
        return cls(objects, key, _open(objects, key, metadata=metadata, create=True))

    @classmethod
    def open(cls, objects: Objects, key: str) -> Array:
        """Open an existing array.

        Returns:
            The open array.

        Raises:
            StoreError: there is no such array.
        """
        return cls(objects, key, _open(objects, key, open=True))

    def write(self, start: Sequence[int], block: NDArray[Any]) -> ts.WriteFutures:
        """Begin to write one whole chunk or more; the caller keeps `block` unchanged until the future is done.

        Args:
            start: index of the block's first element in the leading dimensions.
            block: the values, of the array's rank.

        Returns:
            A future; pass it to `wait`.
        """
        return self._array[self._region(start, block.shape)].write(block, can_reference_source_data_indefinitely=True)

    def read(self, index: Any) -> NDArray[Any]:
        """Read a part of the array.

        Returns:
            The values.

        Raises:
            CorruptFrameError: a chunk was never written, has been removed, or fails its checksum.
        """
        try:
            return np.asarray(self._array[index].read().result())
        except (ValueError, OSError, RuntimeError) as error:
            raise CorruptFrameError(f"expected an intact chunk in {self._objects.url}/{self._key}; {error}") from error

    def wait(self, future: ts.WriteFutures) -> None:
        """Wait for a write.

        Raises:
            StoreError: the store refused it.
        """
        try:
            future.result()
        except (ValueError, OSError, RuntimeError) as error:
            raise StoreError(f"cannot write {self._objects.url}/{self._key}; {error}") from error

    @staticmethod
    def _region(start: Sequence[int], shape: Sequence[int]) -> tuple[slice, ...]:
        origin = [*start, *[0] * (len(shape) - len(start))]
        return tuple(slice(o, o + n) for o, n in zip(origin, shape, strict=True))


def _open(objects: Objects, key: str, **spec: Any) -> ts.TensorStore:
    try:
        return ts.open(
            {
                "driver": "zarr3",
                "kvstore": objects.kvstore_spec(f"{key}/"),
                # An all-zero frame is data, and a missing chunk is a fault, never zeros.
                "store_data_equal_to_fill_value": True,
                "fill_missing_data_reads": False,
                **spec,
            },
            context=objects.context,
        ).result()
    except (ValueError, OSError, RuntimeError) as error:
        raise StoreError(f"expected a zarr array at {objects.url}/{key}; {error}") from error
