"""The manifest of an export: what it is, what each file holds, and what changed since the manifest before.

A folder with a whole manifest is a whole export. While files are being changed there is no manifest; what is known of
them is kept under a name that says so (`PREVIOUS`, `TAKEDOWN`), from which the work goes on after a kill.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from pairmill.errors import ConfigError
from pairmill.export import images
from pairmill.export.folder import TEMPORARY, Folder, Written
from pairmill.export.format import Format, Parts
from pairmill.export.formats import FORMATS
from pairmill.export.selection import Group

MANIFEST = "manifest.json"
"""Says what the export is and lists its files; a folder without it is no finished export."""
PREVIOUS = ".previous.json"
"""The manifest of before, while an update is going on."""
TAKEDOWN = ".takedown.json"
"""The manifest, while pairs are being taken out of the files of a finished export."""
BEGUN = ".export.json"
"""Says what a first, unfinished export is going to be."""
STATES = (MANIFEST, PREVIOUS, TAKEDOWN, BEGUN)

LAYOUT = 3
"""Raised when the same snapshot gives other files."""

SIZES = "sizes.json"
"""Of an export with tars: how many samples each of them holds."""
WHOLE_FILES = frozenset(whole.name for kind in FORMATS.values() for whole in kind.wholes)
"""Names of files that formats make from the parts of an export."""

_OURS = re.compile(rf"(?:{images.IMAGES}/(\d{{5,12}})|(\d{{5,12}})(\.tar|\.parquet|(_images)?\.jsonl|_stats\.json))")


def number_of(name: str) -> int | None:
    """The number of the group that a file, or folder of images, belongs to, by its name; None for one of another
    kind."""
    found = _OURS.fullmatch(name.removesuffix(TEMPORARY))
    return int(found[1] or found[2]) if found else None


def is_temporary(name: str) -> bool:
    """Whether a file is one of an export's that was being written when its process was killed."""
    base = name.removesuffix(TEMPORARY)
    return base != name and (number_of(base) is not None or base in {*STATES, SIZES, *WHOLE_FILES})


@dataclass(frozen=True)
class FileEntry:
    """A main file (a tar, annotations, or a Parquet file with images) and the files beside it."""

    name: str
    bytes: int
    sha256: str
    samples: int
    shards: tuple[int, int]
    """First and last shard of the dataset that belong to it."""
    digits: int
    """Digits of the position in its keys."""
    content: str | None
    """Digest of what it holds (`pairmill.export.selection.Selection.content`); null after a takedown, when it holds
    less: the next update writes it anew."""
    since: int
    """The snapshot at which its present content was first exported."""
    taken_down: int = 0
    """Samples that takedowns removed from it since."""
    side: tuple[Written, ...] = ()

    @property
    def number(self) -> int:
        """The number in its name."""
        return int(self.name.partition(".")[0])

    @property
    def parts(self) -> list[Written]:
        """The main file and those beside it."""
        return [Written(self.name, self.bytes, self.sha256), *self.side]

    @property
    def tar(self) -> str | None:
        """The name of its tar, if there is one."""
        return next((part.name for part in self.parts if part.name.endswith(".tar")), None)

    @property
    def lists_images(self) -> bool:
        """Whether it has a folder of images (`pairmill.export.images`)."""
        return any(images.is_list(part.name) for part in self.side)


