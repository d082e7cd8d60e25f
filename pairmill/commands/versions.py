"""The verbs about snapshots: status, snapshots, diff, rollback, vacuum."""

from __future__ import annotations

import sys
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pairmill.commands.common import AsJson, DatasetUrl, SnapshotId, Wait, print_json, shown

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from pairmill.versions import DiffReport, RollbackReport, VacuumReport
    from schemas.snapshot import SnapshotRecord

DryRun = Annotated[bool, typer.Option("--dry-run", help="say what would be done, and change nothing")]
SNAPSHOT = typer.Argument(metavar="N", help="a snapshot by its number", show_default=False)


class DiffFormat(str, Enum):
    """How `pairmill diff` prints."""

    TABLE = "table"
    JSON = "json"
    CSV = "csv"


class DiffBy(str, Enum):
    """How `pairmill diff` groups the pairs that changed."""

    REASON = "reason"
    SOURCE = "source"
    SHARD = "shard"


def status(dataset: DatasetUrl, snapshot: SnapshotId = None, as_json: AsJson = False) -> None:
    """Show a snapshot: its counts and its funnel, what it changed, its size, how long stages took, which models.

    \b
    Examples:
      pairmill status out/my-dataset
      pairmill status s3://bucket/my-dataset --snapshot 3 --json
    """
    from pairmill.query import instruction_counts
    from pairmill.store import Dataset

    opened = Dataset(dataset)
    shot = opened.snapshot(snapshot)
    record = shot.record
    counts = instruction_counts(shot)
    if as_json:
        print_json({**record_json(record), **({"instructions": counts} if counts else {})})
        return
    print_snapshot(dataset, record)
    print_instructions(counts)
    _print_making(record, next((r for r in reversed(opened.snapshots()) if r.id < record.id), None))


def snapshots(dataset: DatasetUrl, as_json: AsJson = False) -> None:
    """List the snapshots of a dataset, oldest first. Old ones stay readable: --snapshot N.

    \b
    Examples:
      pairmill snapshots out/my-dataset
      pairmill sql out/my-dataset --snapshot 1 "SELECT count(*) FROM pairs"
    """
    from pairmill.report.table import print_table
    from pairmill.store import Dataset
    from pairmill.versions import what_changed

    opened = Dataset(dataset)
    records = opened.snapshots() or [opened.snapshot().record]  # without any, snapshot() says what is wrong
    if as_json:
        print_json([record_json(record) for record in records])
        return
    counts = ("admitted", "kept", "dropped", "deferred")
    header = ("id", "created at", "kind", "recipe", *counts, "size", "seconds", "what changed")
    rows = [
        [
            record.id,
            record.created_at,
            record.kind,
            record.recipe,
            *(getattr(record, name) for name in counts),
            size(sum(record.bytes.values())) if record.bytes else None,
            record.seconds,
            shown(what_changed(before, record)),
        ]
        for before, record in zip([None, *records], records, strict=False)
    ]
    print_table(header, rows, sys.stdout, right={"id", *counts, "size", "seconds"})


def diff(
    dataset: DatasetUrl,
    a: Annotated[int, SNAPSHOT],
    b: Annotated[int, SNAPSHOT],
    by: Annotated[DiffBy, typer.Option("--by", help="how the pairs that changed are grouped")] = DiffBy.REASON,
    listed: Annotated[
        int, typer.Option("--list", min=0, metavar="N", help="list so many pairs of each kind of change")
    ] = 0,
    output: Annotated[
        DiffFormat, typer.Option("--format", help="csv has the listed pairs, or else the counts")
    ] = DiffFormat.TABLE,
) -> None:
    """Compare two snapshots: pairs in and out, kept or not and why, images, captions, scores, config and models.

    \b
    Examples:
      pairmill diff out/my-dataset 1 2
      pairmill diff out/my-dataset 1 2 --by source --list 10
      pairmill diff out/my-dataset 1 2 --list 1000000 --format csv > changed.csv
    """
    from dataclasses import asdict

    from pairmill.store import Dataset
    from pairmill.versions import By
    from pairmill.versions import diff as compare

    opened = Dataset(dataset)
    report = compare(opened.snapshot(a), opened.snapshot(b), by=By(by.value), listed=listed)
    if output is DiffFormat.JSON:
        print_json(_clean(asdict(report)))
    elif output is DiffFormat.CSV:
        _print_diff_csv(report, listed > 0)
    else:
        _print_diff(shown(dataset), report)


