"""What all formats share: walk over the groups, write what is not there, write the manifest last."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pairmill.errors import ConfigError, StoreError
from pairmill.export import images
from pairmill.export.folder import Folder, Written
from pairmill.export.format import Format, Options
from pairmill.export.formats import FORMATS
from pairmill.export.manifest import (
    LAYOUT,
    SIZES,
    FileEntry,
    Manifest,
    begin_changes,
    find_export,
    finish_changes,
    statistics,
    statistics_name,
    write_whole_files,
)
from pairmill.export.registry import known_exports, register
from pairmill.export.selection import Group, Selection, steady
from pairmill.export.tar import Damaged
from pairmill.report.text import without_secrets
from pairmill.store import Snapshot
from schemas.exports import ExportEvent

if TYPE_CHECKING:
    from pairmill.report.progress import Reporter


@dataclass(frozen=True)
class ExportReport:
    """What an export holds."""

    out: str
    format: str
    snapshot: int
    where: str | None
    samples: int
    files: tuple[str, ...]
    """Names of the main files, in order."""
    whole: tuple[str, ...]
    """Names of the files that hold what all main files hold together, in the form that trainers read."""
    bytes: int
    """Size of the main files."""
    written: int
    """Main files written by this run; the others were there already."""
    previous: int | None
    """The snapshot that the export held before; null for a first export."""
    new: tuple[str, ...]
    """Main files that the previous export did not have."""
    changed: tuple[str, ...]
    removed: tuple[str, ...]
    unchanged: int
    registered: bool
    """Whether the dataset knows of this export. A takedown does not reach one that it does not know of."""
    note: str
    """One line to tell."""


def export(
    snapshot: Snapshot,
    out: str,
    format: str,  # noqa: A002 - as the command calls it
    *,
    where: str | None = None,
    pairs_per_shard: int = 10_000,
    options: Options | None = None,
    progress: Reporter | None = None,
) -> ExportReport:
    """Export the kept pairs of a snapshot, or bring an export that is there to this snapshot.

    Args:
        snapshot: What to export.
        out: A folder, local or any fsspec URL: a new or empty one, or one that holds an export of this dataset in the
            same format, with the same condition, `pairs_per_shard` and options, finished or not, of whatever snapshot.
            Of such a one only files whose content changed are written.
        format: A name of `pairmill.export.formats.FORMATS`.
        where: An SQL condition over the view ``pairs``, such as ``clip_score >= 0.3``. Only kept pairs are exported,
            whatever it says.
        pairs_per_shard: Admitted pairs a group at most; its files hold those of them that are kept.
        options: What else can be chosen; the format's defaults hold for what is not given.
        progress: Told how it goes.

    Raises:
        ConfigError: there is no such format or it does not take an option, `out` holds something else, `where` is
            wrong, or the snapshot does not hold what the format needs.
        DatasetLocked: another process is writing in `out`.
        StoreError: a stored file cannot be read, or a file cannot be written.
    """
    if format not in FORMATS:
        raise ConfigError(f"format: there is no {format!r}; choose from {', '.join(FORMATS)}")
    kind = FORMATS[format]
    chosen = kind.chosen(options or Options())
    stated = chosen.stated()
    identity = {
        "dataset": without_secrets(snapshot.dataset.url),
        "format": format,
        "where": where,
        "pairs_per_shard": pairs_per_shard,
        "layout": LAYOUT,
        **({"options": stated} if stated else {}),
    }
    record = snapshot.record
    digest = hashlib.sha256(json.dumps(record.to_row(), sort_keys=True).encode()).hexdigest()
    folder = Folder(out)
    with (
        snapshot.dataset.reading(),
        # Opened anew: what a takedown did since the caller opened it counts.
        Selection(
            Snapshot(snapshot.dataset, record), where, pairs_per_shard, kinds=chosen.kinds or (), columns=kind.columns
        ) as selection,
        folder.hold(),
    ):
        registry = _Registry(snapshot, folder, identity, progress)
        there = find_export(folder, identity)
        done = there.manifest
        if done and (done.snapshot, done.digest) == (record.id, digest) and there.has_all_of(done, folder):
            finish_changes(folder, done)  # a killed process may have left something
            return _report(folder, done, 0, registry.finished(done.pairs, anew=False))
        registry.begun(selection.pairs)
        begin_changes(folder, identity, there)
        before = there.known or Manifest(identity, record.id, digest, 0)
        old = {entry.number: entry for entry in before.files}
        if progress:
            progress.start(f"export {format}", selection.pairs)
        entries, written = [], 0
        for group in selection.groups_behind(before.boundaries()):
            metadata = steady(selection.metadata(group))
            content = selection.content(metadata)
            parts = _finished(folder, there.sizes, group.number, content, old.get(group.number))
            if parts is None:
                folder.remove(statistics_name(group.number))  # it never stands beside files that it does not mean
                parts = kind.write(selection, group, metadata, folder, chosen)
                parts.append(
                    folder.write_json(statistics_name(group.number), statistics(metadata.num_rows, content, parts))
                )
                written += 1
            entries.append(_entry(group, metadata.num_rows, content, parts, old.get(group.number), record.id))
            if progress:
                progress.advance(metadata.num_rows, {})
        side = _whole_files(folder, kind, entries, before)
        whole = Manifest(identity, record.id, digest, selection.pairs, files=tuple(entries), side=side)
        manifest = _compared(whole, there.known)
        finish_changes(folder, manifest)
        if progress:
            progress.finish()
        return _report(folder, manifest, written, registry.finished(manifest.pairs))


def export_webdataset(
    snapshot: Snapshot,
    out: str,
    *,
    where: str | None = None,
    pairs_per_shard: int = 10_000,
    progress: Reporter | None = None,
) -> ExportReport:
    """`export` as WebDataset."""
    return export(snapshot, out, "webdataset", where=where, pairs_per_shard=pairs_per_shard, progress=progress)


def export_parquet(
    snapshot: Snapshot,
    out: str,
    *,
    where: str | None = None,
    pairs_per_shard: int = 10_000,
    progress: Reporter | None = None,
) -> ExportReport:
    """`export` as Parquet."""
    return export(snapshot, out, "parquet", where=where, pairs_per_shard=pairs_per_shard, progress=progress)


def _finished(
    folder: Folder, sizes: dict[str, int], number: int, content: str, before: FileEntry | None
) -> list[Written] | None:
    """The files of a group, if they are there, whole, with this content.

    Files of the export that was there before are known by their size; what an interrupted run wrote is read.
    """
    name = statistics_name(number)
    data = folder.read(name) if name in sizes else None
    try:
        found = json.loads(data or b"{}")
        if found["content"] != content:
            return None
        parts = [Written(**part) for part in found["files"]]
    except (KeyError, TypeError, ValueError):
        return None
    assert data is not None
    parts_and_record = [*parts, Written(name, len(data), hashlib.sha256(data).hexdigest())]
    trusted = before is not None and before.content == content and before.parts == parts_and_record
    whole = all(sizes.get(p.name) == p.bytes and (trusted or folder.look(p.name) == p) for p in parts)
    listed = any(images.is_list(p.name) for p in parts)
    if whole and listed:
        whole = images.whole(folder, number, read=not trusted)
    return parts_and_record if whole else None


def _whole_files(folder: Folder, kind: Format, entries: list[FileEntry], before: Manifest) -> tuple[Written, ...]:
    """The files of the whole export; they are left alone where they are there and nothing that they hold changed."""
    same = [(e.name, e.content, e.sha256, e.samples) for e in entries] == [
        (e.name, e.content, e.sha256, e.samples) for e in before.files
    ]
    try:
        if same and before.side and all(folder.look(part.name) == part for part in before.side):
            return before.side
    except FileNotFoundError:
        pass
    try:
        return write_whole_files(folder, kind, entries)
    except (Damaged, FileNotFoundError) as error:
        raise StoreError(
            f"a file of {folder.url} is damaged: {error}; `pairmill export --verify --out {folder.url}` says which "
            "one; remove it and export again"
        ) from error


def _entry(
    group: Group, samples: int, content: str, parts: list[Written], before: FileEntry | None, snapshot: int
) -> FileEntry:
    main, *side = parts
    same = before is not None and (before.content, before.sha256) == (content, main.sha256)
    since = before.since if before is not None and same else snapshot
    return FileEntry(
        main.name,
        main.bytes,
        main.sha256,
        samples,
        (group.first, group.last),
        group.digits,
        content,
        since,
        side=tuple(side),
    )


def _compared(now: Manifest, before: Manifest | None) -> Manifest:
    """The manifest with what it says of the one before."""
    old = {entry.name: (entry.content, entry.sha256) for entry in before.files} if before else {}
    new = tuple(e.name for e in now.files if e.name not in old)
    changed = tuple(e.name for e in now.files if e.name in old and old[e.name] != (e.content, e.sha256))
    removed = tuple(sorted(old.keys() - {e.name for e in now.files}))
    unchanged = len(now.files) - len(new) - len(changed)
    if before and (before.snapshot, before.digest) == (now.snapshot, now.digest) and not (new or changed or removed):
        # Lost files were written again, the same as before.
        return replace(
            now,
            previous=before.previous,
            new=before.new,
            changed=before.changed,
            removed=before.removed,
            unchanged=before.unchanged,
        )
    previous = before.snapshot if before else None
    return replace(now, previous=previous, new=new, changed=changed, removed=removed, unchanged=unchanged)


class _Registry:
    """Enters an export in its dataset's list, or says that this cannot be done."""

    def __init__(
        self, snapshot: Snapshot, folder: Folder, identity: Mapping[str, Any], progress: Reporter | None
    ) -> None:
        self._dataset = snapshot.dataset
        self._out = folder.url
        self._what = {name: identity[name] for name in ("format", "where", "pairs_per_shard")}
        self._what["snapshot"] = snapshot.record.id
        self._progress = progress
        self._told = False

    def begun(self, pairs: int) -> bool:
        """Before the first byte is written."""
        return self._enter(ExportEvent.BEGUN, pairs)

    def finished(self, pairs: int, *, anew: bool = True) -> bool:
        """When it is whole; not `anew`: if that was entered before, nothing is entered."""
        try:
            known = () if anew else known_exports(self._dataset)
        except StoreError:
            known = ()
        out, snapshot = without_secrets(self._out), self._what["snapshot"]
        if any((k.out, k.snapshot) == (out, snapshot) and k.event is not ExportEvent.BEGUN for k in known):
            return True
        return self._enter(ExportEvent.FINISHED, pairs)

    def _enter(self, event: ExportEvent, pairs: int) -> bool:
        try:
            register(self._dataset, self._out, event, pairs=pairs, **self._what)
        except StoreError as error:
            if self._progress and not self._told:
                self._progress.note(
                    f"warning: takedowns will not reach this export, because its dataset cannot be written "
                    f"and so does not know of it ({error})"
                )
            self._told = True
        return not self._told