@dataclass(frozen=True)
class Manifest:
    """What an export holds."""

    export: dict[str, Any]
    """What stays over updates: dataset, format, where, pairs_per_shard, layout, and options, if there are any."""
    snapshot: int
    digest: str
    """sha256 of the snapshot's record."""
    pairs: int
    previous: int | None = None
    """The snapshot whose export was brought to this one; null for a first export."""
    new: tuple[str, ...] = ()
    """Main files that the previous export did not have."""
    changed: tuple[str, ...] = ()
    """Main files whose content differs from the previous export's."""
    removed: tuple[str, ...] = ()
    """Main files that only the previous export had."""
    unchanged: int = 0
    files: tuple[FileEntry, ...] = ()
    side: tuple[Written, ...] = ()
    """Files beside them that belong to the whole export."""
    pending: tuple[int, ...] = field(default=(), compare=False)
    """Only in `TAKEDOWN`: groups whose files may hold less than is said here."""

    @property
    def format(self) -> Format:
        """Its format.

        Raises:
            ConfigError: this version of pairmill does not know it.
        """
        name = self.export["format"]
        if name not in FORMATS:
            raise ConfigError(f"it is an export as {name!r}, which this version of pairmill does not know; update it")
        return FORMATS[name]

    @property
    def parts(self) -> list[Written]:
        """All files but the manifest and image files."""
        return [part for entry in self.files for part in entry.parts] + list(self.side)

    def boundaries(self) -> list[Group]:
        """Which shards of the dataset go into which file."""
        return [Group(e.number, *e.shards, admitted=0, digits=e.digits) for e in self.files]

    def without_content(self, numbers: Iterable[int]) -> Manifest:
        """The same, but the content of these groups counts as unknown."""
        gone = set(numbers)
        files = tuple(replace(e, content=None) if e.number in gone else e for e in self.files)
        return replace(self, files=files)

    def to_json(self) -> dict[str, Any]:
        """As it is stored: with a checksum over the rest."""
        value = json.loads(json.dumps(asdict(self)))
        if not self.pending:
            del value["pending"]
        return {**value, "checksum": _checksum(value)}

    @classmethod
    def from_json(cls, value: Any) -> Manifest | None:
        """The inverse of `to_json`; None when it is damaged."""
        try:
            rest = {name: part for name, part in value.items() if name != "checksum"}
            if value["checksum"] != _checksum(rest) or rest["export"]["layout"] != LAYOUT:
                return None
            lists = {n: tuple(rest[n]) for n in ("new", "changed", "removed")}
            lists["pending"] = tuple(rest.get("pending", ()))
            files = tuple(
                FileEntry(**{**file, "shards": tuple(file["shards"]), "side": _written(file["side"])})
                for file in rest["files"]
            )
            manifest = cls(**{**rest, **lists, "files": files, "side": _written(rest["side"])})
            known = all(number_of(part.name) == e.number for e in files for part in e.parts)
        except (AttributeError, KeyError, TypeError, ValueError):
            return None
        return manifest if known and all("/" not in part.name for part in manifest.side) else None


def read_manifest(folder: Folder, name: str = MANIFEST) -> Manifest | None:
    """A stored manifest; None when it is missing or damaged."""
    return Manifest.from_json(folder.read_json(name))


def statistics(samples: int, content: str | None, files: Iterable[Written]) -> dict[str, Any]:
    """What is written beside a main file when it is whole: img2dataset's statistics, the digest of what went into it
    (see `FileEntry.content`), and the files."""
    return {
        "count": samples,
        "successes": samples,
        "failed_to_download": 0,
        "failed_to_resize": 0,
        "status_dict": {"success": samples} if samples else {},
        "content": content,
        "files": [asdict(file) for file in files],
    }


def write_whole_files(folder: Folder, format: Format, files: Sequence[FileEntry]) -> tuple[Written, ...]:  # noqa: A002
    """Write the files of the whole export from those of its groups.

    Raises:
        Damaged: a group's file is not whole.
        FileNotFoundError: one is missing.
        StoreError: a file cannot be written.
    """
    parts = Parts(folder, tuple(file.name for file in files))
    written = [whole.write(folder, parts) for whole in format.wholes]
    tars = {file.tar: file.samples for file in files if file.tar}
    if tars or format.ending == ".tar":
        written.append(folder.write_json(SIZES, tars))
    return tuple(written)


def statistics_name(number: int) -> str:
    """The name of a group's statistics."""
    return f"{number:05d}_stats.json"