def rollback(
    dataset: DatasetUrl,
    snapshot: Annotated[int, SNAPSHOT],
    dry_run: DryRun = False,
    wait: Wait = 0.0,
    as_json: AsJson = False,
) -> None:
    """Go back to an earlier snapshot, by publishing a new one that says the same. A run finishes one that was killed.

    What was taken down does not come back, and the snapshots in between stay readable. The config file is yours: the
    next `pairmill run` does what it says, so change it back, too.

    \b
    Examples:
      pairmill rollback out/my-dataset 3 --dry-run
      pairmill rollback out/my-dataset 3
    """
    from dataclasses import asdict

    from pairmill.report.progress import reporter_for
    from pairmill.store import Dataset
    from pairmill.versions import rollback as go_back

    with reporter_for(sys.stderr) as reporter:
        report = go_back(Dataset(dataset), snapshot, dry_run=dry_run, wait_s=wait, reporter=reporter)
    if as_json:
        print_json({**asdict(report), "snapshot": record_json(report.snapshot) if report.snapshot else None})
    else:
        _print_rollback(shown(dataset), report)


def vacuum(
    dataset: DatasetUrl,
    keep: Annotated[
        int | None, typer.Option("--keep", min=1, metavar="N", help="snapshots that stay: the N newest")
    ] = None,
    days: Annotated[
        float | None, typer.Option("--days", min=0, metavar="D", help="snapshots that stay: those younger than D days")
    ] = None,
    grace: Annotated[
        float,
        typer.Option(
            "--grace", min=0, metavar="HOURS", help="age from which on what an interrupted run left goes, too"
        ),
    ] = 24.0,
    dry_run: DryRun = False,
    wait: Wait = 0.0,
    as_json: AsJson = False,
) -> None:
    """Remove snapshots that have expired, and all files that nobody needs any more.

    Without --keep and --days the config of the last snapshot decides (its section `retention`: all stay by default).
    With both, a snapshot stays for either reason. The last one always stays.

    \b
    Examples:
      pairmill vacuum out/my-dataset --dry-run
      pairmill vacuum out/my-dataset --keep 5 --days 30
    """
    from dataclasses import asdict

    from pairmill.report.progress import reporter_for
    from pairmill.store import Dataset
    from pairmill.versions import vacuum as clean
    from schemas.config import Retention

    given = None if keep is None and days is None else Retention(snapshots=keep, days=days)
    with reporter_for(sys.stderr) as reporter:
        report = clean(Dataset(dataset), given, grace_hours=grace, dry_run=dry_run, wait_s=wait, reporter=reporter)
    if as_json:
        print_json(asdict(report))
    else:
        _print_vacuum(report, grace)


# -- what they print, and `run` with them -----------------------------------------------------------------------------


def record_json(record: SnapshotRecord) -> dict[str, Any]:
    """A snapshot's record for programs: whole, but for secrets in URLs."""
    from dataclasses import asdict

    from pairmill.report.funnel import check_funnel
    from pairmill.report.text import without_secrets

    check_funnel(record)
    return {**asdict(record), "config": without_secrets(record.config)}


def print_snapshot(dataset: str, record: SnapshotRecord) -> None:
    """Print a snapshot's counts and funnel."""
    from pairmill.report.funnel import print_funnel

    what = f"{record.kind}, {record.note}" if record.note else record.kind
    about = "" if what == "refresh" else f" ({what})"
    typer.echo(f"{shown(dataset)}: snapshot {record.id}{shown(about)} of {record.created_at}, recipe {record.recipe}\n")
    print_funnel(record, sys.stdout)
    if record.deferred:
        typer.echo(
            "Deferred pairs are tried again by later runs when their time has come (`retry:` in the config); all at "
            "once by `pairmill run CONFIG.yaml --retry-deferred`."
        )


