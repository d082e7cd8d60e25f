"""Taking pairs out of exports, physically: their samples are gone from every file, and the manifest stays true.

A finished export is mended: files that hold such a pair are written anew without it, under the keys that the other
samples have, its image file is removed, and files of the whole export are made again. While that goes on the manifest
has the name `TAKEDOWN` and names the files concerned; killed, the same takedown goes on from it. Of an unfinished
export the files concerned are removed, and all files of the whole export: when the export goes on it writes them again,
from a dataset that no longer has the pair.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pairmill import storage
from pairmill.errors import DatasetLocked, PairmillError
from pairmill.export import images, jsonl, metadata, tar
from pairmill.export.folder import TEMPORARY, Folder, Written
from pairmill.export.manifest import (
    BEGUN,
    MANIFEST,
    PREVIOUS,
    STATES,
    TAKEDOWN,
    WHOLE_FILES,
    FileEntry,
    Manifest,
    finish_changes,
    has_image_files,
    is_temporary,
    number_of,
    read_manifest,
    statistics,
    statistics_name,
    write_whole_files,
)
from pairmill.export.registry import known_exports, register
from pairmill.export.tar import Damaged
from pairmill.report.text import without_secrets
from pairmill.store import parquet_options
from schemas import fields
from schemas.exports import ExportEvent

if TYPE_CHECKING:
    from pairmill.store import Dataset

_CHUNK = 2**22
_UID = re.compile(rb"(?=([0-9a-f]{64}))")
_UID_LENGTH = 64


class Reach(str, Enum):  # enum.StrEnum needs Python 3.11
    """What a takedown found at an export's address."""

    EXPORT = "export"
    """An export, finished or not."""
    GONE = "gone"
    """Nothing: deleted, moved, or not mounted here."""
    UNREACHABLE = "unreachable"
    """It cannot be read or written; the note says why."""
    NO_EXPORT = "no export"
    """A folder that is no export."""
    OTHER_DATASET = "other dataset"
    """An export of another dataset, which was left alone."""
    BUSY = "busy"
    """Another process is writing in it."""

    __str__ = str.__str__


@dataclass(frozen=True)
class Removal:
    """What was removed from an export or, in a dry run, would be."""

    out: str
    reach: Reach
    uids: tuple[str, ...] = ()
    """Pairs that were found in it."""
    samples: int = 0
    """Samples that were removed from its files."""
    rewritten: tuple[str, ...] = ()
    """Main files (tars, annotations, Parquet files with images) that were written anew without them."""
    deleted: tuple[str, ...] = ()
    """Files, and folders of images, that were removed whole: temporary ones, those of an unfinished export that held
    such a pair, and damaged ones beside which such a pair was found. The next export writes them anew."""
    left: tuple[str, ...] = ()
    """Files that may hold such a pair still: damaged ones, and ones that are not the export's and do hold one."""
    note: str = ""
    """One line to tell."""

    @property
    def complete(self) -> bool:
        """Whether nothing of the pairs is left there, as far as this can be known."""
        return self.reach is Reach.GONE or (self.reach in (Reach.EXPORT, Reach.NO_EXPORT) and not self.left)


@dataclass(frozen=True)
class Held:
    """Which pairs are present in an export's folder."""

    out: str
    reach: Reach
    files: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """For each pair that is there, by uid, the files that hold it."""
    unread: tuple[str, ...] = ()
    """Files that cannot be read whole, so they may hold any pair: damaged and unfinished ones."""
    note: str = ""
    """One line to tell."""


def remove_pairs(out: str, uids: Collection[str], *, dataset: str | None = None, dry_run: bool = False) -> Removal:
    """Remove the samples of some pairs from the folder of an export. It can be done again, and goes on after a kill.

    Args:
        out: The folder, local or any fsspec URL.
        uids: The pairs.
        dataset: URL of their dataset; an export of another one is left alone.
        dry_run: Change nothing, and say what would be done.

    Errors are no exceptions here: the result says what could be reached, so that other exports get their turn.
    """
    wanted = frozenset(uids)
    try:
        folder = Folder(out)
        if not folder.exists():
            return Removal(folder.url, Reach.GONE, note=_gone(folder))
        if dry_run:
            return _Takedown(folder, wanted, dataset).plan()
        with folder.hold():
            return _Takedown(folder, wanted, dataset).carry_out()
    except DatasetLocked as error:
        return Removal(without_secrets(out), Reach.BUSY, note=str(error))
    except Exception as error:  # noqa: BLE001 (whatever a file system of fsspec raises)
        return Removal(without_secrets(out), Reach.UNREACHABLE, note=_unreachable(out, error))


