"""Seconds per call of several contenders, taken in turns.

A kernel on a GPU may take 10 us, less than Python takes to ask for it. So the calls of a contender are captured into a
CUDA graph once and replayed between two events. It goes through several copies of its input, together far larger than
the cache, as a model goes through its layers. What cannot be captured (because it waits for the GPU in between, say) is
called one after the other between two events, and said so.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from fourbit.bench.run import Samples

__all__ = ["copies_beyond", "peak_bytes", "reset_peak", "stopwatch", "synchronize", "take_turns"]

Calls = Sequence[Callable[[], Any]]
MOST_COPIES = 24


def copies_beyond(device: str, size_bytes: int) -> int:
    """How many inputs of a size are together at least four times the cache of a device; 2 on a CPU, where this is only
    tried out."""
    if device != "cuda":
        return 2
    cache: int = torch.cuda.get_device_properties(0).L2_cache_size
    return min(MOST_COPIES, 4 * cache // max(size_bytes, 1) + 2)


def synchronize(device: str) -> None:
    """Wait until the device has done what it was asked."""
    if device == "cuda":
        torch.cuda.synchronize()


def reset_peak(device: str) -> None:
    """Begin anew to watch for the most memory held."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_bytes(device: str) -> int:
    """The most that torch's allocator held since `reset_peak`; 0 on a CPU."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else 0


def stopwatch(device: str, call: Callable[[], Any]) -> float:
    """Seconds of one call, from an idle device to an idle device."""
    synchronize(device)
    started = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - started


def take_turns(
    contenders: Mapping[str, Callable[[], Calls]],
    *,
    device: str,
    samples: int,
    note: Callable[[str], None],
    check: Callable[[Any], float] | None = None,
) -> dict[str, Samples]:
    """Time the calls of each contender.

    Args:
        contenders: name -> makes its calls, one per copy of its input. One that raises, then or when called, is left
            out with a note.
        check: a number from what the first call returns.

    Returns:
        by name, `samples` times seconds per call.
    """
    running: dict[str, Callable[[], float]] = {}
    taken: dict[str, Samples] = {}
    for name, prepare in contenders.items():
        try:
            calls = prepare()
            first = calls[0]()
            taken[name] = Samples(check=check(first) if check else None)
            del first
            running[name] = _sampler(calls, device, name, note)
        except Exception as error:
            taken.pop(name, None)
            note(f"{name} is left out: {type(error).__name__}: {_first_line(error)}")
    for name in list(running):
        running[name]()  # the first replay of a graph uploads it
    for _ in range(samples):
        for name, sample in running.items():
            taken[name].seconds.append(sample())
    return taken


def _sampler(calls: Calls, device: str, name: str, note: Callable[[str], None]) -> Callable[[], float]:
    """A function that makes all calls once and gives seconds per call."""

    def in_turn() -> None:
        for call in calls:
            call()

    if device != "cuda":
        return lambda: stopwatch(device, in_turn) / len(calls)
    in_turn()
    try:
        graph = _captured(in_turn)
    except Exception as error:
        torch.cuda.synchronize()
        note(f"{name} cannot be captured into a graph, so its calls are timed with Python's own: {_first_line(error)}")
        return lambda: _between_events(in_turn) / len(calls)
    return lambda: _between_events(graph.replay) / len(calls)


def _captured(work: Callable[[], None]) -> Any:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


def _between_events(work: Callable[[], None]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    work()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no reason given"])[0][:200]
