"""Ray: pools fit the cluster, a dead worker is no hang, and errors arrive as ours."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pairmill.engines import open_engine
from pairmill.engines import ray as on_ray
from pairmill.engines.ray import session
from pairmill.engines.ray import watch as watching
from pairmill.engines.ray.pools import MissingResourcesError, Need, Node, Pool, Sizing, slots
from pairmill.engines.ray.watch import Patience, ResizeError, Watch
from pairmill.errors import EngineError, StageFailed
from pairmill.execute import Job, Unit
from pairmill.plan import Recipe, compile_plan
from pairmill.report.progress import Silent
from pairmill.run import refresh
from pairmill.stage import Resources
from schemas.config import Engine as Config
from tests.engines.cluster_steps import Contrast
from tests.steps import AtLeast, CountChars, CountWords, config, write_urls


def job(words: Resources, chars: Resources) -> Job:
    plan = compile_plan(Recipe("test", (CountWords(resources=words), AtLeast(3), CountChars(resources=chars))))
    return Job("dataset", plan, 0, 0.0, 0)


def nodes(*offers: dict[str, float], labels: dict[str, str] | None = None) -> list[Node]:
    return [Node(f"10.0.0.{i}", offer, labels or {}) for i, offer in enumerate(offers)]


def sized(words: Resources, chars: Resources, machines: list[Node], **said: Any) -> list[Pool]:
    return Sizing(job(words, chars), **said).pools(machines)


TASK = Resources(cpus=1)
MODEL = Resources(cpus=1, rows=32, actor=True)
MODEL16 = replace(MODEL, rows=16)
ON_GPU = replace(MODEL, gpus=0.5)


def test_a_pool_of_cpus_is_bounded_by_what_is_said_and_not_by_the_nodes_of_the_first_second():
    assert sized(TASK, MODEL, nodes({"CPU": 2.0})) == [Pool(Need(1.0)), Pool(Need(1.0), 1, None)]
    assert sized(TASK, MODEL, nodes({"CPU": 16.0}), workers=4)[1].most == 4
    bounded = replace(MODEL, min_workers=2, max_workers=3)
    assert sized(TASK, bounded, nodes({"CPU": 16.0}))[1] == Pool(Need(1.0), 2, 3)
    assert sized(TASK, bounded, nodes({"CPU": 2.0}))[1].least == 1, "a task has its room first"


def test_a_group_may_ask_for_few_workers():
    chars = replace(MODEL, workers=2)
    for workers, expected in ((None, 2), (4, 2), (1, 1)):
        pool = sized(TASK, chars, nodes({"CPU": 16.0}), workers=workers)[1]
        assert (pool.least, pool.most) == (expected, expected)


def test_groups_that_keep_several_workers_leave_room_for_a_task():
    groups = (CountWords(resources=TASK), Contrast(resources=MODEL16), CountChars(resources=MODEL))
    for wants in ({"min_workers": 3}, {"workers": 3}):
        steps = (groups[0], *(replace(g, resources=replace(g.resources, **wants)) for g in groups[1:]))
        sizing = Sizing(Job("dataset", compile_plan(Recipe("test", steps)), 0, 0.0, 0))
        for cpus, kept in ((3.0, [1, 1]), (4.0, [2, 1]), (6.0, [3, 2]), (7.0, [3, 3]), (16.0, [3, 3])):
            pools = sizing.pools(nodes({"CPU": cpus}))
            assert [pool.need.cpus for pool in pools] == [1.0] * 3
            assert [pool.least for pool in pools] == [0, *kept]
    gpus = sized(TASK, replace(ON_GPU, min_workers=4), nodes({"CPU": 8.0}, {"CPU": 3.0, "GPU": 1.0}))
    assert (gpus[1].least, gpus[1].most) == (2, 2), "as many as there are"


def test_one_cpu_is_shared_by_all_groups():
    pools = sized(TASK, MODEL, nodes({"CPU": 1.0}))
    assert [p.need.cpus for p in pools] == [0.5, 0.5] and pools[1].least == 1


def test_gpu_groups_get_as_many_workers_as_their_nodes_hold():
    assert sized(TASK, ON_GPU, nodes({"CPU": 32.0, "GPU": 4.0}))[1] == Pool(Need(1.0, 0.5), 1, 8)
    thirds = replace(MODEL, gpus=0.3)
    assert sized(TASK, thirds, nodes({"CPU": 32.0, "GPU": 4.0}))[1].most == 12, "a fraction never spans two GPUs"
    few_cpus = nodes({"CPU": 8.0}, {"CPU": 2.0, "GPU": 4.0})
    assert sized(TASK, ON_GPU, few_cpus)[1].most == 2, "the task is done on the node without GPUs"
    assert sized(TASK, ON_GPU, few_cpus, grows=True)[1].most is None, "an autoscaler is shown what is wanted"


def test_a_gpu_is_taken_where_the_cluster_has_some():
    auto = replace(MODEL, gpu_if_any=True)
    machines = nodes({"CPU": 4.0}, {"CPU": 4.0, "GPU": 2.0})
    assert sized(TASK, auto, machines, gpus=True)[1] == Pool(Need(1.0, 1.0), 1, 2)
    assert sized(TASK, auto, nodes({"CPU": 4.0}))[1] == Pool(Need(1.0), 1, None)
    with pytest.raises(MissingResourcesError, match=r"needs 1 CPU \+ 1 GPU"):
        sized(TASK, auto, machines[:1], gpus=True)
    both = sized(replace(auto, rows=16), auto, nodes({"CPU": 4.0, "GPU": 1.0}), gpus=True)
    assert [(p.need.cpus, p.need.gpus, p.most) for p in both] == [(1.0, 0.5, 1), (1.0, 0.5, 1)], (
        "two share the only one"
    )


def test_labels_and_custom_resources_bound_a_pool_to_their_nodes():
    machines = [*nodes({"CPU": 8.0}), *nodes({"CPU": 3.0, "fetcher": 2.0}, labels={"pool": "models"})]
    labelled = replace(MODEL, labels=(("pool", "models"),))
    assert sized(TASK, labelled, machines)[1].most == 3
    assert sized(TASK, replace(labelled, labels=(("pool", "!models"),)), machines)[1].most == 7
    assert sized(TASK, replace(labelled, labels=(("pool", "in(models, others)"),)), machines)[1].most == 3
    assert sized(TASK, replace(MODEL, custom=(("fetcher", 0.5),)), machines)[1].most == 3
    assert sized(TASK, replace(MODEL, memory=2**30), nodes({"CPU": 8.0, "memory": 3.5 * 2**30}))[1].most == 3


def test_what_no_node_has_is_named_with_the_stage_and_the_nodes():
    machines = nodes({"CPU": 2.0}, {"CPU": 2.0})
    with pytest.raises(MissingResourcesError) as missing:
        sized(TASK, replace(ON_GPU, labels=(("pool", "gpu"),)), machines)
    assert str(missing.value).startswith(
        "a worker of chars needs 1 CPU + 0.5 GPU + label pool=gpu, and no node of the Ray cluster has that "
        "(2 x a node: CPU 2). Add such nodes, or say in the config what it needs: engine.stages.chars"
    )
    assert "models.device: cpu" in str(missing.value)
    two = replace(TASK, gpus=1.0)
    with pytest.raises(MissingResourcesError, match="no room beside the other stages"):
        sized(two, replace(MODEL, gpus=1.0), nodes({"CPU": 4.0, "GPU": 1.0}))


def test_units_go_through_streams_of_bounded_size_and_what_a_broken_one_left_goes_into_the_next(
    monkeypatch: pytest.MonkeyPatch,
):
    machines = nodes({"CPU": 2.0})
    monkeypatch.setattr(on_ray, "wait_for_pools", lambda sizing, _: (sizing.pools(machines), machines))
    monkeypatch.setattr(on_ray, "STREAM_PAUSE_S", 0.0)
    monkeypatch.setattr(on_ray, "FEWEST_UNITS", 5)
    monkeypatch.setattr(on_ray, "MOST_UNITS", 5)
    taken: list[int] = []
    streams: list[list[int]] = []

    def source() -> Iterator[Unit]:
        for shard in range(12):
            taken.append(shard)
            yield Unit(shard, "", {})

    class Engine(on_ray.RayEngine):
        def _stream(self, job: Job, texts: Sequence[str], pools: Sequence[Pool], watch: Watch) -> Iterator[Unit]:
            units = [Unit.loads(text) for text in texts]
            streams.append([unit.shard for unit in units])
            assert len(taken) <= sum(len(set(s)) for s in streams)
            if len(streams) == 2:
                yield units[0]
                raise ray.exceptions.NodeDiedError("a node died")
            yield from units

    import ray.exceptions

    engine = Engine(Config(kind="ray"), "none")
    done = [unit.shard for unit in engine._streams(Sizing(job(TASK, MODEL)), source(), Patience(0))]
    assert sorted(done) == list(range(12))
    assert streams == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [6, 7, 8, 9, 10], [11]]
    assert engine.slots == 2


class Clock:
    """Stands in for the module `time` of a watch."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


