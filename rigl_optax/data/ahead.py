"""Batches that are made ahead of the loop that takes them."""

import collections
import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


@contextlib.contextmanager
def ahead(make: Callable[[int], T], first: int, end: int, depth: int = 2) -> Iterator[Iterator[T]]:
    """`make(first)`, ..., `make(end - 1)` in order, each begun before it is asked for.

    Since a batch is a function of its step, any number of threads can make any of them, and there
    is nothing to save or restore. What `make` raises, the loop gets when it comes to that step.

    Args:
      make: Called on other threads, several at once.
      first: Where to begin.
      end: One after the last.
      depth: How many are being made, or are ready and not taken.

    Yields:
      An iterator. On leaving, what has not been begun never is, and the rest is waited for.
    """
    pool = ThreadPoolExecutor(depth, thread_name_prefix="ahead")
    steps = iter(range(first, end))
    waiting: collections.deque[Future[T]] = collections.deque()

    def begin() -> None:
        for step in steps:
            waiting.append(pool.submit(make, step))
            return

    def taken() -> Iterator[T]:
        for _ in range(depth):
            begin()
        while waiting:
            made = waiting.popleft().result()
            begin()
            yield made

    try:
        yield taken()
    finally:
        pool.shutdown(cancel_futures=True)