def holds_pairs(out: str, uids: Collection[str]) -> Held:
    """Which of some pairs are present in the folder of an export. Every file in it is read, whatever its name."""
    wanted = frozenset(uids)
    try:
        folder = Folder(out)
        if not folder.exists():
            return Held(folder.url, Reach.GONE, note=_gone(folder))
        names = _all_names(folder, folder.sizes())
        found, unread = _search(folder, names, wanted)
    except Exception as error:  # noqa: BLE001 (whatever a file system of fsspec raises)
        return Held(without_secrets(out), Reach.UNREACHABLE, note=_unreachable(out, error))
    files: dict[str, list[str]] = defaultdict(list)
    for name, here in found.items():
        for uid in here:
            files[uid].append(name)
    reach = Reach.EXPORT if any(state in names for state in STATES) else Reach.NO_EXPORT
    note = f"{folder.url} holds {len(files)} of {len(wanted)} pairs"
    note += f"; {len(unread)} files cannot be read whole: {', '.join(unread)}" if unread else ""
    return Held(folder.url, reach, {uid: tuple(files[uid]) for uid in sorted(files)}, tuple(unread), note)


def _gone(folder: Folder) -> str:
    return f"{folder.url} is not there: deleted, moved, or not mounted on this machine"


def _unreachable(out: str, error: Exception) -> str:
    if not isinstance(error, (OSError, PairmillError)) and "://" not in out:
        raise error  # of a local folder: a defect of ours
    said = without_secrets(storage.redact(str(error)))
    return f"{without_secrets(out)} cannot be reached: {type(error).__name__}: {said}"


