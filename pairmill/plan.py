"""From a recipe to a plan: validate columns, fingerprint stages, cut at global steps.

Everything that can be wrong with a recipe is found here, before a dataset is touched.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from pairmill.errors import ConfigError, PlanError
from pairmill.stage import GlobalStage, GlobalVerdict, Resources, Stage, Step, Verdict
from pairmill.store import LEDGER_TABLE, PAIRS_TABLE
from schemas import fields
from schemas.config import Placement, Section

Kind = Literal["stage", "verdict", "global stage", "global verdict"]

PAIR_COLUMNS = (*(f.name for f in fields.PAIRS if f.name not in ("reason", "detail")), fields.SHARD.name)
"""Columns every step may read: those of the pairs table."""

OUTCOMES = (fields.TEXT_RANKS.name,)
"""Columns of the ledger that a stage may read where a verdict before it has them among its outcomes."""

RESERVED = frozenset({"uid", "shard", "reason", "detail"})


@dataclass(frozen=True)
class Recipe:
    """The steps a pair goes through, in order: stages, verdicts, global stages and global verdicts."""

    name: str
    steps: tuple[Step, ...]


@dataclass(frozen=True)
class PlannedStep:
    """A step of the recipe with what the plan knows of it."""

    index: int
    step: Step
    kind: Kind
    fingerprint: str | None
    """Of a stage: its identity and its inputs'. Verdicts have none: nothing of theirs is stored."""
    table: str | None
    """Of a stage: the table that holds its columns."""

    @property
    def name(self) -> str:
        """The step's name."""
        return self.step.name


@dataclass(frozen=True)
class Group:
    """Consecutive map steps of equal resources: they run in one worker and share decoded images."""

    resources: Resources
    steps: tuple[PlannedStep, ...]

    @property
    def title(self) -> str:
        """Names of its stages."""
        return "+".join(s.name for s in self.steps if s.kind == "stage") or "verdicts"


@dataclass(frozen=True)
class Segment:
    """What runs between two global steps (`groups`), or one global step."""

    groups: tuple[Group, ...] = ()
    global_step: PlannedStep | None = None

    @property
    def steps(self) -> tuple[PlannedStep, ...]:
        """All its steps, in order."""
        if self.global_step is not None:
            return (self.global_step,)
        return tuple(s for g in self.groups for s in g.steps)

    @property
    def title(self) -> str:
        """Names of its stages."""
        return self.global_step.name if self.global_step else " > ".join(g.title for g in self.groups)


@dataclass(frozen=True)
class Plan:
    """A validated recipe: picklable, the same on every engine."""

    recipe: str
    steps: tuple[PlannedStep, ...]
    segments: tuple[Segment, ...]
    columns: dict[str, str] = field(hash=False)
    """Which table holds a column."""

    @property
    def tables(self) -> tuple[str, ...]:
        """The tables of its stages, in order."""
        return tuple(s.table for s in self.steps if s.table is not None)


def compile_plan(recipe: Recipe) -> Plan:
    """Validate a recipe and lay out how it runs.

    Raises:
        PlanError: an unknown column, two writers of a column, an input that is written only later, a verdict that reads
            pixels; the message names the step and the column.
    """
    if not recipe.steps:
        raise PlanError(f"recipe {recipe.name!r} has no steps; its function must return at least one stage or verdict")
    writers = _writers(recipe)
    columns = dict.fromkeys(PAIR_COLUMNS, PAIRS_TABLE)
    fingerprints = dict.fromkeys(PAIR_COLUMNS, PAIRS_TABLE)
    planned = []
    outcomes: set[str] = set()
    for index, step in enumerate(recipe.steps):
        kind = _kind(step)
        for column in step.reads:
            if column in outcomes and kind == "stage":
                fingerprints[column] = LEDGER_TABLE
            else:
                _check_readable(step, kind, column, columns, writers)
        outcomes |= set(step.outcomes)
        fingerprint = table = None
        if isinstance(step, (Stage, GlobalStage)):
            fingerprint = step.fingerprint([fingerprints[c] for c in step.reads])
            table = f"{step.name}-{fingerprint[:8]}"
            for f in step.writes:
                columns[f.name] = table
                fingerprints[f.name] = fingerprint
        planned.append(PlannedStep(index, step, kind, fingerprint, table))
    return Plan(recipe.name, tuple(planned), _cut(planned), columns)


def placed(recipe: Recipe, placements: Mapping[str, Placement]) -> Recipe:
    """The recipe with its stages placed as a config says (``engine.stages``).

    Raises:
        ConfigError: a stage that the recipe does not have.
    """
    names = [step.name for step in recipe.steps if isinstance(step, Stage)]
    for name in placements:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(
                f"engine.stages: the recipe {recipe.name!r} has no stage {name!r} that is placed{hint} "
                f"(there are: {', '.join(names)})"
            )

    def place(step: Step) -> Step:
        if not isinstance(step, Stage) or step.name not in placements:
            return step
        return replace(step, resources=step.resources.placed(placements[step.name]))  # type: ignore[type-var]

    return Recipe(recipe.name, tuple(map(place, recipe.steps)))