@dataclass(frozen=True)
class There:
    """What a folder holds of an export already."""

    sizes: dict[str, int]
    manifest: Manifest | None = None
    """Of a finished export."""
    previous: Manifest | None = None
    """Of the export that was there before an update which has not finished."""

    @property
    def known(self) -> Manifest | None:
        """The last manifest there was."""
        return self.manifest or self.previous

    def has_all_of(self, manifest: Manifest, folder: Folder) -> bool:
        """Whether each file that is listed is there, by its size."""
        return all(self.sizes.get(part.name) == part.bytes for part in manifest.parts) and all(
            images.whole(folder, entry.number, read=False) for entry in manifest.files if entry.lists_images
        )


def find_export(folder: Folder, identity: dict[str, Any]) -> There:
    """What the folder holds of the export with this identity; nothing, when it is empty.

    Raises:
        ConfigError: it holds something else.
    """
    sizes = folder.sizes()
    state = next((name for name in STATES if name in sizes), None)
    if state is None:
        if not all(map(is_temporary, sizes)):
            raise ConfigError(f"{folder.url} is not empty and holds no export; give a new folder")
        return There(sizes)
    found = folder.read_json(state)
    if not isinstance(found, dict) or found.get("export") != identity:
        raise ConfigError(f"{folder.url} holds another export ({_difference(found, identity)}); give an empty folder")
    if state == BEGUN:
        return There(sizes)
    manifest = Manifest.from_json(found)
    if manifest is None:
        raise ConfigError(
            f"{folder.url} holds an export whose {state} is damaged, so what its files hold is unknown; "
            "remove the folder, or give another one"
        )
    if state == MANIFEST:
        return There(sizes, manifest)
    return There(sizes, previous=manifest.without_content(manifest.pending))


def begin_changes(folder: Folder, identity: dict[str, Any], there: There) -> None:
    """From now on the export is not whole, until `finish_changes`: there is no manifest."""
    if there.manifest:
        for name in {PREVIOUS, TAKEDOWN, BEGUN} & there.sizes.keys():  # left by a process killed after it had finished
            folder.remove(name)
        folder.rename(MANIFEST, PREVIOUS)
    elif there.previous:
        if PREVIOUS not in there.sizes:  # a takedown was killed: the update writes its files anew
            folder.write_json(PREVIOUS, there.previous.to_json())
            folder.remove(TAKEDOWN)
    else:
        folder.write_json(BEGUN, {"export": identity})
    folder.settle()


def finish_changes(folder: Folder, manifest: Manifest) -> None:
    """Take away what the export no longer has and write the manifest: from now on it is whole."""
    listed = {part.name for part in manifest.parts}
    there = folder.sizes()
    for name in there:
        if is_temporary(name) or (number_of(name) is not None and name not in listed):
            folder.remove(name)
    if has_image_files(manifest.export):
        images.sweep(folder, {entry.number for entry in manifest.files if entry.lists_images})
    folder.settle()
    folder.write_json(MANIFEST, manifest.to_json())
    folder.settle()
    for name in {PREVIOUS, TAKEDOWN, BEGUN} & there.keys():
        folder.remove(name)


def flat(export: Mapping[str, Any]) -> dict[str, Any]:
    """What stays over updates, options beside the rest."""
    options = export.get("options")
    rest = {name: value for name, value in export.items() if name != "options"}
    return {**rest, **options} if isinstance(options, dict) else rest


def has_image_files(export: Mapping[str, Any]) -> bool:
    """Whether the folder ``images`` is the export's, by what a manifest says of it."""
    return flat(export).get("images") == "files"


def _written(files: Iterable[dict[str, Any]]) -> tuple[Written, ...]:
    return tuple(Written(**file) for file in files)


def _checksum(value: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _difference(found: Any, identity: dict[str, Any]) -> str:
    there = found.get("export") if isinstance(found, dict) else None
    if not isinstance(there, dict):
        return "its manifest is damaged"
    there, wanted = flat(there), flat(identity)
    keys = [key for key in {**wanted, **there} if there.get(key) != wanted.get(key)]
    return ", ".join(f"{key} {there.get(key)!r} instead of {wanted.get(key)!r}" for key in keys)