def test_a_watch_gives_a_stream_up_for_another_size_that_lasts(monkeypatch: pytest.MonkeyPatch):
    clock = Clock()
    monkeypatch.setattr(watching, "time", clock)
    machines = nodes({"CPU": 2.0}, {"CPU": 1.0})
    sizing = Sizing(job(replace(TASK, cpus=2), replace(TASK, cpus=2, rows=32)))
    offered = machines
    watch = Watch(sizing, sizing.pools(machines), Patience(60), lambda: offered)
    stream: Any = SimpleNamespace(_topology={})

    def look_until(now: float) -> None:
        while clock.now < now:
            clock.now += 1.0
            watch.step(stream)

    look_until(4.0)
    offered = machines[1:]  # for a moment, tasks of half the CPUs would be right
    look_until(10.0)
    offered = machines
    look_until(20.0)
    offered = machines[1:]
    with pytest.raises(ResizeError):
        look_until(40.0)
    assert 30.0 <= clock.now < 36.0

    machines = nodes({"CPU": 3.0}, {"CPU": 2.0})  # tasks fit as they are, but not beside all actors that are kept
    sizing = Sizing(job(TASK, replace(MODEL, min_workers=4)))
    watch = Watch(sizing, sizing.pools(machines), Patience(60), lambda: machines[:1])
    with pytest.raises(ResizeError):
        look_until(60.0)