class _Takedown:
    """One takedown in one folder."""

    def __init__(self, folder: Folder, uids: frozenset[str], dataset: str | None) -> None:
        self._folder = folder
        self._uids = uids
        self._sizes = folder.sizes()
        state = next((name for name in STATES if name in self._sizes), None)
        raw = folder.read_json(state) if state else None
        export = raw.get("export") if isinstance(raw, dict) else None
        if not isinstance(export, dict) or has_image_files(export):
            self._sizes = _all_names(folder, self._sizes)
        there = export.get("dataset") if isinstance(export, dict) else None
        self._other = there if dataset is not None and there not in (None, without_secrets(dataset)) else None
        self._finished = read_manifest(folder, state) if state in (MANIFEST, TAKEDOWN) else None
        """The manifest of a finished export."""
        if self._finished:
            self._finished.format  # noqa: B018 - one that is not known is left alone
        self._state = state
        self._found: dict[str, set[str]] = {}
        self._damaged: list[str] = []
        self._left: list[str] = []
        if self._other is None:
            self._found, unread = _search(folder, self._sizes, uids)
            self._damaged = [name for name in unread if number_of(name) is not None and not is_temporary(name)]
            gone = {*self._to_delete(), *self._whole_files()}
            foreign = [name for name in self._found if number_of(name) is None and not is_temporary(name)]
            self._left = sorted({*foreign, *unread} - gone)
        known = state is not None or any(number_of(name) is not None for name in self._found)
        self._reach = Reach.EXPORT if known else Reach.NO_EXPORT

    def plan(self) -> Removal:
        """What would be done."""
        if self._other is not None:
            return self._left_alone()
        numbers = self._numbers()
        rewritten: list[str] = []
        if self._finished:
            rewritten = [entry.name for entry in self._finished.files if entry.number in numbers]
        files = [_names_of(entry) for entry in self._finished.files] if self._finished else []
        samples = sum(len(set().union(*(self._found.get(name, set()) for name in group))) for group in files)
        return self._removal(samples, rewritten, self._to_delete())

    def carry_out(self) -> Removal:
        """Do it."""
        if self._other is not None:
            return self._left_alone()
        deleted = self._to_delete()
        samples, rewritten = 0, []
        numbers = self._numbers()
        whole = not self._whole_files().isdisjoint(self._found)
        if self._finished and (numbers or whole or MANIFEST not in self._sizes):
            manifest = self._mend(self._finished, numbers)
            samples = self._finished.pairs - manifest.pairs
            rewritten = [entry.name for entry in manifest.files if entry.number in numbers]
        elif not self._finished and PREVIOUS in self._sizes:
            previous = read_manifest(self._folder, PREVIOUS)
            touched = {number_of(name) for name in deleted}
            if previous and any(entry.number in touched and entry.content for entry in previous.files):
                marked = previous.without_content(n for n in touched if n is not None)
                self._folder.write_json(PREVIOUS, marked.to_json())
        if self._finished:  # what a process left that was killed when the manifest was written
            for name in {PREVIOUS, TAKEDOWN, BEGUN} & self._sizes.keys():
                self._folder.remove(name)
        records_first = sorted(deleted, key=lambda name: not name.endswith("_stats.json"))
        for name in records_first:  # so that none stands beside files it does not mean
            if not name.startswith(f"{images.IMAGES}/"):
                self._folder.remove(name)
            elif self._finished and any(name in _names_of(entry) for entry in self._finished.files):
                images.remove_unlisted(self._folder, _number(name))
            else:
                images.clear(self._folder, _number(name))
        self._folder.settle()
        return self._removal(samples, rewritten, deleted)

    def _numbers(self) -> set[int]:
        """Groups of a finished export whose files are to be written anew."""
        if not self._finished:
            return set()
        listed = {name: entry.number for entry in self._finished.files for name in _names_of(entry)}
        pending = () if MANIFEST in self._sizes else self._finished.pending
        return {listed[name] for name in self._found if name in listed} | set(pending)

    def _to_delete(self) -> list[str]:
        """Files to remove whole."""
        temporary = {name for name in self._sizes if is_temporary(name)}
        ours = {name: number for name in self._sizes.keys() - temporary if (number := number_of(name)) is not None}
        if self._finished:
            listed = {name for entry in self._finished.files for name in _names_of(entry)}
            concerned = self._numbers()
            names = {name for name in ours if name in self._found and name not in listed}
            names |= {name for name in self._damaged if ours[name] in concerned}  # cannot be mended
        else:
            # In a folder that says of itself that it is an export, images that nobody lists are the export's.
            damaged = [name for name in self._damaged if self._state or not name.startswith(f"{images.IMAGES}/")]
            numbers = {ours[name] for name in ours if name in self._found or name in damaged}
            names = {name for name, number in ours.items() if number in numbers}
            if names or self._state in (PREVIOUS, BEGUN):  # made of other parts than are there, perhaps
                names |= WHOLE_FILES & self._sizes.keys()
        return sorted(temporary | names)

    def _whole_files(self) -> set[str]:
        """Files of a finished export that are made of its parts."""
        return {part.name for part in self._finished.side} if self._finished else set()

    def _mend(self, manifest: Manifest, numbers: set[int]) -> Manifest:
        folder = self._folder
        if MANIFEST in self._sizes:
            for name in {PREVIOUS, BEGUN} & self._sizes.keys():  # of an export killed after it had finished
                folder.remove(name)
        folder.write_json(TAKEDOWN, replace(manifest, pending=tuple(sorted(numbers))).to_json())
        folder.settle()
        folder.remove(MANIFEST)
        folder.settle()
        for part in manifest.side:
            if part.name in WHOLE_FILES:
                folder.remove(part.name)
        files = tuple(self._mended(e) if e.number in numbers else e for e in manifest.files)
        changed = {e.name for e in files if e.number in numbers and e.name not in manifest.new} | {*manifest.changed}
        try:
            side = write_whole_files(folder, manifest.format, files)
        except (Damaged, FileNotFoundError):  # of other files; the manifest keeps what should be there
            side = manifest.side
        mended = replace(
            manifest,
            pairs=sum(e.samples for e in files),
            changed=tuple(e.name for e in files if e.name in changed),
            unchanged=len(files) - len(manifest.new) - len(changed),
            files=files,
            side=side,
            pending=(),
        )
        finish_changes(folder, mended)
        return mended

    def _mended(self, entry: FileEntry) -> FileEntry:
        folder, record = self._folder, statistics_name(entry.number)
        folder.remove(record)
        parts, samples = [], entry.samples
        counted: int | None = None
        for part in entry.parts:
            if part.name == record:
                continue
            try:
                part, left = _without(folder, part.name, self._uids)
            except (Damaged, FileNotFoundError):
                folder.remove(part.name)  # what cannot be mended goes; the manifest keeps what should be there
                if images.is_list(part.name):
                    images.clear(folder, entry.number)
                left = samples
            if part.name == entry.name:
                samples = left
            elif part.name.endswith(".parquet"):
                counted = left  # one row a pair, where there may be pairs without any record
            parts.append(part)
        samples = samples if counted is None else counted
        parts.append(folder.write_json(record, statistics(samples, None, parts)))
        main, *side = parts
        return replace(
            entry,
            bytes=main.bytes,
            sha256=main.sha256,
            samples=samples,
            content=None,
            taken_down=entry.taken_down + entry.samples - samples,
            side=tuple(side),
        )

    def _left_alone(self) -> Removal:
        note = f"{self._folder.url} holds an export of {self._other} now, which was left alone"
        return Removal(self._folder.url, Reach.OTHER_DATASET, note=note)

    def _removal(self, samples: int, rewritten: list[str], deleted: list[str]) -> Removal:
        uids = sorted(set().union(*self._found.values()))
        url = self._folder.url
        told = [f"{samples} samples removed, {len(rewritten)} files rewritten"] if rewritten else []
        told += [f"{len(deleted)} unfinished or damaged files deleted"] if deleted else []
        told += [f"these may still hold a pair: {', '.join(self._left)}"] if self._left else []
        empty = "holds none of the pairs" if self._reach is Reach.EXPORT else "is no export and holds none of the pairs"
        note = f"{url}: {'; '.join(told)}" if told else f"{url} {empty}"
        return Removal(
            url, self._reach, tuple(uids), samples, tuple(rewritten), tuple(deleted), tuple(self._left), note
        )


