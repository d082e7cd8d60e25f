"""Ray: pools fit the cluster, a dead worker is no hang, and errors arrive as ours."""

from __future__ import annotations

from pathlib import Path

import pytest

from pairmill.engines.ray_data import Pool, size_pools
from pairmill.errors import EngineError, StageFailed
from pairmill.execute import Job
from pairmill.plan import Recipe, compile_plan
from pairmill.report.progress import Silent
from pairmill.run import refresh
from pairmill.stage import Resources
from tests.steps import AtLeast, CountChars, CountWords, config, write_urls


def job(words: Resources, chars: Resources) -> Job:
    plan = compile_plan(Recipe("test", (CountWords(resources=words), AtLeast(3), CountChars(resources=chars))))
    return Job("dataset", plan, 0, 0.0, 0)


def test_actors_never_take_the_cpus_that_tasks_need():
    pools = size_pools(job(Resources(cpus=1), Resources(cpus=1, rows=32, actor=True)), {"CPU": 2.0}, None)
    assert pools == [Pool(1.0, 0.0, 0), Pool(1.0, 0.0, 1)]
    pools = size_pools(job(Resources(cpus=1), Resources(cpus=1, rows=32, actor=True)), {"CPU": 16.0}, None)
    assert pools[1].workers == 15
    assert size_pools(job(Resources(cpus=1), Resources(cpus=1, rows=32, actor=True)), {"CPU": 16.0}, 4)[1].workers == 4


def test_a_group_may_ask_for_few_workers():
    chars = Resources(cpus=1, rows=32, actor=True, workers=1)
    assert size_pools(job(Resources(cpus=1), chars), {"CPU": 16.0}, None)[1].workers == 1
    assert size_pools(job(Resources(cpus=1), chars), {"CPU": 16.0}, 4)[1].workers == 1


def test_one_cpu_is_shared_by_all_groups():
    pools = size_pools(job(Resources(cpus=1), Resources(cpus=1, rows=32, actor=True)), {"CPU": 1.0}, None)
    assert [p.cpus for p in pools] == [0.5, 0.5] and pools[1].workers == 1


def test_gpu_groups_get_as_many_workers_as_there_are_gpus():
    pools = size_pools(job(Resources(cpus=1), Resources(cpus=1, gpus=0.5, actor=True)), {"CPU": 32.0, "GPU": 4.0}, None)
    assert pools[1] == Pool(1.0, 0.5, 8)


def test_too_few_gpus_are_an_error_before_anything_runs():
    with pytest.raises(EngineError, match=r"needs 1 GPUs at a time, the Ray cluster has 0; .*models.device=cpu"):
        size_pools(job(Resources(cpus=1), Resources(cpus=1, gpus=1, actor=True)), {"CPU": 2.0}, None)


def test_a_failed_stage_arrives_as_its_own_error(tmp_path: Path):
    table = write_urls(tmp_path / "urls.parquet", [f"poison {i} in this text" for i in range(100)])
    with pytest.raises(StageFailed, match="ValueError: a poisoned text"):
        refresh(config(tmp_path, table, engine={"kind": "ray", "address": "local"}), Silent())
