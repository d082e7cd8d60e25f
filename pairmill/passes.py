"""How forward passes run on a device: several one-thread passes side by side on a CPU, fed ahead of it on a GPU.

What a pass says of a row depends, to the last bit, on nothing but the row: not on the rows it came with, on their order
or on the number of threads. Every pass therefore has one fixed number of rows, the last one padded, because kernels for
other shapes add in another order; and on a CPU every pass runs on one thread, because the split of a product among
threads depends on their number (seen with ViT-B-32 at batch 7, 1 against 2 threads). Several passes run side by side
instead, which on a busy machine is also faster (3.3 s against 12.5 s for 4 passes on 2 shared cores).

On a GPU inputs are made by threads ahead of the device, copied from pinned memory on a stream of their own, and results
come back without waiting for each pass.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from pairmill.errors import EngineError

if TYPE_CHECKING:
    import torch

Item = TypeVar("Item")
Chunk = TypeVar("Chunk")
Result = TypeVar("Result")

BatchSize = int | Literal["auto"]
"""``models.batch`` of a config."""

AHEAD = 3
"""Passes whose inputs are made or ready while the device computes: one that is copied, one to follow, one in the
making."""

FEEDERS = 16
"""Threads that make a GPU's inputs, at most."""

AUTO_SHARE = 0.25
"""Of a worker's part of a GPU, for the activations of one pass: a worker may hold several models, and the allocator
keeps blocks of each."""

AUTO_MOST = 64
"""Rows of a pass on a GPU at most: a call of a stage is then several passes, so that inputs are made while it computes,
and products are large already (16,448 tokens of ViT-L-14)."""

UNMEASURED = 32
"""Rows of a pass where `BatchSize` is auto and memory is not measured."""

AUTO_PROBES = (2, 4)
"""Rows of the two passes whose memory is measured."""


