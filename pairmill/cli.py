"""The command: it turns arguments into calls and errors into exit codes. A verb imports what it needs when it runs.

Exit codes: 0 done; 1 the run failed; 2 the config or the arguments are wrong; 130 interrupted, run it again to go on.
"""

from __future__ import annotations

import errno
import gc
import os
import signal
import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from pairmill import __version__
from pairmill.commands import versions
from pairmill.commands.common import (
    AsJson,
    Config,
    DatasetUrl,
    Debug,
    Overrides,
    RetryDeferred,
    SnapshotId,
    Wait,
    print_json,
    shown,
)
from pairmill.commands.export import export
from pairmill.commands.forget import forget
from pairmill.commands.verify import verify
from pairmill.errors import ConfigError, PairmillError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pairmill.demo_examples import Example
    from pairmill.demo_instructions import Talk
    from pairmill.report.progress import Reporter
    from pairmill.run import RunReport
    from schemas.config import RunConfig

POLICY_PACKAGES = ("schemas", "filters", "captioners", "pipelines")
"""Top-level packages with names so general that another checkout could stand in front of ours."""

INTERRUPTED = 130

_OF_THE_MACHINE = {
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "mend access, or name another place"),
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "make room, or name another place"),
    **dict.fromkeys((errno.EEXIST, errno.ENOTDIR), "a file is where a folder should be: take it away"),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "allow more open files: ulimit -n 4096"),
}
"""Errors of the machine that no code is to blame for, and what to do about them."""

