"""What all formats share: walk over the groups, skip what is finished, write the manifest last."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from pairmill.export.folder import Folder, Written
from pairmill.export.selection import Group, Selection

if TYPE_CHECKING:
    from pairmill.report.progress import Reporter
    from pairmill.store import Snapshot

LAYOUT = 2
"""Raised when the same snapshot gives other files."""

WriteGroup = Callable[[Selection, Group, Folder], tuple[int, list[Written]]]
"""Writes the files of a group, the main one first; returns the number of samples and the files."""


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
    bytes: int
    """Size of the main files."""
    written: int
    """Main files written by this run; the others were there already."""
    note: str
    """One line to tell."""


def export(
    snapshot: Snapshot,
    out: str,
    kind: str,
    write_group: WriteGroup,
    where: str | None,
    pairs_per_shard: int,
    progress: Reporter | None,
    finish: Callable[[Folder, list[dict[str, Any]]], None] | None = None,
) -> ExportReport:
    """Write or complete an export; `finish` may add files before the manifest.

    Raises:
        ConfigError: `out` holds something else, or `where` is wrong.
        StoreError: a stored file cannot be read, or a file cannot be written.
    """
    identity = {
        "dataset": snapshot.dataset.url,
        "snapshot": snapshot.record.id,
        "digest": hashlib.sha256(json.dumps(snapshot.record.to_row(), sort_keys=True).encode()).hexdigest(),
        "format": kind,
        "where": where,
        "pairs_per_shard": pairs_per_shard,
        "layout": LAYOUT,
    }
    folder = Folder(out)
    with Selection(snapshot, where, pairs_per_shard) as selection:
        manifest = folder.begin(identity)
        if manifest is not None:
            return _report(folder, identity, manifest["files"], 0)
        if progress:
            progress.start(f"export {kind}", selection.pairs)
        files, written = [], 0
        for group in selection.groups:
            done = _finished(folder, group)
            if done is None:
                samples, parts = write_group(selection, group, folder)
                done = {"samples": samples, "files": [asdict(part) for part in parts]}
                folder.write_json(_record(group), _statistics(done))
                written += 1
            files.append({**done["files"][0], "samples": done["samples"]})
            if progress:
                progress.advance(done["samples"], {})
        if finish:
            finish(folder, files)
        folder.finish({"export": identity, "pairs": selection.pairs, "files": files})
        if progress:
            progress.finish()
    return _report(folder, identity, files, written)


def _record(group: Group) -> str:
    """The file that is written when a group is finished; named and built as img2dataset's statistics."""
    return f"{group.number:05d}_stats.json"


def _statistics(done: dict[str, Any]) -> dict[str, Any]:
    samples = done["samples"]
    return {
        "count": samples,
        "successes": samples,
        "failed_to_download": 0,
        "failed_to_resize": 0,
        "status_dict": {"success": samples} if samples else {},
        "files": done["files"],
    }


def _finished(folder: Folder, group: Group) -> dict[str, Any] | None:
    """What an earlier run recorded of a group, if its files are all there, whole."""
    found = folder.read_json(_record(group))
    if not found or not all(folder.holds(Written(**part)) for part in found["files"]):
        return None
    return {"samples": found["count"], "files": found["files"]}


def _report(folder: Folder, identity: dict[str, Any], files: list[dict[str, Any]], written: int) -> ExportReport:
    samples = sum(file["samples"] for file in files)
    if written:
        kept = f", {len(files) - written} were there already" if written < len(files) else ""
        note = f"{samples} pairs in {len(files)} files ({written} written{kept})"
    else:
        note = f"{folder.url} holds this export already: {samples} pairs in {len(files)} files"
    return ExportReport(
        folder.url,
        identity["format"],
        identity["snapshot"],
        identity["where"],
        samples,
        tuple(file["name"] for file in files),
        sum(file["bytes"] for file in files),
        written,
        note,
    )