def remove_from_exports(dataset: Dataset, uids: Collection[str], *, dry_run: bool = False) -> list[Removal]:
    """`remove_pairs` in every export that a dataset knows of, which it enters in their list.

    Raises:
        StoreError: the list of exports cannot be read or written.
    """
    removals = []
    for known in known_exports(dataset):
        removal = remove_pairs(known.out, uids, dataset=dataset.url, dry_run=dry_run)
        if not dry_run and (removal.rewritten or removal.deleted):
            register(
                dataset,
                known.out,
                ExportEvent.TAKEN_DOWN,
                format=known.format,
                where=known.where,
                pairs_per_shard=known.pairs_per_shard,
                snapshot=known.snapshot,
                pairs=known.pairs - removal.samples,
            )
        removals.append(removal)
    return removals


# -- reading ----------------------------------------------------------------------------------------------------------


def _all_names(folder: Folder, sizes: dict[str, int]) -> dict[str, int]:
    """Names and sizes of everything in a folder, and inside its folder of images instead of that. The images of a group
    are one thing, with a size of 0."""
    if images.IMAGES not in sizes or not folder.is_folder(images.IMAGES):
        return sizes
    inside = [*map(images.folder_name, images.groups(folder)), *images.foreign(folder)]
    return {**{name: sizes[name] for name in sizes if name != images.IMAGES}, **dict.fromkeys(inside, 0)}


def _names_of(entry: FileEntry) -> list[str]:
    """What there is of a group, by the manifest."""
    folders = [images.folder_name(entry.number)] if entry.lists_images else []
    return [part.name for part in entry.parts] + folders


def _number(name: str) -> int:
    number = number_of(name)
    assert number is not None
    return number


def _search(folder: Folder, names: Collection[str], uids: frozenset[str]) -> tuple[dict[str, set[str]], list[str]]:
    """Which of the pairs each file holds, where it holds any; and the files that cannot be read whole."""
    found: dict[str, set[str]] = {}
    unread = []
    for name in names:
        here: set[str] = set()
        try:
            if folder.is_folder(name):
                here.update(uid for uid in _uids_of_images(folder, name) if uid in uids)
            else:
                with folder.open(name) as file:
                    for uid in _uids_in(name, file):
                        if uid in uids:
                            here.add(uid)
        except Damaged:
            unread.append(name)
            if not folder.is_folder(name):
                with folder.open(name) as file:
                    here.update(uid for uid in _hex_in(file) if uid in uids)
        except FileNotFoundError:
            continue  # an export that is going on has just renamed it
        if here:
            found[name] = here
    return found, unread


def _uids_of_images(folder: Folder, name: str) -> Iterator[str]:
    """The pairs of a folder of images.

    Raises:
        Damaged: it holds images that the list of its group does not know, or is another folder.
    """
    number = number_of(name)
    if number is None:
        raise Damaged("it is a folder")
    there = set(images.names(folder, number))
    try:
        listed = {image.name: image.uid for image in images.read_list(folder, number)}
    except FileNotFoundError as error:
        raise Damaged("there is no list of them") from error
    yield from (uid for image, uid in listed.items() if image in there)
    if there - listed.keys():
        raise Damaged("some are not in the list of them")


def _uids_in(name: str, file: Any) -> Iterator[str]:
    """The pairs of a file; of one that is not an export's, everything that looks like a uid.

    Raises:
        Damaged: it is not whole.
    """
    if name.endswith(TEMPORARY):
        raise Damaged("it was never finished")
    if name.endswith(".parquet"):
        yield from _uids_of_table(file)
    elif name.endswith(".tar") and number_of(name) is not None:
        yield from (sample.uid for sample in tar.samples(file))
    elif name.endswith(".jsonl") and number_of(name) is not None:
        yield from (uid for uid, _ in jsonl.lines(file))
    else:
        yield from _hex_in(file)