class Passes:
    """Runs the passes of one model. Out of memory, it halves the rows of a pass for good and goes on with the rest.

    Rows that a smaller pass computes differ in their last bits (as between two batch sizes), nothing else.

    Args:
        device: cpu or cuda.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self._divisor = 1
        self._copying: Any = None

    def run(
        self,
        items: Sequence[Item],
        rows: int,
        forward: Callable[[Any], Any],
        prepare: Callable[[Item], torch.Tensor] | None = None,
        *,
        keep: bool = False,
    ) -> list[Any]:
        """The results of `forward` for all items, in their order, one part for each pass; in inference mode.

        Args:
            items: taken by index, in the thread that needs them, so a lazy sequence does its work there.
            rows: of each pass, as long as memory holds them.
            forward: takes a pass's inputs, always the same number of rows (copies of the first fill the last pass), and
                returns as many results: a tensor with a row for each, or a list. It must be safe to call from several
                threads at once.
            prepare: makes one item's input, a tensor on the CPU; `forward` then takes them stacked, on the device. It
                runs in threads. Without it `forward` takes the list of items.
            keep: leave tensors where `forward` made them; else they come to the CPU.

        Raises:
            torch.OutOfMemoryError: memory does not hold a pass of one row.
            EngineError: the GPU failed. That is no row's fault, and this process cannot use it any more.
        """
        import torch

        parts: list[Any] = []
        attempt = self._on_cpu if self.device == "cpu" else self._on_gpu
        while (done := sum(map(len, parts))) < len(items):
            size = max(1, rows // self._divisor)
            chunks = [range(start, min(start + size, len(items))) for start in range(done, len(items), size)]
            try:
                with torch.inference_mode(), full_fp32():
                    for result in attempt(_Work(items, chunks, size, forward, prepare), keep):
                        parts.append(result)
            except torch.OutOfMemoryError:
                if size == 1:
                    raise
                self._divisor *= 2
            except torch.AcceleratorError as error:
                raise EngineError(
                    f"the device {self.device} failed ({error}) and cannot be used any more by this process. Nothing "
                    "that was finished is lost: look at the machine (nvidia-smi, and dmesg for Xid), then run again"
                ) from error
            else:
                break
            if self.device != "cpu":
                torch.cuda.empty_cache()  # here, where no traceback holds a tensor any more
        return parts

    def _on_cpu(self, work: _Work, keep: bool) -> Iterator[Any]:  # noqa: ARG002 (tensors are where they should be)
        import torch

        def one(chunk: range) -> Any:
            with torch.inference_mode():  # holds for one thread only
                made = [work.made(n) for n in chunk]
                inputs = _filled(made, work.rows) if work.prepare is None else padded(torch.stack(made), work.rows)
                return work.forward(inputs)[: len(chunk)]

        with _one_thread_each() as pool:
            yield from pool.map(one, work.chunks)

    def _on_gpu(self, work: _Work, keep: bool) -> Iterator[Any]:
        import torch

        # one for good: the allocator keeps blocks of each stream that it has seen
        copying = self._copying = self._copying or torch.cuda.Stream()
        computing = torch.cuda.current_stream()
        ahead: deque[list[Future[Any]]] = deque()
        with _one_thread_each(min(FEEDERS, len(os.sched_getaffinity(0)))) as pool:
            try:
                for number, chunk in enumerate(work.chunks):
                    for later in work.chunks[number + len(ahead) : number + AHEAD]:
                        ahead.append([pool.submit(work.made, n) for n in later])
                    made = [future.result() for future in ahead.popleft()]
                    if work.prepare is None:
                        inputs: Any = _filled(made, work.rows)
                    else:
                        with torch.cuda.stream(copying):
                            inputs = _pinned(made).to(self.device, non_blocking=True)
                        computing.wait_stream(copying)
                        inputs.record_stream(computing)
                        inputs = padded(inputs, work.rows)
                    output = work.forward(inputs)[: len(chunk)]
                    yield output if keep else _on_its_way(output)
            finally:
                torch.cuda.synchronize()  # the only wait for the device


@dataclass(frozen=True)
class _Work:
    """What `Passes.run` was asked for."""

    items: Sequence[Any]
    chunks: Sequence[range]
    """Of each pass, which items."""
    rows: int
    forward: Callable[[Any], Any]
    prepare: Callable[[Any], torch.Tensor] | None

    def made(self, number: int) -> Any:
        """The input of one item."""
        item = self.items[number]
        return item if self.prepare is None else self.prepare(item)


def in_passes(forward: Callable[[Chunk], Result], chunks: Sequence[Chunk], device: str) -> list[Result]:
    """`forward` of each chunk, in their order and in inference mode, for models whose inputs are no rows of one shape.

    On a CPU each call runs on one thread, as many of them side by side as torch has threads; `forward` must be safe to
    call so.
    """
    return [part[0] for part in Passes(device).run(chunks, 1, lambda some: [forward(some[0])], keep=True)]


def side_by_side(device: str) -> int:
    """Passes that run at a time: a device has one, a CPU as many as torch has threads."""
    import torch

    return torch.get_num_threads() if device == "cpu" else 1


def finite(outputs: torch.Tensor) -> torch.Tensor:
    """What a model made, as it is.

    Raises:
        FloatingPointError: some of it is no number or infinite, from which false scores would come without a word.
    """
    if not bool(outputs.isfinite().all()):
        raise FloatingPointError(
            "the model's outputs are not finite: its weights are damaged, or it overflows in this precision"
        )
    return outputs


def padded(inputs: torch.Tensor, rows: int) -> torch.Tensor:
    """Exactly so many rows: copies of the first row are added."""
    import torch

    missing = rows - len(inputs)
    return torch.cat([inputs, inputs[:1].expand(missing, *inputs.shape[1:])]) if missing else inputs


def rows_a_pass(
    batch: BatchSize,
    device: str,
    on_cpu: int,
    run: Callable[[int], object],
    share: float = 1.0,
    most: int = AUTO_MOST,
) -> int:
    """Rows of a forward pass: on a CPU `on_cpu`, on a GPU as many as it holds, and never more than `batch` says.

    On a GPU the memory of two small passes is measured and extrapolated, `AUTO_SHARE` of the worker's part of the
    device is filled, and the result is a power of two; one where memory does not hold those. It is the same on equal
    hardware: neither what others have taken of the device at the moment nor the number of workers counts.

    Args:
        batch: ``models.batch`` of a config: rows on a GPU, and at most on a CPU; or auto.
        device: cpu or cuda.
        on_cpu: rows on a CPU, where bigger passes are no faster and are padded more.
        run: a whole pass of so many rows, the inputs on the device.
        share: the worker's part of the device: the GPUs that it has booked, where that is less than one.
        most: rows at most.
    """
    if device == "cpu":
        return on_cpu if batch == "auto" else min(batch, on_cpu)
    if batch != "auto":
        return batch
    import torch

    try:
        few, more = (_peak_bytes(run, rows) for rows in AUTO_PROBES)
    except torch.OutOfMemoryError:
        return 1
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return rows_within(total * min(1.0, share) * AUTO_SHARE, (few, more), most)


def fixed_rows(batch: BatchSize) -> int:
    """Rows of a forward pass of models whose passes are not measured: `batch`, or 32 where it is auto."""
    return UNMEASURED if batch == "auto" else batch


def rows_within(budget: float, peaks: tuple[float, float], most: int) -> int:
    """Rows whose pass stays within a budget: a power of two, not above `most`, and 1 at least.

    Args:
        budget: bytes.
        peaks: bytes that passes of `AUTO_PROBES` rows took; more rows take proportionally more.
    """
    few, more = peaks
    a_row = (more - few) / (AUTO_PROBES[1] - AUTO_PROBES[0])
    fixed = max(0.0, few - a_row * AUTO_PROBES[0])
    limit = int(min(most, (budget - fixed) / a_row if a_row > 0 else most))
    return 1 << (limit.bit_length() - 1) if limit > 1 else 1


class _FullFp32:
    """cuDNN's flags are those of the process: set by whoever runs passes first, and restored by the last."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._before = contextlib.ExitStack()

    def take(self) -> None:
        """Switch TF32 off."""
        import torch

        with self._lock:
            if self._users == 0:
                self._before.enter_context(torch.backends.cudnn.flags(enabled=True, allow_tf32=False))
            self._users += 1

    def give_back(self) -> None:
        """Restore what was set when nobody is left."""
        with self._lock:
            self._users -= 1
            if self._users == 0:
                self._before.close()