def _kind(step: Step) -> Kind:
    kinds: tuple[tuple[type, Kind], ...] = (
        (Stage, "stage"),
        (Verdict, "verdict"),
        (GlobalStage, "global stage"),
        (GlobalVerdict, "global verdict"),
    )
    for base, kind in kinds:
        if isinstance(step, base):
            return kind
    raise PlanError(f"{step!r} is no step; a recipe holds Stage, Verdict, GlobalStage and GlobalVerdict objects")


def _writers(recipe: Recipe) -> dict[str, str]:
    """Which step writes each column, over the whole recipe."""
    writers: dict[str, str] = {}
    for step in recipe.steps:
        if not isinstance(step, (Stage, GlobalStage)):
            continue
        for f in step.writes:
            if f.name in RESERVED or f.name in PAIR_COLUMNS:
                raise PlanError(f"stage {step.name!r} writes {f.name!r}, which belongs to the pairs table; rename it")
            if f.name in writers:
                raise PlanError(
                    f"column {f.name!r} has two writers: stage {writers[f.name]!r} and stage {step.name!r}; "
                    "a column has one writer, so remove one of them or rename its column"
                )
            writers[f.name] = step.name
    return writers


def _check_readable(step: Step, kind: Kind, column: str, columns: dict[str, str], writers: dict[str, str]) -> None:
    who = f"{kind} {step.name!r}"
    if column == fields.IMAGE.name and kind != "stage":
        raise PlanError(f"{who} reads {column!r}; only map stages see pixels: measure in a stage, judge its column")
    if column in columns:
        return
    if column in writers:
        raise PlanError(
            f"{who} reads {column!r}, but stage {writers[column]!r} that writes it comes later in the recipe; move it "
            f"before {step.name!r}"
        )
    near = difflib.get_close_matches(column, [*columns, *writers], n=1)
    hint = f"; did you mean {near[0]!r}?" if near else f"; there are: {', '.join(sorted({*columns, *writers}))}"
    raise PlanError(f"{who} reads the unknown column {column!r}{hint}")


def _cut(steps: list[PlannedStep]) -> tuple[Segment, ...]:
    """Segments between global steps; in a segment, groups of equal resources. A verdict joins the group before it."""
    segments: list[Segment] = []
    groups: list[list[PlannedStep]] = []
    resources: list[Resources] = []

    def chose() -> bool:
        return any(s.step.outcomes for group in groups for s in group)

    def close() -> None:
        if groups:
            segments.append(Segment(tuple(_group(r, g) for r, g in zip(resources, groups, strict=True))))
            groups.clear()
            resources.clear()

    for planned in steps:
        step = planned.step
        if isinstance(step, (GlobalStage, GlobalVerdict)):
            close()
            segments.append(Segment(global_step=planned))
        elif isinstance(step, Stage):
            wanted = step.resources
            if read_outcomes(step) and chose():
                close()  # what verdicts made of texts is told by the driver, with each unit of a later segment
            only_verdicts = bool(groups) and all(s.kind == "verdict" for s in groups[-1])
            if groups and (only_verdicts or _place(resources[-1]) == _place(wanted)):
                if only_verdicts:
                    resources[-1] = wanted
                groups[-1].append(planned)
            else:
                groups.append([planned])
                resources.append(wanted)
        elif groups:
            groups[-1].append(planned)
        else:
            groups.append([planned])
            resources.append(Resources())
    close()
    return tuple(segments)


def read_outcomes(step: Step) -> list[str]:
    """The columns of the ledger that a stage reads (`Step.outcomes`)."""
    return [column for column in step.reads if column in OUTCOMES]


def _place(resources: Resources) -> Resources:
    """What must be equal for stages to share a worker: all but whether it keeps its kernels, and takes a GPU where
    there is one."""
    return replace(resources, actor=False, gpu_if_any=False)


def _group(resources: Resources, steps: list[PlannedStep]) -> Group:
    stages = [s.step for s in steps if isinstance(s.step, Stage)]
    actor = any(stage.resources.actor for stage in stages)
    gpu_if_any = any(stage.resources.gpu_if_any for stage in stages)
    return Group(replace(resources, actor=actor, gpu_if_any=gpu_if_any), tuple(steps))


def model_identities(plan: Plan) -> dict[str, str]:
    """What identifies the model of each stage that has one."""
    found = {}
    for planned in plan.steps:
        for f in dataclasses.fields(planned.step):  # type: ignore[arg-type]
            value = getattr(planned.step, f.name)
            identity = getattr(value, "identity", None)
            if callable(identity) and not isinstance(value, Section):  # a part of the config is no model
                found[f"{planned.name}.{f.name}"] = str(identity())
    return found
