"""The pool of servers: who is ejected and for how long, and what it is to be alone there."""

import asyncio
import random

import pytest

from batch_client.endpoint import EJECT_AFTER, EJECT_MOST_SECONDS, Pool
from batch_client.errors import MismatchError, ServingError
from batch_client.events import ServerAway, ServerBack, ServerJoined, ServerLeftOut
from batch_client.tokens import NoTokenError
from support.simulated import URL


class Clock:
    """Stands still unless it is set."""

    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def pool(clock):
    return Pool(("http://a", "http://b"), 4, clock, random.Random(1))


def test_a_success_ends_a_row_of_breaks(pool, clock):
    endpoint = pool.endpoints[0]
    for _ in range(3):
        for _ in range(EJECT_AFTER - 1):
            pool.broke(endpoint, clock.now, "reset")
        pool.answered(endpoint, clock.now, 1, 0.0, 0.0, 1)
    assert endpoint.ejections == 0
    endpoint.in_flight = 1
    assert endpoint.has_room(clock.now)


def test_a_request_that_is_late_cuts_the_limit_and_is_a_break(pool, clock):
    endpoint = pool.endpoints[0]
    pool.late(endpoint, clock.now - 300, "no answer came in time")
    assert endpoint.limiter.limit == 2
    assert endpoint.broken == 1


def test_an_ejection_doubles_up_to_half_a_minute(pool, clock):
    endpoint, pauses = pool.endpoints[0], []
    for _ in range(EJECT_AFTER + 7):
        pool.broke(endpoint, clock.now, "reset")
        pauses.append(max(endpoint.rests_until - clock.now, 0.0))
        clock.now += pauses[-1]
    assert pauses == [0, 0, 1, 2, 4, 8, 16, *[EJECT_MOST_SECONDS] * 3]


async def test_who_is_alone_waits_for_those_who_were_there_before(pool):
    entered = asyncio.Event()

    async def alone():
        async with pool.alone() as room, room():
            entered.set()

    async with pool.room():
        task = asyncio.create_task(alone())
        for _ in range(5):  # as often as it can go on before it waits
            await asyncio.sleep(0)
        assert not entered.is_set()
    await asyncio.wait_for(task, 10)
    assert entered.is_set()


def test_who_is_left_out_is_told_once_and_the_last_one_by_its_error(pool):
    first, second = pool.endpoints
    said = []
    pool.leave_out(first, ServingError("http://a: gone"))
    pool.tell(said.append)  # by who does not ask again, as a plan
    assert said == [ServerLeftOut("http://a", "http://a: gone")]
    pool.leave_out(first, ServingError("http://a: a request that was under way"))
    assert len(said) == 1
    pool.leave_out(second, ServingError("http://b: gone"))
    assert len(said) == 1
    assert str(first.left_out) == "http://a: gone"
    assert str(second.left_out) == "http://b: gone"


def test_who_is_left_out_in_the_middle_is_told(pool):
    said = []
    pool.tell(said.append, asks_again=True)
    assert said == []
    pool.leave_out(pool.endpoints[1], ServingError("http://b: gone"))
    assert said == [ServerLeftOut("http://b", "http://b: gone", asked_again=True)]


async def test_who_is_taken_back_is_as_new_and_who_has_another_model_is_out_for_good(pool, clock):
    said = []
    pool.tell(said.append, asks_again=True)
    second = pool.endpoints[1]
    second.shared_outputs = False
    second.broken, second.rests_until = EJECT_AFTER, clock.now + 1e6
    pool.leave_out(second, ServingError("http://b: gone"))
    clock.now += 60
    pool.take_back(second)
    assert said[1:] == [ServerJoined("http://b", 60, sum(one.limiter.most for one in pool.endpoints))]
    assert second.has_room(clock.now)
    assert second.shared_outputs
    pool.leave_out(second, NoTokenError("http://b: no token"))
    assert second.is_absent
    pool.leave_out(second, MismatchError("http://b: another model"))
    pool.leave_out(second, ServingError("http://b: gone"))
    assert said[3:] == [ServerLeftOut("http://b", "http://b: another model")]
    assert not second.is_absent


def test_a_server_that_breaks_for_more_than_a_moment_is_told_once_and_so_is_its_return(pool, clock):
    said = []
    pool.tell(said.append)
    first = pool.endpoints[0]

    def break_again():
        for _ in range(EJECT_AFTER):
            pool.broke(first, clock.now, "the connection broke: reset")
        clock.now = first.rests_until

    def answer():
        pool.answered(first, clock.now, 1, 0.0, 0.0, 1)

    break_again()
    answer()
    assert said == []  # a second
    began = clock.now
    for _ in range(4):
        break_again()
    assert said == [ServerAway("http://a", "the connection broke: reset")]
    away = clock.now - began
    answer()
    answer()
    assert said[1:] == [ServerBack("http://a", away)]
    assert away > 3


def test_a_success_forgets_the_refusals_before_it():
    now = [0.0]
    pool = Pool((URL,), 4, lambda: now[0], random.Random(1))
    endpoint = pool.endpoints[0]
    assert pool.refused(endpoint, 0.0) == 0
    pool.answered(endpoint, 0.0, 1, 0.0, 0.0, 1)
    now[0] = 3600.0
    assert pool.refused(endpoint, now[0]) == 0


def test_one_burst_of_resets_is_one_ejection():
    pool = Pool((URL,), 8, lambda: 10.0, random.Random(1))
    endpoint = pool.endpoints[0]
    for _ in range(EJECT_AFTER + 8):
        pool.broke(endpoint, 9.0, "reset")
    assert endpoint.ejections == 1
