"""A team of threads that each make one call of a compiled function.

In: a compiled function of one address (a ctypes function), the block of memory it is called with,
the number of threads. Out: when `run` returns, every call has returned. The function shares its
work out among however many of the calls really start, so a thread that is late is not waited for.

Where torch computes with OpenMP the team is torch's own: its threads are awake right after a torch
operation, and a second pool would compete with their waiting. Elsewhere, and in a forked child,
where OpenMP's threads are gone, it is a pool of our own. Any number of threads may call `run`.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch

Function = Any  # ctypes function taking one address; a call releases the GIL


def run(function: Function, arguments: bytes, threads: int) -> None:
    """Call function(arguments) on up to `threads` threads, this one among them."""
    if threads <= 1:
        function(arguments)
        return
    openmp = _openmp() if not _forked else None
    if openmp is not None:
        openmp(function, arguments, threads, 0)
    else:
        _pool.run(lambda: function(arguments), threads)


@cache
def _openmp() -> Callable[..., None] | None:
    """GOMP_parallel(function, argument, threads, flags) of the OpenMP that torch is linked to."""
    for library in sorted((Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*")):
        try:
            entry = ctypes.CDLL(str(library)).GOMP_parallel  # also found in what it links to
        except (OSError, AttributeError):
            continue
        entry.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        entry.restype = None
        return entry
    return None


class _Job:
    """One run: workers join it until its caller, who works too, finds nothing left to do."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._work = work
        self._changed = threading.Condition(threading.Lock())
        self._closed, self._active = False, 0

    def join(self) -> None:
        """What a worker does."""
        with self._changed:
            if self._closed:
                return
            self._active += 1
        try:
            self._work()
        finally:
            with self._changed:
                self._active -= 1
                self._changed.notify()

    def lead(self) -> None:
        """What the caller does."""
        try:
            self._work()
        finally:
            with self._changed:
                self._closed = True
                self._changed.wait_for(lambda: self._active == 0)


class Pool:
    """Workers that live as long as the process, as many as were ever asked for."""

    def __init__(self) -> None:
        self._jobs: SimpleQueue[_Job] = SimpleQueue()
        self._lock = threading.Lock()
        self._workers = 0

    def run(self, work: Callable[[], None], threads: int) -> None:
        with self._lock:
            while self._workers < threads - 1:
                threading.Thread(target=self._serve, daemon=True, name="flexattn").start()
                self._workers += 1
        job = _Job(work)
        for _ in range(threads - 1):
            self._jobs.put(job)
        job.lead()

    def _serve(self) -> None:
        while True:
            self._jobs.get().join()


_pool = Pool()
_forked = False


def _after_fork() -> None:
    """In the child no other thread exists: begin anew."""
    global _pool, _forked
    _pool, _forked = Pool(), True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
