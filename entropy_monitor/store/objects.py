"""Named byte objects under a path or URL: the one place that touches files and object stores directly."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import tensorstore as ts

from entropy_monitor.errors import StoreError

if TYPE_CHECKING:
    from collections.abc import Mapping

_MISSING_GENERATION = b"\x02"  # TensorStore's StorageGeneration::NoValue: "write only if nothing is there"
# A SIGKILL cannot lose what the kernel has accepted, so nothing waits for the disk (docs/decisions.md).
_CONTEXT = {"file_io_sync": False}
_TENSORSTORE_ERRORS = (ValueError, OSError, RuntimeError)
T = TypeVar("T")


class Objects:
    """Byte objects by key under one root, each written whole or not at all."""

    def __init__(self, url: str | Path) -> None:
        text = str(url)
        self.is_local = "://" not in text or text.startswith("file://")
        if self.is_local:
            # TensorStore refuses "..", and a later change of directory must not move the run.
            self.path: Path | None = Path(text.removeprefix("file://")).resolve()
            self.url = str(self.path)
        else:
            self.path = None
            self.url = text.rstrip("/")
        self.context = ts.Context(_CONTEXT)
        try:
            self._store = ts.KvStore.open(self.kvstore_spec(""), context=self.context).result()
        except _TENSORSTORE_ERRORS as error:
            raise StoreError(f"expected a directory or a URL of a known kind; found {self.url}: {error}") from error

    def __repr__(self) -> str:
        return f"Objects({self.url!r})"

    def kvstore_spec(self, key: str) -> dict[str, str] | str:
        """TensorStore's specification of the prefix `key`."""
        if self.is_local:
            return {"driver": "file", "path": f"{self.url}/{key}" if key else f"{self.url}/"}
        return f"{self.url}/{key}"

    def create(self, key: str, value: bytes) -> bool:
        """Write `value` unless the key exists.

        Returns:
            Whether this call created the object.
        """
        stamp = self._wait(self._store.write(key, value, if_equal=_MISSING_GENERATION), key)
        return stamp.generation != b""

    def put(self, key: str, value: bytes) -> None:
        """Write `value`, replacing what was there in one atomic step."""
        self._wait(self._store.write(key, value), key)

    def get(self, key: str) -> bytes | None:
        """Read an object.

        Returns:
            Its bytes, or None where there is none.
        """
        result = self._wait(self._store.read(key), key)
        return result.value if result.state == "value" else None

    def exists(self, key: str) -> bool:
        """Whether there is such an object.

        Returns:
            True or False, at the moment of the call.
        """
        if self.path is not None:
            return (self.path / key).exists()  # a stat costs a third of a read
        return self.get(key) is not None

    def children(self, prefix: str) -> list[str]:
        """Names one level below `prefix`, sorted; temporary files of an interrupted write are left out.

        Returns:
            The names, without the prefix.

        Raises:
            StoreError: the place cannot be read.
        """
        if self.path is not None:
            try:
                names = {entry.name for entry in (self.path / prefix).iterdir()}
            except FileNotFoundError:
                return []
            except OSError as error:
                raise StoreError(f"cannot list {self.url}/{prefix}: {error}") from error
        else:
            keys = self._wait(self._store.list(ts.KvStore.KeyRange(f"{prefix}/", f"{prefix}0")), prefix)
            names = {key.decode().removeprefix(f"{prefix}/").split("/")[0] for key in keys}
        return sorted(name for name in names if not name.endswith(".__lock"))

    def delete(self, key: str) -> None:
        """Delete one object, if it exists."""
        self._wait(self._store.write(key, None), key)

    def delete_tree(self, prefix: str) -> None:
        """Delete everything below `prefix`, left-over lock files included."""
        if self.path is not None:
            shutil.rmtree(self.path / prefix, ignore_errors=True)
        else:
            self._wait(self._store.delete_range(ts.KvStore.KeyRange(f"{prefix}/", f"{prefix}0")), prefix)

    def create_json(self, key: str, value: Mapping[str, Any]) -> bool:
        """`create`, of a JSON object.

        Returns:
            Whether this call created the object.
        """
        return self.create(key, encode_json(value))

    def put_json(self, key: str, value: Mapping[str, Any]) -> None:
        """`put`, of a JSON object."""
        self.put(key, encode_json(value))

    def get_json(self, key: str) -> dict[str, Any] | None:
        """Read a JSON object.

        Returns:
            The object; None where there is none, or none that can be parsed.
        """
        value = self.get(key)
        if value is None:
            return None
        try:
            parsed = json.loads(value)
        except (ValueError, RecursionError):  # the latter from a deeply nested file
            return None
        return parsed if isinstance(parsed, dict) else None

    def _wait(self, future: ts.Future[T], key: str) -> T:
        try:
            return future.result()
        except _TENSORSTORE_ERRORS as error:
            raise StoreError(f"expected a usable store at {self.url}/{key}; {error}") from error


def encode_json(value: Mapping[str, Any]) -> bytes:
    """One canonical encoding: sorted keys, no spaces; NaN and infinity, which JSON lacks, become null.

    Returns:
        UTF-8 bytes.
    """
    return json.dumps(_finite(value), sort_keys=True, separators=(",", ":"), allow_nan=False, default=str).encode()


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return value