def test_pools_grow_onto_new_nodes_but_not_those_whose_workers_share_limits():
    machines = nodes({"CPU": 2.0}, {"CPU": 2.0, "GPU": 1.0})
    more = [*machines, *nodes({"CPU": 2.0, "GPU": 1.0})]
    for wants, bound in (({}, 4), ({"workers": 3}, 2)):
        sizing = Sizing(job(TASK, replace(ON_GPU, **wants)))
        watch = Watch(sizing, sizing.pools(machines), Patience(0))
        assert sizing.pools(machines)[1].most == 2
        assert watch._bounds(sizing.pools(more))[1].most == bound


def test_a_watch_waits_for_what_is_missing_and_no_longer(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    clock = Clock()
    monkeypatch.setattr(watching, "time", clock)
    machines = nodes({"CPU": 2.0}, {"CPU": 2.0, "GPU": 1.0})
    sizing = Sizing(job(TASK, ON_GPU))
    watch = Watch(sizing, sizing.pools(machines), Patience(100), lambda: machines[:1])
    stream: Any = SimpleNamespace(_topology={})

    def look() -> None:
        while clock.now < 200:
            clock.now += 1.0
            watch.step(stream)

    with pytest.raises(EngineError, match=r"needs 1 CPU \+ 0\.5 GPU.*waited 1\d\d s \(engine\.wait_s\)"):
        look()
    assert 100 < clock.now < 110
    assert caplog.text.count("waiting up to") == 2, "at once, and a minute later"


def test_slots_are_the_workers_that_can_be_busy_at_a_time():
    machines = nodes({"CPU": 16.0})
    assert slots(sized(TASK, MODEL, machines), machines) == 16
    assert slots(sized(TASK, MODEL, machines, workers=3), machines) == 16
    assert slots(sized(replace(TASK, cpus=4), MODEL, machines, workers=2), machines) == 2 + 3
    one = nodes({"CPU": 1.0})
    assert slots(sized(TASK, MODEL, one), one) == 2
    gpus = nodes({"CPU": 4.0}, {"CPU": 8.0, "GPU": 2.0})
    assert slots(sized(TASK, ON_GPU, gpus), gpus) == 4 + 8


def test_a_failed_stage_arrives_as_its_own_error(tmp_path: Path):
    table = write_urls(tmp_path / "urls.parquet", [f"poison {i} in this text" for i in range(100)])
    with pytest.raises(StageFailed, match="ValueError: a poisoned text"):
        refresh(config(tmp_path, table, engine={"kind": "ray", "address": "local"}), Silent())


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("127.0.0.2:1", r"cannot start or reach Ray \(127\.0\.0\.2:1\): nothing answers at 127\.0\.0\.2:1"),
        ("no-port", r"Ray refuses the settings \(no-port is not HOST:PORT\); check engine\.address"),
    ],
)
def test_an_address_without_a_cluster_is_told_soon(address: str, said: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(session, "REACH_S", 0.1)
    with pytest.raises(EngineError, match=said), open_engine(Config(kind="ray", address=address)):
        pass
