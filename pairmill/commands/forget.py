"""`pairmill forget`: take pairs down for good, or prove that they are gone."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pairmill.commands.common import AsJson, DatasetUrl, Wait, print_json, shown
from pairmill.errors import ConfigError

if TYPE_CHECKING:
    from pairmill.takedown import Absence, Selectors, TakedownReport

Values = list[str] | None

SHOWN_TRACES = 20


def forget(
    dataset: DatasetUrl,
    url: Annotated[Values, typer.Option("--url", metavar="URL", help="pairs with this URL; may be repeated")] = None,
    domain: Annotated[
        Values, typer.Option("--domain", metavar="NAME", help="pairs from this host and all hosts below it")
    ] = None,
    uid: Annotated[Values, typer.Option("--uid", metavar="HEX", help="the pair with this uid")] = None,
    sha256: Annotated[
        Values,
        typer.Option(
            "--sha256", metavar="HEX", help="pairs with this image: hash of the file as fetched, or of pixels"
        ),
    ] = None,
    file: Annotated[
        Values,
        typer.Option("--file", metavar="LIST", help="one item a line, plain or as kind,value; - reads stdin"),
    ] = None,
    near: Annotated[
        float | None,
        typer.Option("--near", metavar="COSINE", help="also pairs with the same image or one as near as this: 0.95"),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="remove nothing: read every file and say whether something is left")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would go, and change nothing")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="do not ask")] = False,
    wait: Wait = 60.0,
    as_json: AsJson = False,
) -> None:
    """Remove pairs for good: from every table, version and export. Nothing of them comes back.

    Without anything to forget, it finishes takedowns that were interrupted. docs/takedown.md says more.

    \b
    Examples:
      pairmill forget out/my-dataset --url https://example.com/a.jpg
      pairmill forget out/my-dataset --domain example.com --file list.txt --near 0.95 --dry-run
      pairmill forget out/my-dataset --check
    """
    from pairmill.report.progress import reporter_for
    from pairmill.store import Dataset
    from pairmill.takedown import Selectors, check_absence, preview, resume
    from pairmill.takedown import forget as take_down

    selectors = Selectors.of(urls=url or (), domains=domain or (), uids=uid or (), sha256=sha256 or (), near=near)
    for name in file or ():
        selectors += _listed(name)
    opened = Dataset(dataset)
    if check:
        if near is not None or dry_run:
            raise ConfigError("--check goes with selectors only; --near and --dry-run are for a removal")
        with reporter_for(sys.stderr) as reporter:
            absence = check_absence(opened, selectors, reporter)
        _tell_check(dataset, absence, as_json)
        return
    if not selectors and (near is not None or dry_run or file):
        raise ConfigError("there is nothing to forget; give --url, --domain, --uid, --sha256 or --file")
    with reporter_for(sys.stderr) as reporter:
        if not selectors:
            finished = resume(opened, reporter, wait)
            if finished is None:
                raise ConfigError(
                    "there is nothing to forget; give --url, --domain, --uid, --sha256 or --file. "
                    "No takedown is unfinished"
                )
            _tell(dataset, selectors, finished, as_json)
            return
        if dry_run or not yes:
            if not dry_run and not sys.stdin.isatty():
                raise ConfigError("without a terminal --yes is needed, since nobody can be asked; or try --dry-run")
            ahead = preview(opened, selectors, reporter)
            if dry_run:
                _tell(dataset, selectors, ahead, as_json)
                return
            reporter.finish()
            for line in _lines(dataset, selectors, ahead):
                typer.echo(shown(line), err=True)
            typer.confirm("Remove this for good?", abort=True, err=True)
        report = take_down(opened, selectors, reporter, wait)
    _tell(dataset, selectors, report, as_json)


def _listed(name: str) -> Selectors:
    """The selectors of a list file.

    Raises:
        ConfigError: it cannot be read, or a line of it is wrong.
    """
    from pairmill.takedown import read_list

    if name == "-":
        return read_list(sys.stdin.buffer, "stdin")
    try:
        with open(name, "rb") as lines:
            return read_list(lines, name)
    except OSError as error:
        raise ConfigError(f"--file {name}: {error.strerror or error}") from error


def _tell(dataset: str, selectors: Selectors, report: TakedownReport, as_json: bool) -> None:
    from dataclasses import asdict

    if as_json:
        print_json({"asked": selectors.asked, **asdict(report)})
    else:
        for line in _lines(dataset, selectors, report):
            typer.echo(shown(line))
    if report.waits_for:
        raise typer.Exit(1)


def _lines(dataset: str, selectors: Selectors, report: TakedownReport) -> list[str]:
    """What a takedown removed or would remove, for people."""
    ahead = not report.requests
    asked = ", ".join(f"{count} {kind}" for kind, count in selectors.asked.items())
    asked = f" by {asked}" if asked else ""
    by = f" ({', '.join(f'{kind} {count:,}' for kind, count in report.by.items())})" if report.by else ""
    first = f"{dataset}: {'would take down' if ahead else 'took down'} {report.pairs:,} pairs{by}{asked}"
    lines = [f"{first}; {report.kept:,} of them were kept, {report.images:,} have a stored image"]
    for name, table in report.tables.items():
        names = f", and {table.names:,} rows that name one" if table.names else ""
        lines.append(
            f"  {name}: {table.rows:,} rows{names}, in {table.files:,} files of {table.bytes:,} bytes; "
            f"{table.copies:,} are written anew without them"
        )
    if report.leftovers:
        lines.append(
            f"  {report.leftovers:,} files that were never finished, or that nobody can read and nothing needs"
        )
    for export in report.exports:
        held = "an unknown number" if export.held is None else f"{export.held:,}"
        what = f"  export {export.out} ({export.format}, snapshot {export.snapshot}, {export.at})"
        if export.has_left:
            lines.append(f"{what} has left: it was given {held} of the pairs. {export.note}")
        else:
            lines.append(f"{what}: {export.removed:,} samples in {export.rewritten:,} files. {export.note}")
    if report.snapshot is not None:
        lines.append(f"  published snapshot {report.snapshot}")
    lines += [f"not done yet: {why}; run `pairmill forget {dataset}` to finish" for why in report.waits_for]
    return lines


def _tell_check(dataset: str, absence: Absence, as_json: bool) -> None:
    from dataclasses import asdict

    if as_json:
        print_json({"absent": absence.absent, **asdict(absence)})
    else:
        for line in _check_lines(dataset, absence):
            typer.echo(shown(line))
    if not absence.absent:
        raise typer.Exit(1)


def _check_lines(dataset: str, absence: Absence) -> list[str]:
    looked = ", ".join(f"{count:,} {kind}" for kind, count in absence.checked.items())
    lines = [f"{trace.file}, {trace.where}: {_found(trace)}" for trace in absence.traces[:SHOWN_TRACES]]
    if absence.found > SHOWN_TRACES:
        lines.append(f"... and {absence.found - SHOWN_TRACES:,} more; --json lists them")
    lines += [f"{name}: cannot be decoded, so nobody knows what it holds" for name in absence.unread]
    lines += [f"the export {out} is out of reach, and was not read" for out in absence.out_of_reach]
    told = (
        "nothing of it is left" if absence.absent else f"{absence.found:,} traces, {len(absence.unread):,} files unread"
    )
    lines.append(
        f"{dataset}: looked for {looked} in {absence.files:,} files ({absence.rows:,} rows, {absence.bytes:,} bytes), "
        f"those of {len(absence.exports):,} exports among them: {told}"
    )
    return lines


def _found(trace: Any) -> str:
    return f"{trace.what} found" + (f" in the row of the pair {trace.uid}" if trace.uid else "")
