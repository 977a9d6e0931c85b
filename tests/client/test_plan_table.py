"""What `plan` prints of a plan and a forecast."""

import pytest

from batch_client import api
from batch_client.calibrate import Calibration
from batch_client.cli import main
from batch_client.cli.plan import _cost, _figures, _shown
from batch_client.forecast import Forecast, Prices
from batch_client.spec import Records
from support.plans import plan_of, spec


@pytest.mark.parametrize(("options", "largest", "tail"), [
    ({"records": Records(0, 1)}, 1, 1),
    ({"chunk_records": 100, "request_records": 128}, 100, 100),  # whole micro-batches, cut at the output chunk's end
    ({"chunk_records": 500, "request_records": 64}, 64, 64),
])
def test_a_request_has_no_more_records_than_there_are(options, largest, tail):
    plan = plan_of(**options)
    found = _figures(plan)
    assert found["request_records"] == largest == max(
        span.stop - span.start for unit in plan.units() for span in plan.requests(unit.start, unit.stop))
    assert found["tail_request_records"] == tail
    assert found["bytes_a_request"] == largest * 28 * 28


def test_bytes_to_read_are_said_to_be_decoded():
    assert _figures(plan_of())["decoded_bytes_to_read"] == 1000 * 28 * 28


@pytest.mark.parametrize(("value", "wanted"), [
    ([0.0012345, 0.0001, 0.5], "0.0012  (95 %: 0.0001 to 0.5)"),
    ([0.0, 0.999, 1.0], "0  (95 %: 1 to 1.00)"),
    ([2.5, 2.345, 1234.5], "2.50  (95 %: 2.35 to 1,234)"),
])
def test_what_is_below_one_keeps_two_digits(value, wanted):
    assert _shown(value) == wanted


def test_a_small_cost_is_not_rounded_to_nothing():
    cost = _cost(plan_of(count=10, chunk=10), Prices(thousand_puts=0.005), None, spec())["cost_of_requests"]
    assert cost == pytest.approx(0.005 * (2 + 1 / 64) / 1000, rel=1e-5)  # two objects and a share of a segment


@pytest.mark.parametrize(("seconds", "is_known"), [(0.035, False), (20.1, True)])
def test_what_was_scored_in_no_time_is_not_forecast_from(seconds, is_known, monkeypatch, capsys):
    async def calibrated(*_):
        return Calibration(plan_of(), Forecast(10, 300.0, seconds, seconds / 300, seconds * 80), 10, 0, (), seconds, 1)

    monkeypatch.setattr(api, "calibrate", calibrated)
    assert main(["plan", "in", "out", "--endpoint", "http://a:1", "--model", "m", "--calibrate",
                 "--price-per-hour", "1"]) == 0
    shown = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    unknown = "unknown: too few answers, or too short a time, to forecast from"
    assert [shown[name].strip() == unknown for name in ("seconds", "records per s", "cost")] == [not is_known] * 3
