"""Many payloads or tensors: several at once, their results in order, and how far it is."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

Progress = Callable[[int, int], None]  # weights done, weights in all
WORKERS = min(os.cpu_count() or 1, 8)
AHEAD = 1 << 27  # weights that are worked on or wait at one time; what codecs need is a small multiple in bytes


def in_order(
    work: Callable[[Item], Result],
    items: Iterable[Item],
    weights: Callable[[Item], int],
    worth: int,
    workers: int | None = None,
) -> Iterator[Result]:
    """Do work on items in threads and yield the results in the items' order.

    At most `AHEAD` weights are ahead of the consumer, or one item. Items are made in the consumer's thread; an error
    of the work comes where its result would. A consumer that stops early, or Ctrl-C, ends the threads.

    Args:
        worth: from how many weights on an item is worth a thread, which costs some 50 microseconds, and more where the
            work is short calls between which it waits for the interpreter.
        workers: threads; None stands for `WORKERS`.
    """
    workers = workers or WORKERS
    if workers == 1:
        yield from map(work, items)
        return
    ahead = 0
    waiting: deque[tuple[Future[Result], int]] = deque()
    pool = ThreadPoolExecutor(workers, "maskpack")
    try:
        for item in items:
            size = weights(item)
            if size < worth and not waiting:
                yield work(item)
                continue
            while waiting and (ahead + size > AHEAD or len(waiting) >= 2 * workers):
                first, its_size = waiting.popleft()
                yield first.result()
                ahead -= its_size
            waiting.append((pool.submit(work, item), size))
            ahead += size
            del item
        while waiting:
            yield waiting.popleft()[0].result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def counted(progress: Progress | None, totals: Iterable[int]) -> Callable[[int], None]:
    """Return a function that takes weights just done and tells `progress`; totals are only summed if there is one."""
    if progress is None:
        return lambda weights: None
    done, total = 0, sum(totals)

    def step(weights: int) -> None:
        nonlocal done
        done += weights
        progress(done, total)

    return step
