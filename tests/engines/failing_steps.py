"""Steps that fail as code, stores and devices do, and not as rows do."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import pyarrow as pa

from pairmill.plan import Recipe
from pairmill.stage import Batch, Kernel, Resources
from pairmill.storage import AccessDenied
from schemas.config import RunConfig
from tests.steps import CountChars, CountWords


class OddError(Exception):
    """Cannot be unpickled, as those of some libraries: it is made of other things than it tells."""

    def __init__(self, where: str, code: int) -> None:
        super().__init__(f"{where} says {code}")


def mistype() -> NoReturn:
    raise NameError("name 'wrods' is not defined")


def refuse() -> NoReturn:
    raise AccessDenied("the bucket is closed")


def be_odd() -> NoReturn:
    raise OddError("the hub", 451)


HOW: Mapping[str, Callable[[], NoReturn]] = {"mistype": mistype, "refuse": refuse, "be_odd": be_odd}


@dataclass(frozen=True)
class Fails(CountWords):
    """Fails as HOW has it: when it is opened, or when it is called."""

    opening: str = field(default="", compare=False, metadata={"identity": False})
    calling: str = field(default="", compare=False, metadata={"identity": False})

    def open(self) -> Kernel:
        if self.opening:
            HOW[self.opening]()
        count = super().open()

        def called(batch: Batch) -> pa.Table:
            if self.calling:
                HOW[self.calling]()
            return count(batch)

        return called


def recipe_that_fails(config: RunConfig) -> Recipe:
    """words, by a stage that fails as the options say."""
    said = config.options
    resources = Resources(actor=said.get("actor", False))
    return Recipe(
        "fails", (Fails(opening=said.get("opening", ""), calling=said.get("calling", ""), resources=resources),)
    )


class Device:
    """Room for one model: a file that is locked as long as this is there."""

    def __init__(self, path: str) -> None:
        self._file = os.open(path, os.O_CREAT | os.O_RDWR)
        fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def __del__(self) -> None:
        os.close(self._file)


@dataclass(frozen=True)
class OnDevice(CountWords):
    """Its kernel fills its device."""

    device: str = field(default="", compare=False, metadata={"identity": False})

    def open(self) -> Kernel:
        device, count = Device(self.device), super().open()

        def on_device(batch: Batch) -> pa.Table:
            assert device
            return count(batch)

        return on_device


def recipe_on_a_device(config: RunConfig) -> Recipe:
    """words, by a stage that fills its device."""
    return Recipe("device", (OnDevice(device=config.options["device"]),))


@dataclass(frozen=True)
class Loads(CountChars):
    """Loads until a file is there; says so by another."""

    until: str = field(default="", compare=False, metadata={"identity": False})

    def open(self) -> Kernel:
        Path(f"{self.until}-awaited").touch()
        while not os.path.exists(self.until):
            time.sleep(0.02)
        return super().open()


def recipe_that_loads(config: RunConfig) -> Recipe:
    """words, while a model loads for chars."""
    return Recipe("loads", (CountWords(config.options["pause_s"]), Loads(until=config.options["until"])))