def _uids_of_table(file: Any) -> Iterator[str]:
    try:
        table = pq.ParquetFile(file)
        for number in range(table.num_row_groups):
            yield from table.read_row_group(number, columns=["uid"]).column("uid").to_pylist()
    except (pa.ArrowException, OSError, KeyError) as error:
        raise Damaged(f"it is no whole Parquet file with a column uid: {error}") from error


def _hex_in(file: Any) -> Iterator[str]:
    rest = b""
    while chunk := file.read(_CHUNK):
        data = rest + chunk
        for found in _UID.finditer(data):
            yield found[1].decode("ascii")
        rest = data[1 - _UID_LENGTH :]


# -- writing ----------------------------------------------------------------------------------------------------------


def _without(folder: Folder, name: str, uids: frozenset[str]) -> tuple[Written, int]:
    """Write a file of a group anew without some pairs; the file, and how many pairs it holds. One without them is left
    alone.

    Raises:
        Damaged: it is not whole.
        FileNotFoundError: it is not there.
    """
    if name.endswith(".tar"):
        return _without_samples(folder, name, uids)
    if images.is_list(name):
        return _without_images(folder, name, uids)
    return _without_lines(folder, name, uids) if name.endswith(".jsonl") else _without_rows(folder, name, uids)


def _without_images(folder: Folder, name: str, uids: frozenset[str]) -> tuple[Written, int]:
    """Remove the images of some pairs, and write the list of their group anew."""
    number = _number(name)
    listed = images.read_list(folder, number)
    left = [image for image in listed if image.uid not in uids]
    if len(left) == len(listed):
        return folder.look(name), len(listed)
    for image in listed:
        if image.uid in uids:
            folder.remove(f"{images.folder_name(number)}/{image.name}")
    if folder.is_folder(images.folder_name(number)):
        folder.settle(images.folder_name(number))
    return images.write_list(folder, number, left), len(left)


def _without_lines(folder: Folder, name: str, uids: frozenset[str]) -> tuple[Written, int]:
    """Write JSON Lines anew without the records of some pairs."""
    with folder.open(name) as file:
        there = dict.fromkeys(uid for uid, _ in jsonl.lines(file))
    left = len(there.keys() - uids)
    if left == len(there):
        return folder.look(name), left
    with folder.open(name) as file, folder.create(name) as sink:
        for uid, line in jsonl.lines(file):
            if uid not in uids:
                sink.write(line)
    return sink.written(name), left


def _without_samples(folder: Folder, name: str, uids: frozenset[str]) -> tuple[Written, int]:
    """Write a tar anew without some pairs; the file, and how many samples it holds. One without them is left alone."""
    with folder.open(name) as file:
        samples = list(tar.samples(file))
        gone = [sample for sample in samples if sample.uid in uids]
        if not gone:
            return folder.look(name), len(samples)
        with folder.create(name) as sink:
            place = 0
            for sample in gone:
                _copy(file, sink, place, sample.start)
                place = sample.end
            _copy(file, sink, place, samples[-1].end)
            tar.end(sink)
    return sink.written(name), len(samples) - len(gone)


def _copy(file: Any, sink: Any, start: int, end: int) -> None:
    file.seek(start)
    while start < end:
        data = file.read(min(2**20, end - start))
        if not data:
            raise Damaged(f"it breaks off at byte {start}")
        sink.write(data)
        start += len(data)


def _without_rows(folder: Folder, name: str, uids: frozenset[str]) -> tuple[Written, int]:
    """Write a Parquet file anew without some pairs, one row group at a time; the file, and how many rows it holds."""
    values = pa.array(sorted(uids), pa.string())
    with folder.open(name) as file:
        if uids.isdisjoint(_uids_of_table(file)):
            return folder.look(name), pq.ParquetFile(file).metadata.num_rows
        table = pq.ParquetFile(file)
        schema = table.schema_arrow
        holds_images = fields.IMAGE.name in schema.names
        options = parquet_options(schema) if holds_images else {"compression": metadata.COMPRESSION}
        rows = 0
        with folder.create(name) as sink, pq.ParquetWriter(sink, schema, **options) as writer:
            for number in range(table.num_row_groups):
                group = table.read_row_group(number)
                kept = group.filter(pc.invert(pc.is_in(group.column("uid"), value_set=values)))
                if kept.num_rows:
                    writer.write_table(kept, row_group_size=kept.num_rows)
                rows += kept.num_rows
    return sink.written(name), rows