_full_fp32 = _FullFp32()


@contextlib.contextmanager
def full_fp32() -> Iterator[None]:
    """fp32 means fp32: cuDNN would otherwise run convolutions (the patch embedding) in TF32. Several threads may be in
    it at a time."""
    _full_fp32.take()
    try:
        yield
    finally:
        _full_fp32.give_back()


def _peak_bytes(run: Callable[[int], object], rows: int) -> int:
    """Bytes that a pass takes beyond what is allocated before it."""
    import torch

    with torch.inference_mode(), full_fp32():
        run(rows)  # workspaces of libraries are made once and no part of what a row costs
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run(rows)
    return int(torch.cuda.max_memory_allocated()) - before


class _Threads:
    """torch's number of threads, taken down to one by whoever runs passes at the moment and restored by the last."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._before = 0

    def take(self) -> int:
        """The number before it was taken down: that of a new thread, since the caller may be one that began while it
        was down, and keeps that."""
        import torch

        with self._lock:
            if self._users == 0:
                with ThreadPoolExecutor(1) as new:
                    self._before = new.submit(torch.get_num_threads).result()
            self._users += 1
            return self._before

    def give_back(self) -> None:
        """Restore it when nobody is left who needs one."""
        import torch

        with self._lock:
            self._users -= 1
            if self._users == 0:
                torch.set_num_threads(self._before)  # in part the setting is one of the whole process


_threads = _Threads()


@contextlib.contextmanager
def _one_thread_each(count: int | None = None) -> Iterator[ThreadPoolExecutor]:
    """A pool of so many threads, by default as many as torch has, in each of which torch computes on one thread."""
    import torch

    threads = _threads.take()
    pool = ThreadPoolExecutor(count or threads, "pairmill-pass", torch.set_num_threads, (1,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        _threads.give_back()


def _filled(items: list[Any], rows: int) -> list[Any]:
    """So many items: the first again and again after the last."""
    return items + items[:1] * (rows - len(items))


def _pinned(made: list[torch.Tensor]) -> torch.Tensor:
    """Tensors of one shape stacked in memory that a GPU can copy by itself."""
    import torch

    buffer = torch.empty((len(made), *made[0].shape), dtype=made[0].dtype, pin_memory=True)
    return torch.stack(made, out=buffer)


def _on_its_way(output: Any) -> Any:
    """A tensor whose copy to the CPU has begun; anything else as it is."""
    import torch

    if not isinstance(output, torch.Tensor):
        return output
    host = torch.empty(output.shape, dtype=output.dtype, pin_memory=True)
    return host.copy_(output, non_blocking=True)
