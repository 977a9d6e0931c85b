"""The limiter, alone and against a simulated TorchServe on a virtual clock."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batch_client.limiter import BEGIN, OWN_COMPUTE, OWN_TRANSIT, REQUEST_SECONDS, Limiter
from support.queueing import BulkClient, QueueingServer

TRANSIT = 0.004


class Fixed:
    """As many as ever."""

    def __init__(self, limit):
        self.limit = limit

    def answered(self, *_):
        pass

    def overloaded(self, *_):
        pass


def measured(limiter, workers, compute, transit=TRANSIT, seed=0):
    """Requests a second and requests in flight, once it has settled."""
    client = BulkClient(QueueingServer(workers, compute, transit, seed=seed), limiter)
    client.server.run(60 * max(compute, 0.01))
    return client.measure(4000 / workers * compute)


@pytest.mark.parametrize("compute", [0.1, 1.0, 20.0])
@pytest.mark.parametrize("workers", [1, 2, 3, 4, 8, 12, 16])
def test_a_server_is_kept_busy_with_few_requests_waiting(workers, compute):
    saturated, _ = measured(Fixed(9 * workers), workers, compute)
    found, in_flight = measured(Limiter(64), workers, compute)
    assert found >= 0.97 * saturated
    # The rule it replaces, a full server batch for each worker and one more, holds 8 * workers + 8.
    assert workers < in_flight <= 2 * workers + 2


@pytest.mark.parametrize("compute", [0.005, 0.01])
@pytest.mark.parametrize("workers", [1, 2])
def test_requests_as_short_as_their_way_are_sent_ahead(workers, compute):
    saturated, _ = measured(Fixed(32 * workers), workers, compute)
    found, in_flight = measured(Limiter(64), workers, compute)
    assert found >= 0.95 * saturated
    assert in_flight <= 16 * workers


def test_a_far_server_is_kept_busy():
    saturated, _ = measured(Fixed(100), 2, 0.1, transit=0.2)
    found, _ = measured(Limiter(64), 2, 0.1, transit=0.2)
    assert found >= 0.97 * saturated


def test_a_server_that_tells_no_times_is_kept_busy():
    class Silent(Limiter):
        def answered(self, now, sent_at, in_flight, records, compute, before, place):
            del compute, before
            super().answered(now, sent_at, in_flight, records, 0.0, 0.0, place)

    saturated, _ = measured(Fixed(100), 4, 0.1)
    found, _ = measured(Silent(64), 4, 0.1)
    assert found >= 0.97 * saturated


def test_the_negative_control_a_fixed_number_is_too_few_for_many_workers():
    saturated, _ = measured(Fixed(144), 16, 0.1)
    found, _ = measured(Fixed(8), 16, 0.1)
    assert found < 0.6 * saturated


def test_workers_that_come_and_go_are_followed():
    client = BulkClient(QueueingServer(2, 0.1, TRANSIT), Limiter(64))
    client.server.run(30)
    few, _ = client.measure(60)
    client.server.set_workers(8)
    client.server.run(30)
    many, held = client.measure(60)
    assert many >= 3.8 * few
    assert held > 8
    client.server.set_workers(1)
    client.server.run(60)
    _, held = client.measure(60)
    assert held <= 4


def test_it_recovers_from_an_outage():
    client = BulkClient(QueueingServer(4, 0.1, TRANSIT), Limiter(64))
    client.server.run(30)
    before, _ = client.measure(60)
    client.server.set_workers(0)
    client.server.run(120)
    client.server.set_workers(4)
    client.server.run(30)
    after, held = client.measure(60)
    assert after >= 0.97 * before
    assert held <= 10


def test_a_short_queue_is_respected():
    client = BulkClient(QueueingServer(2, 0.1, TRANSIT, room=2), Limiter(64))
    client.server.run(60)
    done, refused = client.server.done, client.server.turned_away
    rate, _ = client.measure(120)
    assert rate >= 0.9 * 2 / 0.1
    assert client.server.turned_away - refused < 0.1 * (client.server.done - done)


def test_clients_beside_each_other_share_a_server_without_flooding_it():
    server = QueueingServer(2, 0.1, TRANSIT, room=64)
    clients = []
    for _ in range(4):
        clients.append(BulkClient(server, Limiter(32)))
        server.run(30)
    rate, _ = clients[0].measure(120)
    assert rate >= 0.97 * 2 / 0.1
    assert server.turned_away < 0.02 * server.done
    assert all(client.limiter.limit >= 1 for client in clients)


@pytest.mark.parametrize(("told", "wanted"), [(True, range(2, 4)), (False, range(5, 33))])
def test_the_way_is_learned_from_the_last_of_a_server_batch(told, wanted):
    """One worker that computes all there are together: no request is ever alone, and only the last shows the way."""
    limiter = Limiter(32)
    for time in range(0, 1000, 10):
        for place in range(count := limiter.limit):
            limiter.answered(time + 0.004 + 0.1 * count, time, count, 100, 0.1, 0.1 * place * told, place + 1)
    assert limiter.limit in wanted


def test_what_was_not_held_back_by_the_limit_does_not_move_it():
    limiter = Limiter(32)
    for time in range(100):
        limiter.answered(time + 0.1, time, 2, 1000, 0.1, 0.0, 2)
        limiter.answered(time + 9.9, time, 2, 1000, 0.1, 0.0, 2)
    assert limiter.limit == BEGIN


def test_a_small_request_says_nothing_of_large_ones():
    limiter = Limiter(32)
    for time in range(50):
        limiter.answered(time + 0.3, time, 99, 1000, 0.1, 0.0, 99)
    held = limiter.limit
    for time in range(50, 90):
        limiter.answered(time + 0.3, time, 99, 10, 0.001, 0.0, 99)
    assert limiter.limit == held


def test_a_burst_of_refusals_cuts_once_and_answers_grow_it_back_by_one_a_round():
    limiter = Limiter(16)
    for time in range(40):
        limiter.answered(time + 0.1, time, 16, 1000, 0.1, 0.0, 16)
    assert limiter.limit == 16
    for _ in range(10):
        limiter.overloaded(now=100.0, sent_at=99.5)
    assert limiter.limit == 11
    limiter.overloaded(now=102.0, sent_at=101.5)
    assert limiter.limit == 7
    for time in range(7):
        limiter.answered(200.1 + time, 200.0 + time, 16, 1000, 0.1, 0.0, 16)
    assert limiter.limit in (7, 8)
    for time in range(400):
        limiter.answered(300.1 + time, 300.0 + time, 16, 1000, 0.1, 0.0, 16)
    assert limiter.limit == 16


def test_the_limit_stays_within_half_of_what_can_be_answered_in_time():
    limiter = Limiter(32)
    for place in range(1, 5):  # a burst, at one worker
        limiter.answered(40.0 * place, 0.0, 5 - place, 100, 0.0, 0.0, place)
    assert limiter.limit == 3
    for time in range(160, 4000, 40):
        limiter.answered(time + 120, time, 3, 100, 0.0, 0.0, 3)
        assert limiter.limit * 40 <= REQUEST_SECONDS / 2
    for time in range(4000, 8000, 40):  # and at sixteen
        limiter.answered(time + 40, time, 32, 100, 0.0, 0.0, 32)
    assert limiter.limit == 32


@pytest.mark.parametrize(("seconds", "begins"), [(0.1, BEGIN), (30.0, BEGIN), (60.0, 2), (90.0, 1), (900.0, 1)])
def test_it_begins_with_what_one_worker_answers_in_time(seconds, begins):
    limiter = Limiter(32)
    limiter.expect(seconds)
    assert limiter.limit == begins


times = st.floats(0, 1e4)
answers = st.tuples(st.booleans(), times, st.integers(0, 100), st.integers(1, 10**6), times, times)


@given(st.lists(answers, max_size=200), st.integers(1, 64))
def test_the_limit_stays_between_one_and_the_most_and_never_stays_at_one(steps, most):
    limiter, now = Limiter(most), 0.0
    for good, seconds, in_flight, records, compute, before in steps:
        now += seconds
        if good:
            limiter.answered(now, now - seconds, in_flight, records, compute, before, max(1, in_flight))
        else:
            limiter.overloaded(now, now - seconds)
        assert 1 <= limiter.limit <= most
    for _ in range(3):
        now += 10
        limiter.answered(now, now - 9, limiter.limit, 10**6, 9.0, 0.0, limiter.limit)
    assert limiter.limit >= min(most, 2)


@settings(max_examples=25)
@given(st.integers(1, 16), st.floats(0.05, 5), st.integers(1, 16), st.floats(0, 0.4), st.integers(0, 999))
def test_any_server_is_kept_busy(workers, compute, batch, noise, seed):
    def rate(limiter):
        server = QueueingServer(workers, compute, TRANSIT, batch=batch, noise=noise, seed=seed)
        client = BulkClient(server, limiter)
        server.run(100 * compute)
        return client.measure(3000 / workers * compute)

    found, in_flight = rate(Limiter(64))
    assert found * compute >= 0.93 * workers * (compute / (compute + TRANSIT / 2))
    # Where the rule rests: as much as is served and one more. A way takes TRANSIT and the server's delay.
    rests = 1 + OWN_COMPUTE * workers + OWN_TRANSIT * workers * (TRANSIT + 0.001) / compute
    # Large server batches of short requests that never vary are answered in step: the limit swings about that place.
    assert in_flight <= 1.35 * rests + 2
