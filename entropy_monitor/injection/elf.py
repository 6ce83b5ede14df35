"""Exported symbols of a running process, read from its memory.

No file is opened, so that containers, replaced packages and other people's file systems make no difference.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

Read = Callable[[int, int], bytes]
"""``read(address, size)`` gives bytes of the process's memory."""

_LOAD, _DYNAMIC = 1, 2
_HASH, _STRTAB, _SYMTAB, _GNU_HASH = 4, 5, 6, 0x6FFFFEF5
_PAGE = 4096
_SYMBOL_BYTES = 24
_IFUNC = 10
_CHAIN_LIMIT = 1 << 16
"""Longer chains are no hash table but something else."""


@dataclass(frozen=True, slots=True)
class Module:
    """A program or library that is mapped into a process."""

    path: str
    base: int
    code: tuple[tuple[int, int], ...]
    """Start and end of its executable pages."""

    @property
    def name(self) -> str:
        """The file's name."""
        return self.path.rpartition("/")[2]


def read_modules(pid: int) -> list[Module]:
    """List what is mapped into a process.

    Returns:
        Every mapped file, in order of address.
    """
    bases: dict[str, int] = {}
    code: dict[str, list[tuple[int, int]]] = {}
    for line in Path(f"/proc/{pid}/maps").read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        fields = line.split(None, 5)
        if len(fields) < 6 or not fields[5].startswith("/"):
            continue
        path = fields[5].removesuffix(" (deleted)")
        start, end = (int(part, 16) for part in fields[0].split("-"))
        if int(fields[2], 16) == 0:
            bases.setdefault(path, start)
        if "x" in fields[1]:
            code.setdefault(path, []).append((start, end))
    return [Module(path, base, tuple(code.get(path, ()))) for path, base in bases.items()]


def exported(read: Read, base: int, names: Iterable[str]) -> dict[str, int]:
    """Find symbols of one module.

    Args:
        read: memory of the process.
        base: where the module's first page is mapped.
        names: the symbols wanted.

    Returns:
        The addresses of those that the module exports.
    """
    dynamic = _dynamic(read, base)
    if dynamic is None or _SYMTAB not in dynamic or _STRTAB not in dynamic:
        return {}
    tables = _Tables(read, dynamic)
    found = {name: tables.address(name) for name in names}
    return {name: address for name, address in found.items() if address is not None}


def _dynamic(read: Read, base: int) -> dict[int, int] | None:
    """The dynamic section as tag and absolute address, or None where there is none."""
    header = read(base, 64)
    if header[:6] != b"\x7fELF\x02\x01":  # 64-bit, little endian
        return None
    (offset,) = struct.unpack_from("<Q", header, 32)
    size, count = struct.unpack_from("<HH", header, 54)
    programs = [struct.unpack_from("<IIQQQQQQ", read(base + offset + i * size, 56)) for i in range(count)]
    first = next((program[3] for program in programs if program[0] == _LOAD), 0)
    bias = base - first // _PAGE * _PAGE
    section = next(((program[3], program[6]) for program in programs if program[0] == _DYNAMIC), None)
    if section is None:
        return None
    entries = struct.iter_unpack("<QQ", read(bias + section[0], section[1] // 16 * 16))
    # glibc has added the load address to these pointers, musl has not.
    wanted = {_HASH, _STRTAB, _SYMTAB, _GNU_HASH}
    found = {tag: value if value >= bias else value + bias for tag, value in entries if tag in wanted}
    return {**found, 0: bias}


class _Tables:
    """Symbol, string and hash tables of one module."""

    def __init__(self, read: Read, dynamic: dict[int, int]) -> None:
        self._read, self._at, self._bias = read, dynamic, dynamic[0]

    def address(self, name: str) -> int | None:
        """Where the module defines a symbol, or None."""
        wanted = name.encode("ascii") + b"\0"
        for index in self._gnu_candidates(wanted[:-1]) if _GNU_HASH in self._at else self._candidates(wanted[:-1]):
            at = self._at[_SYMTAB] + index * _SYMBOL_BYTES
            string, info, _, section, value, _ = struct.unpack("<IBBHQQ", self._read(at, _SYMBOL_BYTES))
            defined = section and value and info & 15 != _IFUNC
            if defined and self._read(self._at[_STRTAB] + string, len(wanted)) == wanted:
                return value + self._bias
        return None

    def _gnu_candidates(self, name: bytes) -> Iterable[int]:
        at = self._at[_GNU_HASH]
        buckets, first, bloom, _ = struct.unpack("<4I", self._read(at, 16))
        value = 5381
        for byte in name:
            value = (value * 33 + byte) & 0xFFFFFFFF
        table = at + 16 + 8 * bloom
        index = self._word(table + 4 * (value % buckets)) if buckets else 0
        if index < first:
            return
        for _ in range(_CHAIN_LIMIT):
            stored = self._word(table + 4 * buckets + 4 * (index - first))
            if stored | 1 == value | 1:
                yield index
            if stored & 1:
                return
            index += 1

    def _candidates(self, name: bytes) -> Iterable[int]:
        if _HASH not in self._at:
            return
        at = self._at[_HASH]
        value = 0
        for byte in name:
            value = (value << 4) + byte
            value = (value ^ (value & 0xF0000000) >> 24) & 0x0FFFFFFF
        buckets = self._word(at)
        index = self._word(at + 8 + 4 * (value % buckets)) if buckets else 0
        for _ in range(_CHAIN_LIMIT):
            if index == 0:
                return
            yield index
            index = self._word(at + 8 + 4 * buckets + 4 * index)

    def _word(self, address: int) -> int:
        return struct.unpack("<I", self._read(address, 4))[0]


_SIGRETURN = re.compile(rb"(?:\x48\xc7\xc0|\xb8)\x0f\0\0\0\x0f\x05", re.DOTALL)
"""``mov $15, %rax`` (or %eax) and ``syscall``: what a libc returns to from a signal handler, on x86-64."""


def find_sigreturn(read: Read, modules: Iterable[Module]) -> int | None:
    """Find the instructions with which a libc returns from a signal handler.

    Args:
        read: memory of the process.
        modules: where to look.

    Returns:
        Their address, or None.
    """
    for module in modules:
        for start, end in module.code:
            if match := _SIGRETURN.search(read(start, end - start)):
                return start + match.start()
    return None
