"""SIGKILL at every step that others can see, at random times, and two runs at once. Oracle: what an undisturbed run
makes."""

from __future__ import annotations

import random
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from pairmill.store import Dataset
from tests.faults.datasets import content, counts, write_config, write_urls
from tests.faults.zygote import Zygote

KILLED = -signal.SIGKILL


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    with Zygote() as running:
        yield running


AFTER = ["options.words=2"]
"""A looser threshold: with the grown list, the second refresh has all kinds of work."""


@pytest.fixture(scope="module")
def begun(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset with one snapshot."""
    folder = tmp_path_factory.mktemp("begun")
    write_urls(folder, 60)
    assert zygote.run({"config": str(write_config(folder))})[0].code == 0
    return folder


def grown(begun: Path, folder: Path) -> Path:
    """A copy of it, and a list that has grown since."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copytree(begun / "dataset", folder / "dataset")
    write_urls(folder, 100)
    return write_config(folder)


@pytest.fixture(scope="module")
def calm(
    zygote: Zygote, begun: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, dict[str, str]], int, float]:
    """What the second refresh makes, how many steps it takes, and how many seconds."""
    config = grown(begun, tmp_path_factory.mktemp("calm"))
    (done,) = zygote.run({"config": str(config), "overrides": AFTER})
    assert done.code == 0, done.error
    return content(config, tuple(AFTER)), done.steps, done.seconds


def killed(zygote: Zygote, begun: Path, folder: Path, **when: float) -> None:
    """Kill a refresh, look at what readers see, and go on."""
    config = grown(begun, folder)
    dataset = Dataset(str(folder / "dataset"))
    before = counts(dataset)
    (outcome,) = zygote.run({"config": str(config), "overrides": AFTER, **when})
    if outcome.code == 0:
        return  # the clock was too late
    assert outcome.code == KILLED, outcome.error
    after = counts(dataset)
    assert after == before or len(dataset.snapshots()) == 2, "readers see the last snapshot, whole"
    (again,) = zygote.run({"config": str(config), "overrides": AFTER})
    assert again.code == 0, again.error


def test_sigkill_before_every_step_of_a_refresh_and_after_the_last(zygote: Zygote, begun: Path, calm, tmp_path: Path):
    expected, steps, _ = calm
    assert steps >= 20
    for when, step in [*(("before", step) for step in range(steps)), ("after", steps - 1)]:
        folder = tmp_path / f"{when}-{step}"
        killed(zygote, begun, folder, **{when: step})
        assert content(folder / "config.yaml", tuple(AFTER)) == expected, (when, step)


def test_sigkill_at_twenty_random_times(zygote: Zygote, begun: Path, calm, tmp_path: Path):
    expected, _, seconds = calm
    chance = random.Random(0)
    for trial in range(20):
        folder = tmp_path / str(trial)
        killed(zygote, begun, folder, clock=chance.uniform(0, 1.2 * seconds))
        assert content(folder / "config.yaml", tuple(AFTER)) == expected, trial


def test_sigkill_again_and_again_in_one_dataset(zygote: Zygote, begun: Path, calm, tmp_path: Path):
    expected, steps, _ = calm
    config = grown(begun, tmp_path)
    chance = random.Random(1)
    deaths = 0
    while True:
        (outcome,) = zygote.run({"config": str(config), "overrides": AFTER, "after": chance.randrange(12)})
        if outcome.code == 0:
            break
        assert outcome.code == KILLED, outcome.error
        deaths += 1
        assert deaths < steps, "each attempt gets further"
    assert deaths > 3
    assert content(config, tuple(AFTER)) == expected


def test_two_runs_at_once_one_wins_and_the_other_fails_clean_or_finds_nothing_to_do(
    zygote: Zygote, begun: Path, calm, tmp_path: Path
):
    expected, _, seconds = calm
    refused = 0
    for trial in range(20):
        folder = tmp_path / str(trial)
        config = grown(begun, folder)
        job = {"config": str(config), "overrides": AFTER}
        first, second = zygote.run(job, {**job, "delay": trial / 19})
        assert 0 in (first.code, second.code), (first.error, second.error)
        for outcome in (first, second):
            if outcome.code:
                refused += 1
                assert outcome.error.startswith("DatasetLocked") and "process" in outcome.error
        assert content(config, tuple(AFTER)) == expected, trial
        assert len(Dataset(str(folder / "dataset")).snapshots()) == 2
    assert refused or seconds < 0.05, "at least the runs that start together meet"


def test_a_run_that_waits_goes_on_when_the_other_has_ended(zygote: Zygote, tmp_path: Path):
    write_urls(tmp_path, 60)
    config = write_config(tmp_path)
    job = {"config": str(config), "arguments": {"wait_s": 60}}
    outcomes = zygote.run(job, job, job)
    assert [o.code for o in outcomes] == [0, 0, 0], [o.error for o in outcomes]
    assert len(Dataset(str(tmp_path / "dataset")).snapshots()) == 1
