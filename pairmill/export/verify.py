"""Is an export whole? Reads every file and compares it with the manifest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

from pairmill.export import images
from pairmill.export.folder import Folder, Written
from pairmill.export.manifest import (
    BEGUN,
    LAYOUT,
    MANIFEST,
    PREVIOUS,
    STATES,
    TAKEDOWN,
    FileEntry,
    Manifest,
    flat,
    has_image_files,
    is_temporary,
)

if TYPE_CHECKING:
    from pairmill.report.progress import Reporter


class Wrong(str, Enum):  # enum.StrEnum needs Python 3.11
    """What may be wrong with a file of an export."""

    MANIFEST = "manifest"
    """There is no manifest, or it is damaged."""
    OTHER = "other"
    """It is an export of something else than was expected."""
    MISSING = "missing"
    SIZE = "size"
    SHA256 = "sha256"
    UNREADABLE = "unreadable"
    SURPLUS = "surplus"
    """The manifest does not list it."""

    __str__ = str.__str__


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong."""

    file: str
    wrong: Wrong
    detail: str


@dataclass(frozen=True)
class VerifyReport:
    """What was found; null where there is no manifest to say it."""

    out: str
    format: str | None
    snapshot: int | None
    pairs: int | None
    files: int
    """Files that the manifest lists, and images that its lists of images do."""
    bytes: int
    """Their size."""
    problems: tuple[Problem, ...]

    @property
    def ok(self) -> bool:
        """Nothing is wrong."""
        return not self.problems


def verify_export(
    out: str, expected: Mapping[str, Any] | None = None, *, progress: Reporter | None = None
) -> VerifyReport:
    """Check size and sha256 of each file of an export, and that no file is missing or too many.

    Args:
        out: The folder of the export.
        expected: What it should be an export of: ``dataset``, ``format``, ``where``, ``pairs_per_shard``, ``snapshot``,
            ``images``, ``kinds``, ``boxes``, or some of them.
        progress: Told how it goes.

    Raises:
        ConfigError: `out` is no address of a folder.
        StoreError: the folder cannot be reached.
    """
    folder = Folder(out)
    sizes = folder.sizes()
    raw = folder.read_json(MANIFEST) if MANIFEST in sizes else None
    manifest = Manifest.from_json(raw)
    if manifest is None:
        problem = Problem(MANIFEST, Wrong.MANIFEST, _why_no_manifest(folder, sizes, raw))
        return VerifyReport(folder.url, None, None, None, 0, 0, (problem,))
    parts = manifest.parts
    if progress:
        progress.start("verify", manifest.pairs)
    pictures = _Pictures()
    problems = [*_unexpected(manifest, expected or {}), *_checked(folder, sizes, manifest, pictures, progress)]
    if has_image_files(manifest.export):
        problems += [Problem(name, Wrong.SURPLUS, _why_surplus(name)) for name in pictures.surplus(folder, manifest)]
    if progress:
        progress.finish()
    listed = {part.name for part in parts} | {MANIFEST}
    listed |= {images.IMAGES} if has_image_files(manifest.export) else set()
    problems += [Problem(name, Wrong.SURPLUS, _why_surplus(name)) for name in sizes if name not in listed]
    return VerifyReport(
        folder.url,
        manifest.export["format"],
        manifest.snapshot,
        manifest.pairs,
        len(parts) + pictures.files,
        sum(part.bytes for part in parts) + pictures.bytes,
        tuple(problems),
    )


def _checked(
    folder: Folder, sizes: Mapping[str, int], manifest: Manifest, pictures: _Pictures, progress: Reporter | None
) -> Iterator[Problem]:
    for entry in manifest.files:
        for part in entry.parts:
            wrong = list(_check(folder, sizes, part))
            yield from wrong
            if images.is_list(part.name) and not wrong:
                yield from pictures.check(folder, entry)
        if progress:
            progress.advance(entry.samples, {})
    for part in manifest.side:
        yield from _check(folder, sizes, part)


class _Pictures:
    """The image files of an export, by the lists of its groups."""

    def __init__(self) -> None:
        self.files = 0
        self.bytes = 0
        self._listed: dict[int, set[str]] = {}

    def check(self, folder: Folder, entry: FileEntry) -> Iterator[Problem]:
        """What is wrong with those of a group, whose list is as it was written."""
        inside = images.folder_name(entry.number)
        listed = images.read_list(folder, entry.number)
        self._listed[entry.number] = {image.name for image in listed}
        self.files += len(listed)
        self.bytes += sum(image.bytes for image in listed)
        sizes = {f"{inside}/{name}": size for name, size in folder.sizes(inside).items()}
        for image in listed:
            yield from _check(folder, sizes, Written(f"{inside}/{image.name}", image.bytes, image.sha256))

    def surplus(self, folder: Folder, manifest: Manifest) -> Iterator[str]:
        """What stands among images and is none of them. Of groups whose list is damaged nothing is known."""
        yield from images.foreign(folder)
        unknown = {entry.number for entry in manifest.files if entry.lists_images} - self._listed.keys()
        for number in images.groups(folder):
            if number not in unknown:
                inside, listed = images.folder_name(number), self._listed.get(number, set())
                yield from (f"{inside}/{name}" for name in images.names(folder, number) if name not in listed)


def _check(folder: Folder, sizes: Mapping[str, int], part: Written) -> Iterator[Problem]:
    size = sizes.get(part.name)
    if size is None:
        yield Problem(part.name, Wrong.MISSING, "it is not there")
    elif size != part.bytes:
        yield Problem(part.name, Wrong.SIZE, f"it has {size:,} bytes instead of {part.bytes:,}")
    else:
        try:
            there = folder.look(part.name)
        except OSError as error:
            yield Problem(part.name, Wrong.UNREADABLE, f"it cannot be read: {error}")
        else:
            if there.sha256 != part.sha256:
                yield Problem(part.name, Wrong.SHA256, "its bytes are others than were written")


def _unexpected(manifest: Manifest, expected: Mapping[str, Any]) -> Iterator[Problem]:
    there = {**flat(manifest.export), "snapshot": manifest.snapshot}
    for name, value in expected.items():
        found = there.get(name)
        same = sorted(found) == sorted(value) if isinstance(found, list) and isinstance(value, list) else found == value
        if not same:
            yield Problem(MANIFEST, Wrong.OTHER, f"{name} is {there.get(name)!r} instead of {value!r}")


def _why_no_manifest(folder: Folder, sizes: Mapping[str, int], raw: Any) -> str:
    if MANIFEST in sizes:
        export = raw.get("export") if isinstance(raw, dict) else None
        layout = export.get("layout") if isinstance(export, dict) else None
        if isinstance(layout, int) and layout != LAYOUT:
            return f"it is that of layout {layout}, and this pairmill writes and verifies layout {LAYOUT}; export anew"
        return "it is damaged, so nothing is known of the files; export anew into another folder"
    if PREVIOUS in sizes:
        return "there is none, because an update is going on or was interrupted; run the same export again"
    if TAKEDOWN in sizes:
        return "there is none, because a takedown is going on or was interrupted; run the same takedown again"
    if BEGUN in sizes:
        return "there is none, because the export is going on or was interrupted; run the same export again"
    return "there is none, so this is no export" if folder.exists() else "there is no such folder"


def _why_surplus(name: str) -> str:
    if name in STATES or is_temporary(name):
        return "an interrupted process left it; run the same export again, which takes it away"
    return "the manifest does not list it"