app = typer.Typer(
    name="pairmill",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # plain help: quick, and its examples can be copied
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
train = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Train the models that the stages use.")
app.add_typer(train, name="train")


class TableFormat(str, Enum):
    """How `pairmill sql` prints rows."""

    TABLE = "table"
    JSON = "json"
    CSV = "csv"


class EngineKind(str, Enum):
    """Where the demo's stages run."""

    RAY = "ray"
    LOCAL = "local"


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"pairmill {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Debug = False,
    version: Annotated[  # noqa: ARG001 (its callback acts)
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    """From lists of web image URLs with alt text to clean training data for vision-language models.

    \b
    Examples:
      pairmill demo --pairs 2000 --out demo
      pairmill run config.yaml
      pairmill sql out/my-dataset "SELECT reason, count(*) FROM pairs GROUP BY 1"

    Exit codes: 0 done; 1 the run failed; 2 the config or the arguments are wrong;
    130 interrupted, run it again to go on.
    """
    prepare(debug)


def prepare(debug: bool) -> None:
    """Set up logging and the import path, before anything runs."""
    import logging

    from pairmill.report.logs import configure_logging

    if debug:
        os.environ["PAIRMILL_DEBUG"] = "1"
    configure_logging(sys.stderr, logging.DEBUG if debug else logging.INFO)
    check_checkout()
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # for `recipe: my_module:function`; last, so that it hides nothing


@app.command()
def run(
    config: Config,
    overrides: Overrides = None,
    retry_deferred: RetryDeferred = False,
    revisit: Annotated[
        bool, typer.Option("--revisit", help="ask for stored images again; what changed becomes a new image")
    ] = False,
    revisit_where: Annotated[
        str | None,
        typer.Option("--revisit-where", metavar="SQL", help="as --revisit, of pairs that satisfy this condition"),
    ] = None,
    wait: Wait = 0.0,
    as_json: AsJson = False,
) -> None:
    """Admit new pairs, bring every stage up to date, publish a snapshot. Run again, it does only what is new.

    \b
    Examples:
      pairmill run config.yaml
      pairmill run config.yaml --set keep.clip_score=">= 0.3" --set engine.kind=local
      pairmill run config.yaml --retry-deferred
      pairmill run config.yaml --revisit-where "url LIKE '%://news.%'"
    """
    from pairmill.report.progress import reporter_for
    from pairmill.run import load_config, refresh

    loaded = load_config(config, overrides or [])
    with reporter_for(sys.stderr) as reporter:
        _note_shipped_models(loaded, reporter)
        report = refresh(
            loaded,
            reporter,
            retry_deferred=retry_deferred,
            revisit=revisit_where or ("true" if revisit else None),
            wait_s=wait,
        )
    if as_json:
        print_json(_run_json(report))
    else:
        _print_run(loaded.dataset, report)


@app.command()
def plan(
    config: Config,
    overrides: Overrides = None,
    retry_deferred: Annotated[
        bool, typer.Option("--retry-deferred", help="as if `run` were called with --retry-deferred")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Say what a run would do and why, rows by stage, and change nothing.

    \b
    Examples:
      pairmill plan config.yaml
      pairmill plan config.yaml --set models.clip=tiny --json
    """
    from dataclasses import asdict

    from pairmill.report.progress import reporter_for
    from pairmill.report.table import print_table
    from pairmill.run import load_config
    from pairmill.run import plan as make_plan

    loaded = load_config(config, overrides or [])
    with reporter_for(sys.stderr) as reporter:
        _note_shipped_models(loaded, reporter)
        report = make_plan(loaded, reporter, retry_deferred=retry_deferred)
    if as_json:
        print_json(asdict(report))
        return
    header = ("step", "kind", "rows_done", "rows_todo", "rows_at_most", "note")
    rows = [[step.get(name) for name in header] for step in report.steps]
    right = ("rows done", "rows todo", "rows at most")
    print_table([h.replace("_", " ") for h in header], rows, sys.stdout, right=right)
    for step in report.steps:
        if step["cost"]:
            typer.echo(f"{step['step']} costs {step['cost']}")
    refused = f" {report.taken_down:,} rows of the sources were taken down before." if report.taken_down else ""
    again = f" {report.retried:,} deferred pairs would be tried again." if report.retried else ""
    typer.echo(f"\n{report.new_rows:,} new pairs would be admitted to {shown(loaded.dataset)}.{again}{refused}")


app.command()(versions.status)
app.command()(versions.snapshots)
app.command()(versions.diff)
app.command()(versions.rollback)
app.command()(versions.vacuum)
app.command()(export)
app.command()(forget)
app.command()(verify)


@app.command()
def sql(
    dataset: DatasetUrl,
    query: Annotated[str, typer.Argument(metavar="SQL", help="one SELECT of DuckDB's", show_default=False)],
    output: Annotated[
        TableFormat, typer.Option("--format", help="table cuts long values; json and csv have them whole")
    ] = TableFormat.TABLE,
    snapshot: SnapshotId = None,
) -> None:
    """Ask a snapshot a question. Views: pairs, texts, images, image_history, boxes, rejected_boxes, instructions,
    usage, snapshots.

    \b
    Examples:
      pairmill sql out/my-dataset "SELECT reason, count(*) FROM pairs GROUP BY 1 ORDER BY 2 DESC"
      pairmill sql out/my-dataset "DESCRIBE pairs"
      pairmill sql out/my-dataset --format csv "SELECT url FROM pairs WHERE status = 'kept'" > kept.csv
    """
    from pairmill.query import query as ask
    from pairmill.report.rows import print_csv, print_json_rows, print_rows
    from pairmill.store import Dataset

    rows = ask(Dataset(dataset).snapshot(snapshot), query)
    printers = {TableFormat.TABLE: print_rows, TableFormat.JSON: print_json_rows, TableFormat.CSV: print_csv}
    printers[output](rows, sys.stdout)


@train.command("clip")
def train_clip(config: Config, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Train a small CLIP on procedural scenes; interrupted, the same command goes on from its checkpoint.

    \b
    Examples:
      pairmill train clip pairmill/weights/clip-tiny/train.yaml
      pairmill train clip pairmill/weights/clip-tiny/train.yaml --set steps=200 --set out=out/quick
    """
    from pairmill.config_file import read_config
    from pairmill.report.progress import reporter_for
    from pairmill.train.clip import TrainClipConfig
    from pairmill.train.clip import train_clip as fit

    loaded = read_config(TrainClipConfig, config, overrides or [])
    with reporter_for(sys.stderr) as reporter:
        report = fit(loaded, progress=_TrainingLines(reporter).tell)
    if as_json:
        print_json({"out": str(report.out), "seconds": report.seconds, "metrics": dict(report.metrics)})
        return
    typer.echo(
        f"trained in {report.seconds:,.0f} s, loss {report.first_loss:.3f} to {report.last_loss:.3f}: {report.out}"
    )
    for name, value in report.metrics.items():
        typer.echo(f"  {name}: {value}")


@train.command("captioner")
def train_captioner(config: Config, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Train a BLIP captioner on a dataset of ours, COCO captions or procedural scenes; interrupted, it goes on.

    \b
    Examples:
      pairmill train captioner examples/train/captioner.yaml
      pairmill train captioner pairmill/weights/captioner-tiny/train.yaml --set steps=200 --set out=out/quick
    """
    from pairmill.train.blip import train_captioner as fit
    from pairmill.train.captioner import TrainCaptionerConfig

    _train_blip(fit, TrainCaptionerConfig, config, overrides, as_json)


@train.command("filter")
def train_filter(config: Config, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Train a BLIP image-text-matching filter, as `train captioner` trains a captioner.

    \b
    Examples:
      pairmill train filter examples/train/filter.yaml
      pairmill train filter pairmill/weights/itm-tiny/train.yaml --set steps=200 --set out=out/quick
    """
    from pairmill.train.blip import train_filter as fit
    from pairmill.train.itm import TrainFilterConfig

    _train_blip(fit, TrainFilterConfig, config, overrides, as_json)


@train.command("loop")
def train_loop(config: Config, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """CapFilt's whole loop: train both on a curated set, mend a noisy set with them, train again on the result.

    \b
    Examples:
      pairmill train loop examples/train/loop.yaml
    """
    from dataclasses import asdict

    from pairmill.config_file import read_config
    from pairmill.loop import LoopConfig, run_loop
    from pairmill.report.progress import reporter_for

    loaded = read_config(LoopConfig, config, overrides or [])
    with reporter_for(sys.stderr) as reporter:
        report = run_loop(loaded, reporter, _TrainingLines(reporter).tell)
    if as_json:
        steps = {name: None if part is None else asdict(part) for name, part in vars(report).items() if name != "run"}
        print_json({**steps, "run": _run_json(report.run)})
        return
    _print_run(str(loaded.out / "dataset"), report.run)
    for name in ("pretrain", "captioner", "filter", "again"):
        part = getattr(report, name)
        told = "was there already" if part is None else f"{part.steps:,} steps, {part.seconds:,.0f} s: {part.out}"
        typer.echo(f"{name}: {told}")


def _train_blip(fit: Any, model: Any, config: str, overrides: list[str] | None, as_json: bool) -> None:
    from pairmill.config_file import read_config
    from pairmill.report.progress import reporter_for

    loaded = read_config(model, config, overrides or [])
    with reporter_for(sys.stderr) as reporter:
        report = fit(loaded, progress=_TrainingLines(reporter).tell)
    if as_json:
        print_json({"out": str(report.out), "seconds": report.seconds, "metrics": dict(report.metrics)})
        return
    typer.echo(
        f"trained {report.steps:,} steps in {report.seconds:,.0f} s, loss {report.first_loss:.3f} to "
        f"{report.last_loss:.3f}: {report.out} (model, README.md, curves.png, metrics.json)"
    )
    for name, value in report.metrics["evaluation"].items():
        typer.echo(f"  held out: {name} {value:.4f}")


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Check this machine: Python, packages, Ray, GPU, memory, limits, the shipped models. Says what to do.

    \b
    Examples:
      pairmill doctor
      pairmill doctor --json
    """
    from dataclasses import asdict

    from pairmill.doctor import Level, examine

    findings = examine()
    failed = any(f.level is Level.FAIL for f in findings)
    if as_json:
        print_json({"ok": not failed, "findings": [{**asdict(f), "level": f.level.value} for f in findings]})
    else:
        for finding in findings:
            typer.echo(f"{finding.level.value:4}  {finding.check}: {finding.message}")
            if finding.fix:
                typer.echo(f"      {finding.fix}")
    if failed:
        raise typer.Exit(1)


@app.command()
def demo(
    pairs: Annotated[int, typer.Option("--pairs", min=10, metavar="N", help="pairs on the procedural web")] = 2000,
    out: Annotated[str, typer.Option("--out", metavar="DIR", help="folder to write to")] = "demo",
    seed: Annotated[int, typer.Option("--seed", help="another web")] = 0,
    engine: Annotated[EngineKind, typer.Option("--engine", help="where the stages run")] = EngineKind.RAY,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """The main job offline: a loopback web of procedural pictures whose truth is known, the shipped models, instruction
    data without a model, two exports.

    \b
    Examples:
      pairmill demo
      pairmill demo --pairs 500 --out /tmp/demo --engine local
    """
    from dataclasses import asdict

    from pairmill.demo import run_demo
    from pairmill.report.progress import reporter_for

    with reporter_for(sys.stderr) as reporter:
        report = run_demo(pairs, out, reporter, seed=seed, engine=engine.value, overrides=tuple(overrides or ()))
    if as_json:
        print_json({"out": str(report.out), "run": _run_json(report.run), "metrics": asdict(report.metrics)})
        return
    _print_run(str(report.out / "dataset"), report.run)
    _print_demo(report.out, asdict(report.metrics), report.examples, report.talks)


def _note_shipped_models(config: RunConfig, reporter: Reporter) -> None:
    from pairmill.run import shipped_models_used

    if stages := shipped_models_used(config):
        reporter.note(
            f"{', '.join(stages)}: by the tiny models that pairmill ships, which know coloured shapes and nothing "
            "else; for other pictures name models of your own (`models:` in the config)"
        )


# -- what the verbs print ---------------------------------------------------------------------------------------------


def _run_json(report: RunReport) -> dict[str, Any]:
    from dataclasses import asdict

    return {**asdict(report), "snapshot": versions.record_json(report.snapshot) if report.snapshot else None}


def _print_run(dataset: str, report: RunReport) -> None:
    if report.snapshot is None:
        typer.echo("The sources hold no rows: nothing was done.")
        return
    from pairmill.query import instruction_counts
    from pairmill.spent import in_words
    from pairmill.store import Dataset

    versions.print_snapshot(dataset, report.snapshot)
    if "instructions" in report.snapshot.columns:
        versions.print_instructions(instruction_counts(Dataset(dataset).snapshot()))
    computed = ", ".join(f"{stage} {rows:,}" for stage, rows in report.computed.items()) or "nothing"
    published = "published" if report.published else "nothing new: still"
    typer.echo(
        f"\n{published} snapshot {report.snapshot.id} in {report.seconds:,.1f} s; {report.admitted_new:,} new pairs, "
        f"{report.known:,} known, {report.repeated:,} repeated; rows computed: {computed}"
    )
    if report.computed:
        typer.echo(f"time: {in_words(report.spent)}")


def _print_demo(out: Path, metrics: Mapping[str, Any], examples: list[Example], talks: list[Talk]) -> None:
    from pairmill.demo_examples import example_lines
    from pairmill.demo_instructions import talk_lines

    captions, instructions = metrics["captions"], metrics["instructions"]
    kinds = ", ".join(f"{kind} {number:,}" for kind, number in instructions["conversations"].items())
    lines = {
        "true texts": f"{metrics['true_texts_in']:.1%} of what came in, {metrics['true_texts_kept']:.1%} of the "
        f"{metrics['texts_kept']:,} texts that are kept",
        "false texts caught": "precision {precision:.3f}, recall {recall:.3f}".format(**metrics["mismatched"]),
        "captions": f"{captions['true_written']:.1%} of {captions['written']:,} written are true, "
        f"{captions['true_kept']:.1%} of {captions['kept']:,} after the filter",
        "images rescued": f"{captions['rescued']:.1%} of {captions['images_with_false_text']:,} with a false alt text "
        "have a true caption now",
        "duplicates caught": "precision {precision:.3f}, recall {recall:.3f}".format(**metrics["duplicates"]),
        "broken pictures kept": f"{metrics['broken_kept']:,}",
        "exported": f"{metrics['exported']:,} samples",
        "instruction data": f"{sum(instructions['conversations'].values()):,} conversations: {kinds}",
        "true answers": f"{instructions['true']:.2%} of {instructions['answers']:,}; {instructions['false']:,} false, "
        f"{instructions['not_understood']:,} not understood",
    }
    typer.echo("\nTexts of some images, before and after:\n")
    typer.echo("\n".join(shown(line) for line in example_lines(examples)))
    typer.echo("Instruction data about some images:\n")
    typer.echo("\n".join(shown(line) for line in talk_lines(talks)))
    typer.echo("Against the truth that the web knows:")
    for name, text in lines.items():
        typer.echo(f"  {name:22}{text}")
    typer.echo(
        f"\n{out}/ holds dataset/, export/, export-llava/, examples.png, instruct_examples.png, urls.parquet, "
        "truth.parquet, config.yaml and metrics.json. Next:"
    )
    typer.echo(f"  pairmill status {out}/dataset")
    typer.echo(f'  pairmill sql {out}/dataset "SELECT source, kept, reason, count(*) FROM texts GROUP BY ALL"')  # noqa: S608 (shown, not run)


class _TrainingLines:
    """A training's progress as segments of a reporter."""

    def __init__(self, reporter: Any) -> None:
        self._reporter = reporter
        self._segment: tuple[str, int] | None = None
        self._step = 0

    def tell(self, progress: Any) -> None:
        """Take one report of the training. What begins anew, as with each of several sources, is a new segment."""
        segment = (progress.stage, progress.steps)
        if segment != self._segment or progress.step <= self._step:
            self._reporter.finish()
            self._segment, self._step = segment, 0
            self._reporter.start(*segment, "steps" if progress.stage == "train" else "rows")
        self._reporter.advance(progress.step - self._step, {})
        self._step = progress.step


# -- start and end ----------------------------------------------------------------------------------------------------


def check_checkout(packages: Sequence[str] = POLICY_PACKAGES) -> None:
    """Make sure that the packages with general names are the ones beside this one.

    Raises:
        ConfigError: another package of the name stands in front of ours on the import path, or ours is not there.
    """
    from importlib.util import find_spec

    home = Path(__file__).resolve().parent.parent
    for name in packages:
        spec = find_spec(name)
        if spec is None:
            raise ConfigError(f"the package {name!r} is missing beside {home / 'pairmill'}; install pairmill again")
        if spec.origin is None or Path(spec.origin).resolve().parent.parent != home:
            found = spec.origin or next(iter(spec.submodule_search_locations or ()), "somewhere else")
            raise ConfigError(
                f"the package {name!r} is imported from {found}, not from {home}; take that one off the import path "
                "(PYTHONPATH, or run from another folder), or install pairmill in an environment of its own"
            )


def main(command: typer.Typer = app, name: str = "pairmill") -> NoReturn:
    """Run the command, or another that behaves like it, and leave with its exit code."""
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        command(prog_name=name)
    except SystemExit as end:
        if end.code == INTERRUPTED:  # typer turns Ctrl-C into this
            _say("interrupted; run the same command again to go on")
            _leave_models_behind()
        raise
    except PairmillError as error:
        _explain(error)
        sys.exit(error.exit_code)
    except Exception as error:  # noqa: BLE001 (the last line of defence: it is shown whole)
        advice = _OF_THE_MACHINE.get(error.errno or 0) if isinstance(error, OSError) else None
        if advice:
            told = PairmillError(f"{error}; {advice}, then run again: what was finished is kept")
            told.__cause__ = error
            _explain(told)
        else:
            _explain_defect(error)
        sys.exit(1)
    finally:
        gc.freeze()  # or Python looks through all that torch has made once more before it ends: a second for nothing
    raise SystemExit(0)


def _leave_models_behind() -> None:
    """End at once where a thread still loads a model: Python would wait for it, and fetching weights may take long."""
    import threading

    execute = sys.modules.get("pairmill.execute")  # not imported for this alone
    if execute and any(thread.name.startswith(execute.WARMING) for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(INTERRUPTED)


def _interrupt(*_: object) -> NoReturn:
    """SIGTERM, as schedulers send it before they kill, ends a run as Ctrl-C does: what is finished is committed."""
    raise KeyboardInterrupt


def _explain(error: PairmillError) -> None:
    if os.environ.get("PAIRMILL_DEBUG"):
        _print_traceback(error)
    _say(f"error: {error}")


def _explain_defect(error: Exception) -> None:
    _print_traceback(error)
    _say(
        f"error: {type(error).__name__}: {error}\nThis is a defect of pairmill {__version__}, not of your data or "
        "config; please report it with the traceback above. What was finished is kept."
    )


def _print_traceback(error: Exception) -> None:
    import traceback

    _say("".join(traceback.format_exception(type(error), error, error.__traceback__)).rstrip())


def _say(message: str) -> None:
    """Print on stderr, without secrets and control characters."""
    from pairmill.report.text import visible, without_secrets

    for line in without_secrets(message).splitlines():
        typer.echo("    ".join(visible(part) for part in line.split("\t")), err=True)


if __name__ == "__main__":
    main()
