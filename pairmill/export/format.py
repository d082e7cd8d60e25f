"""What a format is: what it writes for a group of pairs, what it writes for all of them, and what can be chosen."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypeVar, get_args

import pyarrow as pa

from pairmill.errors import ConfigError
from pairmill.export import jsonl
from pairmill.export.dialects import DIALECTS
from pairmill.export.folder import Folder, Sink, Written
from pairmill.export.selection import Group, Selection
from pairmill.instructions import KINDS
from schemas.config import InstructKind

T = TypeVar("T")

Images = Literal["files", "shards", "none"]
"""Where images stand: each in a file of its own, in one tar a group, or nowhere."""


@dataclass(frozen=True)
class Options:
    """What can be chosen of an export besides its pairs. Null: not given, or of no meaning for the format."""

    images: Images | None = None
    kinds: tuple[InstructKind, ...] | None = None
    """Which conversations; pairs without any of them are left out. Empty: none, and all pairs."""
    boxes: str | None = None
    """How boxes are written in text: a name of `pairmill.export.dialects.DIALECTS`."""

    def stated(self) -> dict[str, Any]:
        """What the manifest says of them."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items() if v}


@dataclass(frozen=True)
class Parts:
    """The main files of all groups, in order, which a whole file is made from. It can be read several times."""

    folder: Folder
    names: tuple[str, ...]

    def lines(self) -> Iterator[bytes]:
        """The records of JSON Lines files as they were written, without the uid of their pair.

        Raises:
            Damaged: a file is not whole.
            FileNotFoundError: one is missing.
        """
        return (jsonl.without_uid(line) for _, line in self._each(jsonl.lines))

    def records(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """As `lines`, parsed: uid and record."""
        return self._each(jsonl.records)

    def uids(self) -> Iterator[str]:
        """The uids of the records, without reading on."""
        return self._each(jsonl.uids)

    def _each(self, read: Callable[[Any], Iterator[T]]) -> Iterator[T]:
        for name in self.names:
            with self.folder.open(name) as file:
                yield from read(file)


@dataclass(frozen=True)
class Whole:
    """A file of the whole export, made from its parts when these are there; its bytes depend on nothing else."""

    name: str
    write: Callable[[Folder, Parts], Written]


WriteGroup = Callable[[Selection, Group, pa.Table, Folder, Options], list[Written]]
"""Writes the files of a group, given its metadata; returns them, the main one first. A main file is named by the number
of its group and holds each pair's uid: a ``.tar`` (`pairmill.export.tar`), a ``.parquet`` with a column ``uid``, or a
``.jsonl`` (`pairmill.export.jsonl`)."""


@dataclass(frozen=True)
class Format:
    """A format; all of them are in `pairmill.export.formats.FORMATS`."""

    name: str
    told: str
    """What reads it, in one line of the command's help."""
    ending: str
    """Of main files."""
    write: WriteGroup
    wholes: tuple[Whole, ...] = ()
    defaults: Options = Options()
    """Options that it takes, with what holds where they are not given; null: it does not take this one."""
    kinds: tuple[InstructKind, ...] = KINDS
    """Kinds of conversations that it can hold."""
    columns: tuple[str, ...] = ()
    """Columns of the store that it needs besides `pairmill.export.selection.Selection.metadata`; null where the recipe
    does not write them."""

    def chosen(self, given: Options) -> Options:
        """The options that hold when some are given.

        Raises:
            ConfigError: it does not take one of them, or a value is none.
        """
        for name in (f.name for f in fields(Options)):
            value = getattr(given, name)
            if value is not None and getattr(self.defaults, name) is None:
                raise ConfigError(f"{name}: exports as {self.name} have no such option")
            _check(name, value)
        known = {f.name: getattr(given, f.name) for f in fields(Options) if getattr(given, f.name) is not None}
        chosen = replace(self.defaults, **known)
        if chosen.kinds:
            return replace(chosen, kinds=self._kinds(given, chosen))
        if given.boxes is not None:
            raise ConfigError(
                f"boxes: it says how boxes are written in conversations, and exports as {self.name} hold none unless "
                "kinds names some"
            )
        return replace(chosen, boxes=None)

    def _kinds(self, given: Options, chosen: Options) -> tuple[InstructKind, ...]:
        kinds = tuple(kind for kind in KINDS if kind in (chosen.kinds or ()))
        if strange := [kind for kind in kinds if kind not in self.kinds]:
            raise ConfigError(f"kinds: exports as {self.name} hold {', '.join(self.kinds)} alone, not {strange[0]}")
        if chosen.boxes is None or DIALECTS[chosen.boxes].shows_boxes or "grounding" not in kinds:
            return kinds
        if given.kinds is not None:
            raise ConfigError(f"kinds: grounding makes no sense with boxes = {chosen.boxes!r}, which writes no boxes")
        return tuple(kind for kind in kinds if kind != "grounding")


def _check(name: str, value: Any) -> None:
    known: Mapping[str, Sequence[str]] = {"images": get_args(Images), "kinds": KINDS, "boxes": tuple(DIALECTS)}
    given: Iterable[str] = () if value is None else (value,) if isinstance(value, str) else value
    for one in given:
        if one not in known[name]:
            raise ConfigError(f"{name}: there is no {one!r}; choose from {', '.join(known[name])}")


def json_list(name: str) -> Whole:
    """A whole file that is one JSON list of all records, one a line."""

    def write(folder: Folder, parts: Parts) -> Written:
        with folder.create(name) as sink:
            write_list(sink, parts.lines())
            sink.write(b"\n")
        return sink.written(name)

    return Whole(name, write)


def write_list(sink: Sink, items: Iterable[bytes]) -> None:
    """Write a JSON list of items that are JSON already, one a line."""
    before = b"["
    for item in items:
        sink.write(before + b"\n" + item)
        before = b","
    sink.write(b"[]" if before == b"[" else b"\n]")
