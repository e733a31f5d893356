"""A lock that is handed on in the order of asking."""

from __future__ import annotations

import threading
import time

from actors.router.turns import FairLock

WAIT_S = 10.0


def until(what: int, lock: FairLock) -> None:
    deadline = time.monotonic() + WAIT_S
    while lock.num_waiting < what:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_who_has_waited_longest_comes_next_and_who_comes_back_comes_last() -> None:
    lock, order, all_wait = FairLock(), [], threading.Event()

    def use(name: int, times: int = 1) -> None:
        for _ in range(times):
            with lock:
                order.append(name)
                if name == 0 and len(order) == 1:
                    assert all_wait.wait(WAIT_S)

    threads = [threading.Thread(target=use, args=(0, 2), daemon=True)]
    threads[0].start()
    while not order:
        time.sleep(0.001)
    for name in (1, 2, 3):
        threads.append(threading.Thread(target=use, args=(name,), daemon=True))
        threads[-1].start()
        until(name, lock)
    all_wait.set()
    for thread in threads:
        thread.join(WAIT_S)
    assert order == [0, 1, 2, 3, 0]


def test_it_is_free_again_after_an_error() -> None:
    lock = FairLock()
    try:
        with lock:
            raise ValueError
    except ValueError:
        pass
    with lock:
        assert lock.num_waiting == 0
