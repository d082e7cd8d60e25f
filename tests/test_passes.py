"""Forward passes: of one size, in order, in threads, and smaller where memory is short."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

from filters.clip_score import ClipScore
from pairmill.errors import EngineError
from pairmill.models import ModelRef
from pairmill.passes import Passes, full_fp32, in_passes, padded, rows_a_pass, rows_within
from pairmill.stage import Batch, ErrorBudget, apply
from schemas.reasons import Reason
from tests.filters.random_clip import write_random_clip
from tests.filters.rows import noise, pairs_table


@pytest.fixture(scope="module")
def random_clip(tmp_path_factory: pytest.TempPathFactory) -> ModelRef:
    return ModelRef(path=str(write_random_clip(tmp_path_factory.mktemp("clip"))))


class Doubling:
    """A model that doubles its inputs, remembers what it was given, and has memory for so many rows."""

    def __init__(self, memory: int) -> None:
        self.memory = memory
        self.sizes: list[int] = []
        self.threads: set[int] = set()

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        if len(inputs) > self.memory:
            raise torch.OutOfMemoryError("no memory for so many rows")
        assert torch.get_num_threads() == 1
        assert torch.is_inference_mode_enabled()
        self.sizes.append(len(inputs))
        self.threads.add(threading.get_ident())
        return inputs * 2


def number(n: int) -> torch.Tensor:
    return torch.tensor([float(n)])


def test_all_passes_have_one_size_and_results_come_in_order():
    model = Doubling(100)
    parts = Passes("cpu").run(range(23), 8, model, number)
    assert torch.cat(parts)[:, 0].tolist() == [2.0 * n for n in range(23)]
    assert model.sizes == [8, 8, 8]
    assert [len(part) for part in parts] == [8, 8, 7]
    assert threading.get_ident() not in model.threads
    assert Passes("cpu").run([], 8, model, number) == []


def test_items_without_inputs_come_as_a_list_filled_up_with_the_first():
    seen = []

    def forward(items: list[str]) -> list[str]:
        seen.append(items)
        return [item.upper() for item in items]

    assert Passes("cpu").run("abcde", 3, forward) == [["A", "B", "C"], ["D", "E"]]
    assert sorted(seen) == [["a", "b", "c"], ["d", "e", "d"]]
    assert in_passes(sum, [[1, 2], [3]], "cpu") == [3, 3]


def test_short_memory_halves_the_passes_and_the_rest_goes_on():
    model, passes = Doubling(5), Passes("cpu")
    parts = passes.run(range(23), 16, model, number)
    assert torch.cat(parts)[:, 0].tolist() == [2.0 * n for n in range(23)]
    assert set(model.sizes) == {4}
    model.sizes.clear()
    assert torch.cat(passes.run(range(9), 16, model, number))[:, 0].tolist() == [2.0 * n for n in range(9)]
    assert model.sizes == [4, 4, 4], "what did not fit once is not tried again"


def test_memory_that_runs_short_in_the_middle_keeps_what_was_done():
    class Greedy(Doubling):
        """Its later rows take more memory; which pass runs short does not depend on which thread is first."""

        def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
            if inputs.max() >= 17 and len(inputs) > 2:
                raise torch.OutOfMemoryError("no memory for so many of these")
            return super().__call__(inputs)

    model = Greedy(100)
    parts = Passes("cpu").run(range(23), 8, model, number)
    assert torch.cat(parts)[:, 0].tolist() == [2.0 * n for n in range(23)]
    assert [len(part) for part in parts] == [8, 8, 2, 2, 2, 1]


def test_one_row_that_does_not_fit_is_an_error():
    with pytest.raises(torch.OutOfMemoryError):
        Passes("cpu").run(range(3), 8, Doubling(0), number)


def test_threads_of_torch_are_as_before_even_after_errors_and_with_several_callers():
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with pytest.raises(ZeroDivisionError):
            Passes("cpu").run(range(3), 1, lambda _: 1 / 0)
        assert torch.get_num_threads() == 2
        both, released = threading.Barrier(2), threading.Event()

        def forward(items: list[int]) -> list[int]:
            both.wait(20)
            if items == [1]:
                released.wait(20)
            return items

        with ThreadPoolExecutor(2) as pool:
            slow, fast = (pool.submit(Passes("cpu").run, [n], 1, forward) for n in (1, 0))
            assert fast.result(20) == [[0]]
            released.set()
            assert slow.result(20) == [[1]]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_a_thread_that_begins_in_the_middle_of_a_pass_has_as_many_threads_as_any():
    """torch gives a new thread the number that is set at the moment, for good."""
    threads = torch.get_num_threads()
    running, begun, released = threading.Event(), threading.Event(), threading.Event()
    both = threading.Barrier(2)

    def forward(items: list[int]) -> list[int]:
        running.set()
        released.wait(20)
        return items

    def later() -> list[list[int]]:
        torch.get_num_threads()
        begun.set()
        released.wait(20)
        first.result(20)

        def side_by_side(items: list[int]) -> list[int]:
            both.wait(20)
            return items

        return Passes("cpu").run([0, 1], 1, side_by_side)

    try:
        torch.set_num_threads(2)
        with ThreadPoolExecutor(2) as pool:
            first = pool.submit(Passes("cpu").run, [0], 1, forward)
            assert running.wait(20)
            second = pool.submit(later)
            assert begun.wait(20)
            released.set()
            assert second.result(40) == [[0], [1]]
            assert pool.submit(torch.get_num_threads).result(20) == 2
    finally:
        torch.set_num_threads(threads)


def test_tf32_stays_off_as_long_as_somebody_computes():
    inside, left = threading.Event(), threading.Event()

    def longer() -> bool:
        with full_fp32():
            inside.set()
            left.wait(20)
            return bool(torch.backends.cudnn.allow_tf32)

    with ThreadPoolExecutor(1) as pool:
        with full_fp32():
            found = pool.submit(longer)
            assert inside.wait(20)
        left.set()
        assert found.result(20) is False
    assert torch.backends.cudnn.allow_tf32


def test_a_device_that_failed_is_no_rows_fault():
    def forward(items: list[int]) -> list[int]:
        raise torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered")

    with pytest.raises(EngineError, match="uncorrectable ECC"):
        Passes("cpu").run([0, 1, 2], 2, forward)


def test_a_device_too_small_to_be_measured_has_passes_of_one_row():
    def run(rows: int) -> None:
        raise torch.OutOfMemoryError("no memory for two rows")

    assert rows_a_pass("auto", "cuda", 5, run) == 1


def test_padding_copies_the_first_row():
    assert padded(torch.tensor([[1, 2], [3, 4]]), 4).tolist() == [[1, 2], [3, 4], [1, 2], [1, 2]]
    assert padded(torch.tensor([[1], [2]]), 2).tolist() == [[1], [2]]


def test_rows_on_a_cpu_are_what_suits_it_and_never_more_than_the_config_says():
    def never(rows: int) -> None:
        raise AssertionError("nothing is measured on a CPU")

    assert rows_a_pass("auto", "cpu", 5, never) == 5
    assert rows_a_pass(3, "cpu", 5, never) == 3
    assert rows_a_pass(64, "cpu", 5, never) == 5
    assert rows_a_pass(64, "cuda", 5, never) == 64


@pytest.mark.parametrize(
    ("budget", "peaks", "most", "rows"),
    [
        (1000, (20, 40), 256, 64),  # ten bytes a row: 100 rows, rounded down to a power of two
        (1000, (20, 40), 16, 16),
        (1000, (920, 940), 256, 8),  # 900 bytes whatever the rows are
        (10, (20, 40), 256, 1),  # not even one fits by this estimate; it is tried
        (1000, (20, 20), 64, 64),  # rows that take nothing beside the rest
    ],
)
def test_rows_fill_the_memory_that_a_pass_may_take(
    budget: float, peaks: tuple[float, float], most: int, rows: int
) -> None:
    assert rows_within(budget, peaks, most) == rows


# -- in a stage -------------------------------------------------------------------------------------------------------


def scores(stage: ClipScore, images: Sequence[bytes | None], spoil: Any = None) -> Any:
    table = pairs_table(images, [["photo", "a red circle"]] * len(images))
    kernel = stage.open()
    if spoil:
        spoil(kernel)
    return apply(stage, kernel, Batch(table), ErrorBudget())


def test_a_stage_gives_the_same_where_memory_holds_no_more_than_three_rows(
    random_clip: ModelRef, monkeypatch: pytest.MonkeyPatch
) -> None:
    import open_clip

    images = [noise(n) for n in range(20)]
    stage = ClipScore(random_clip, device="cpu")
    expected = scores(stage, images)
    encode, sizes = open_clip.CLIP.encode_image, []

    def short(self: Any, pixels: torch.Tensor) -> torch.Tensor:
        if len(pixels) > 3:
            raise torch.OutOfMemoryError("no memory for so many rows")
        sizes.append(len(pixels))
        return encode(self, pixels)

    monkeypatch.setattr(open_clip.CLIP, "encode_image", short)
    found = scores(stage, images)
    assert set(sizes) == {3}, "31 on a CPU for a model so narrow, halved to 15, 7 and 3"
    assert found["reason"].null_count == 20
    assert np.allclose(found["clip_score"].to_numpy(), expected["clip_score"].to_numpy(), atol=1e-6)


def test_an_image_that_cannot_be_decoded_costs_its_row_only(random_clip: ModelRef) -> None:
    images = [noise(n) for n in range(12)]
    images[7] = images[7][:200]
    stage = ClipScore(random_clip, device="cpu")
    found = scores(stage, images)
    assert [n for n, reason in enumerate(found["reason"].to_pylist()) if reason] == [7]
    assert found["reason"][7].as_py() == Reason.ERROR_KERNEL
    rest = scores(stage, [image for n, image in enumerate(images) if n != 7])
    assert [v for v in found["clip_score"].to_pylist() if v is not None] == rest["clip_score"].to_pylist()


# -- on a GPU ---------------------------------------------------------------------------------------------------------

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@on_gpu
def test_a_gpu_gives_what_a_cpu_gives(random_clip: ModelRef) -> None:
    images = [noise(n) for n in range(150)]
    gpu, cpu = (scores(ClipScore(random_clip, device=place, batch=32), images) for place in ("cuda", "cpu"))
    assert np.allclose(gpu["clip_score"].to_numpy(), cpu["clip_score"].to_numpy(), atol=1e-5)
    assert scores(ClipScore(random_clip, device="cuda", batch=32), images).equals(gpu)


@on_gpu
def test_a_gpu_out_of_memory_goes_on_with_fewer_rows() -> None:
    free, _ = torch.cuda.mem_get_info()

    def greedy(inputs: torch.Tensor) -> torch.Tensor:
        torch.empty(int(free * len(inputs) / 6), dtype=torch.uint8, device="cuda")
        return inputs * 2

    parts = Passes("cuda").run(range(50), 32, greedy, number)
    assert torch.cat(parts)[:, 0].tolist() == [2.0 * n for n in range(50)]
    assert max(len(part) for part in parts) == 4
    few = rows_a_pass(
        "auto", "cuda", 5, lambda rows: torch.empty(int(free * rows / 64), dtype=torch.uint8, device="cuda")
    )
    assert few in (8, 16)
