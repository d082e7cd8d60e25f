"""The errors of pairmill. Every message says what happened, where, and what to do next.

::

    PairmillError
    |-- ConfigError         the config or the arguments are wrong (exit code 2)
    |   |-- PlanError       the recipe does not fit together: unknown column, two writers, missing input
    |   `-- SourceError     a source cannot be read at all: no such file, no such column
    |-- ContractError       a stage broke its contract: a defect in the stage, never in the data
    |-- StageFailed         more rows failed in a stage than the error budget allows
    |-- StoreError          the dataset cannot be read or written
    |   `-- DatasetLocked   another process is writing to the dataset
    `-- EngineError         the engine cannot run the plan (cluster too small, not installed)
"""


class PairmillError(Exception):
    """Base of all errors that pairmill raises on purpose; the command prints it without a traceback."""

    exit_code = 1


class ConfigError(PairmillError):
    """The config or the arguments are wrong; the message names the key and what was expected."""

    exit_code = 2


class PlanError(ConfigError):
    """The recipe does not fit together; the message names the stage and the column."""


class SourceError(ConfigError):
    """A source cannot be read at all; the message names the path and what to change."""


class ContractError(PairmillError):
    """A stage broke its contract (wrong columns, types or row count): a defect in its code."""


class StageFailed(PairmillError):
    """More rows failed in a stage than the error budget allows; carries the count and the first traceback."""


class StoreError(PairmillError):
    """The dataset cannot be read or written."""


class DatasetLocked(StoreError):
    """Another process is writing to the dataset."""


class EngineError(PairmillError):
    """The engine cannot run the plan."""