def size(count: int) -> str:
    """Bytes for people: 999 B, 1.2 MB."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 999.5:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:,.4g} TB"


def print_instructions(counts: Mapping[str, Mapping[str, int]]) -> None:
    """One line a kind: how many conversations there are, and why there are not more."""
    for kind, outcomes in counts.items():
        asked, written = sum(outcomes.values()), outcomes.get("written", 0)
        why = ", ".join(f"{shown(reason)} {count:,}" for reason, count in outcomes.items() if reason != "written")
        typer.echo(f"{kind}: {written:,} of {asked:,} conversations written" + (f"; not: {why}" if why else ""))


def _print_making(record: SnapshotRecord, before: SnapshotRecord | None) -> None:
    from pairmill.report.table import print_table
    from pairmill.versions import what_changed

    typer.echo(f"\nchanged: {shown(what_changed(before, record))}")
    typer.echo(f"took {record.seconds:,.1f} s")
    stages = sorted({*record.computed, *record.stage_seconds})
    if stages:
        typer.echo("")
        rows = [(stage, record.computed.get(stage), record.stage_seconds.get(stage)) for stage in stages]
        print_table(("stage", "rows computed", "seconds"), rows, sys.stdout, right=("rows computed", "seconds"))
    if record.bytes:
        typer.echo("")
        sizes = [(table, size(count)) for table, count in sorted(record.bytes.items(), key=lambda item: -item[1])]
        print_table(
            ("table", "size"), [*sizes, ("together", size(sum(record.bytes.values())))], sys.stdout, right=("size",)
        )
    if record.models:
        typer.echo("")
        print_table(("model", "revision"), [(k, shown(v)) for k, v in sorted(record.models.items())], sys.stdout)


def _print_rollback(dataset: str, report: RollbackReport) -> None:
    from pairmill.report.table import print_table

    if report.changes:
        header = ("table", "files back", "rows back", "files out", "rows out")
        rows = [
            (c.table + ("" if c.named else " (not in the snapshot)"), c.files_in, c.rows_in, c.files_out, c.rows_out)
            for c in report.changes
        ]
        print_table(header, rows, sys.stdout, right=header[1:])
        typer.echo("")
    counts = f"{report.kept:,} of {report.admitted:,} pairs kept"
    if report.dry_run:
        typer.echo(f"{dataset} would be as in snapshot {report.to}: {counts}. Nothing was changed.")
    elif report.snapshot is None:
        typer.echo(f"{dataset} is as in snapshot {report.to} already: {counts}.")
    else:
        typer.echo(f"published snapshot {report.snapshot.id}, {report.snapshot.note}: {counts}")


def _print_vacuum(report: VacuumReport, grace: float) -> None:
    from pairmill.report.table import print_table

    if report.removed:
        rows: list[tuple[object, ...]] = [(r.table or ".", r.why, r.files, size(r.bytes)) for r in report.removed]
        rows.append(("together", None, report.files, size(report.bytes)))
        print_table(("table", "why", "files", "size"), rows, sys.stdout, right=("files", "size"))
        typer.echo("")
    would = "would be" if report.dry_run else "were"
    expired = ", ".join(str(number) for number in report.expired) or "none"
    typer.echo(
        f"{report.files:,} files ({size(report.bytes)}) {would} removed; snapshots that {would} removed: {expired}"
    )
    if report.waiting_files:
        typer.echo(
            f"{report.waiting_files:,} files ({size(report.waiting_bytes)}) that nobody names are younger than "
            f"{grace:g} hours and stay: an interrupted run may go on with them (--grace 0 removes them, too)."
        )


def _print_diff(dataset: str, report: DiffReport) -> None:
    from pairmill.report.table import print_table

    typer.echo(f"{dataset}: snapshot {report.a} -> snapshot {report.b}\n")
    print_table(
        ("", "pairs", "kept"),
        [
            (f"snapshot {report.a}", report.pairs_a, report.kept_a),
            ("in", report.pairs_in, report.kept_in),
            ("out", report.pairs_out, report.kept_out),
            ("newly kept", None, report.newly_kept),
            ("no longer kept", None, report.no_longer_kept),
            (f"snapshot {report.b}", report.pairs_b, report.kept_b),
        ],
        sys.stdout,
        right=("pairs", "kept"),
    )
    for title, header, rows in _sections(report):
        if rows:
            typer.echo(f"\n{title}")
            print_table(header, rows, sys.stdout, right={*_NUMBERS} & set(header))
    if not any(rows for _, _, rows in _sections(report)):
        typer.echo("\nNothing differs.")


_NUMBERS = ("in", "out", "newly kept", "no longer kept", "pairs", "changed", "gained", "lost", "mean change", "rows")


def _sections(report: DiffReport) -> Iterator[tuple[str, tuple[str, ...], list[tuple[Any, ...]]]]:
    by = report.by.value
    none = "(kept)" if by == "reason" else None
    groups = [(g.key or none, g.pairs_in, g.pairs_out, g.newly_kept, g.no_longer_kept) for g in report.groups]
    yield f"Pairs that changed, by {by}:", (by, "in", "out", "newly kept", "no longer kept"), groups
    reasons = [(r.a or "(kept)", r.b or "(kept)", r.pairs) for r in report.reasons]
    yield "Reasons of pairs in both:", (f"in {report.a}", f"in {report.b}", "pairs"), reasons
    values = [v for v in (report.image, report.caption, *report.scores) if v.changed or v.gained or v.lost]
    measured = [(v.column, v.changed, v.gained, v.lost, v.mean_change) for v in values]
    yield "Values of pairs in both:", ("value", "changed", "gained", "lost", "mean change"), measured
    stages = [(s.stage, s.a, s.b) for s in report.stages]
    yield "Stages of another version:", ("stage", f"table in {report.a}", f"table in {report.b}"), stages
    yield "Computed in between:", ("stage", "rows"), list(report.computed.items())
    for title, changes in (("Config:", report.config), ("Models:", report.models), ("Software:", report.software)):
        keys = [(k.key, shown(str(k.a)) if k.a is not None else None, _text(k.b)) for k in changes]
        yield title, ("key", f"in {report.a}", f"in {report.b}"), keys
    header = ("change", "uid", "url", "shard", "reason_a", "reason_b")
    listed = [tuple(_text(row[name]) for name in header) for row in report.listed]
    yield "Pairs:", header, listed


def _print_diff_csv(report: DiffReport, listed: bool) -> None:
    import pyarrow as pa

    from pairmill.report.rows import print_csv

    if listed:
        names = ("change", "uid", "url", "shard", "reason_a", "reason_b")
        print_csv(pa.table({n: pa.array([row[n] for row in report.listed]) for n in names}), sys.stdout)
        return
    rows: list[tuple[Any, ...]] = []
    for name in ("pairs_in", "pairs_out", "kept_in", "kept_out", "newly_kept", "no_longer_kept"):
        rows.append((name, None, None, None, getattr(report, name), None))
    for group in report.groups:
        for name in ("pairs_in", "pairs_out", "newly_kept", "no_longer_kept"):
            rows.append((f"{name} by {report.by.value}", group.key, None, None, getattr(group, name), None))
    rows += [("reason", None, r.a, r.b, r.pairs, None) for r in report.reasons]
    for value in (report.image, report.caption, *report.scores):
        rows.append((value.column, "changed", None, None, value.changed, value.mean_change))
        rows += [(value.column, what, None, None, getattr(value, what), None) for what in ("gained", "lost")]
    for what, changes in (("config", report.config), ("model", report.models), ("software", report.software)):
        rows += [(what, c.key, _text(c.a), _text(c.b), None, None) for c in changes]
    rows += [("stage", s.stage, s.a, s.b, report.computed.get(s.stage), None) for s in report.stages]
    names = ("what", "key", "a", "b", "pairs", "mean_change")
    print_csv(
        pa.table({n: pa.array(column) for n, column in zip(names, zip(*rows, strict=True), strict=True)}), sys.stdout
    )


def _text(value: Any) -> str | None:
    return None if value is None else shown(str(value))


def _clean(value: Any) -> Any:
    """A value without secrets in the URLs of a config, for programs."""
    import math

    from pairmill.report.text import without_secrets

    if isinstance(value, dict):
        return {k: v if k == "url" else _clean(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_clean(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return without_secrets(value) if isinstance(value, str) else value