def _report(folder: Folder, manifest: Manifest, written: int, registered: bool) -> ExportReport:
    files = manifest.files
    samples = sum(file.samples for file in files)
    total = f"{samples} pairs in {len(files)} files"
    if written and manifest.previous is not None:
        parts = {"new": len(manifest.new), "changed": len(manifest.changed), "removed": len(manifest.removed)}
        told = ", ".join(f"{count} {name}" for name, count in parts.items() if count) or "none changed"
        note = f"{total}: {told}, {manifest.unchanged} as in snapshot {manifest.previous} ({written} written)"
    elif written:
        kept = f", {len(files) - written} were there already" if written < len(files) else ""
        note = f"{total} ({written} written{kept})"
    else:
        note = f"{folder.url} holds this export already: {total}"
    return ExportReport(
        out=folder.url,
        format=manifest.export["format"],
        snapshot=manifest.snapshot,
        where=manifest.export["where"],
        samples=samples,
        files=tuple(file.name for file in files),
        whole=tuple(part.name for part in manifest.side if part.name != SIZES),
        bytes=sum(file.bytes for file in files),
        written=written,
        previous=manifest.previous,
        new=manifest.new,
        changed=manifest.changed,
        removed=manifest.removed,
        unchanged=manifest.unchanged,
        registered=registered,
        note=note,
    )
