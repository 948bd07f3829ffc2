"""Tasks run in order, a bounded number ahead, and their errors surface."""

import threading

import pytest

from neighborlm.callbacks.background import Background


def test_order():
    done: list[int] = []
    background = Background()
    for i in range(20):
        background.submit(done.append, i)
    background.drain()
    assert done == list(range(20))


def test_errors_surface():
    background = Background()
    background.submit(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        background.drain()


def test_submit_waits_when_enough_are_ahead():
    gate, background = threading.Event(), Background(ahead=2)
    background.submit(gate.wait)
    background.submit(int)
    third = threading.Thread(target=background.submit, args=(int,))
    third.start()
    third.join(timeout=0.2)
    waits = third.is_alive()
    gate.set()
    assert waits
    third.join(timeout=10)
    assert not third.is_alive()
    background.drain()


def test_a_later_submit_raises_and_the_rest_is_done_all_the_same():
    done, background = [], Background(ahead=1)
    background.submit(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        background.submit(done.append, 1)
    background.submit(done.append, 2)
    background.drain()
    background.drain()
    assert done == [2]


def test_tasks_share_one_thread_that_is_not_the_callers():
    threads, background = [], Background(ahead=5)
    for _ in range(12):
        background.submit(lambda: threads.append(threading.get_ident()))
    background.drain()
    assert len(set(threads)) == 1
    assert threading.get_ident() not in threads
