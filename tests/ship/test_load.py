"""The load generator, on servers that are functions with known times."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from vss.cli.main import app
from vss.core.errors import VssError
from vss.core.files import read_json
from vss.ship import load as client
from vss.ship import load as load_module
from vss.ship.load import Trace, drive, perf_analyzer, summary

FEEDS = [{"image": np.zeros(1)}, {"image": np.ones(1)}]


def test_open_load_offers_its_rate_and_uses_every_feed() -> None:
    seen: list[float] = []
    trace = drive(lambda feed: seen.append(float(feed["image"][0])), FEEDS, seconds=0.5, concurrency=4, rate=100)
    assert len(trace.done) == 50 and sorted(seen) == [0.0] * 25 + [1.0] * 25
    found = summary(trace, rate=100, concurrency=4)
    assert found["answered"] == 50 and found["throughput_rps"] == pytest.approx(50 / trace.seconds)
    assert np.diff(trace.due).max() > 0 and max(trace.due) == pytest.approx(0.5, rel=0.5)


def test_latency_counts_from_the_time_a_request_was_due() -> None:
    lock = threading.Lock()

    def slow(feed: Any) -> None:
        with lock:
            time.sleep(0.02)

    trace = drive(slow, FEEDS, seconds=0.2, concurrency=1, rate=100)
    found = summary(trace, rate=100, concurrency=1)
    assert found["request_ms_p50"] >= 20
    assert found["latency_ms_p99"] > 120, "20 requests of 20 ms at 100 a second: the last waits about 200 ms"


def test_closed_load_keeps_its_workers_busy() -> None:
    now, most, lock = [0], [0], threading.Lock()

    def send(feed: Any) -> None:
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.01)
        with lock:
            now[0] -= 1

    trace = drive(send, FEEDS, seconds=0.3, concurrency=3)
    assert most[0] == 3 and 3 <= len(trace.done) <= 93 and trace.due == trace.sent


def test_refused_requests_are_counted_by_their_words() -> None:
    def send(feed: Any) -> None:
        if feed["image"][0]:
            raise VssError("too big")

    trace = drive(send, FEEDS, seconds=0.1, concurrency=1, rate=100)
    assert trace.errors == {"too big": 5} and len(trace.done) == 5


def test_percentiles_are_those_of_numpy() -> None:
    trace = Trace(due=[0.0, 1.0, 2.0], sent=[0.0, 1.5, 2.0], done=[1.0, 2.0, 2.5], seconds=3.0)
    found = summary(trace, rate=1, concurrency=1)
    assert (found["latency_ms_p50"], found["request_ms_p50"], found["throughput_rps"]) == (1000.0, 500.0, 1.0)
    assert found["latency_ms_p99"] == pytest.approx(1000.0) and found["request_ms_p90"] == pytest.approx(900.0)
    assert summary(Trace(seconds=1.0), rate=1, concurrency=1)["latency_ms_p50"] is None


@pytest.mark.parametrize("change", [{"seconds": 0}, {"concurrency": 0}, {"rate": 0.0}])
def test_impossible_loads_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(VssError, match="cannot be made"):
        drive(lambda feed: None, FEEDS, **({"seconds": 1.0, "concurrency": 1, "rate": 1.0} | change))


def test_perf_analyzer_is_asked_and_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(VssError, match="perf_analyzer is not on the PATH"):
        perf_analyzer("h:1", "net", seconds=1, concurrency=2, rate=None)
    tool = tmp_path / "perf_analyzer"
    body = "import sys\na = sys.argv\nopen(a[a.index('-f') + 1], 'w').write("
    body += "'Request Rate,Inferences/Second,p99 latency\\n' + a[a.index('--request-rate-range') + 1] + ',48.5,900\\n')"
    tool.write_text(f"#!{sys.executable}\n{body}\n")
    tool.chmod(0o755)
    found = perf_analyzer("h:1", "net", seconds=1, concurrency=2, rate=50)
    assert found == {"Request Rate": 50.0, "Inferences/Second": 48.5, "p99 latency": 900.0}
    with pytest.raises(VssError, match=r"perf_analyzer failed: .*request-rate-range"):
        perf_analyzer("h:1", "net", seconds=1, concurrency=2, rate=None)


def test_figures_are_kept_when_the_server_dies(
    seg_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Dying:
        """Answers three requests, then nothing any more."""

        def __init__(self, protocol: str, address: str) -> None:
            self.answered = 0

        def infer(self, model: str, feed: Any, outputs: list[str]) -> None:
            if self.answered == 3:
                raise VssError("connection refused")
            self.answered += 1

        def statistics(self, model: str) -> dict[str, Any]:
            return {}

        def since(self, model: str, before: Any, *, answered: int) -> dict[str, Any]:
            assert answered == 3
            raise VssError("the server gives no statistics: connection refused.")

        def close(self) -> None:
            pass

    monkeypatch.setattr(load_module, "Client", Dying)
    words = ["load", str(seg_bundle), "--rate", "50", "--seconds", "0.2", "--concurrency", "1"]
    done = CliRunner().invoke(app, [*words, "--report", str(tmp_path / "load.json")])
    assert done.exit_code == 3
    told = " ".join(done.output.split())
    assert "answered: 3; errors: 7" in told and "the server gives no statistics: connection refused." in told
    figures = read_json(tmp_path / "load.json", kind="vss.load", schema=1)
    assert (figures["answered"], figures["errors"]) == (3, {"connection refused": 7})
    assert figures["latency_ms_p50"] > 0 and "batches" not in figures


@pytest.mark.parametrize(
    "answer", [ValueError("Expecting value"), RecursionError("too deep"), KeyError("model_stats"), OSError("reset")]
)
def test_an_answer_that_is_none_of_tritons_is_a_sentence(answer: Exception) -> None:
    asked = client.Client("grpc", "127.0.0.1:1")

    def refuse(*_: Any, **__: Any) -> Any:
        raise answer

    asked.client.get_inference_statistics = refuse
    with pytest.raises(VssError, match=r"127\.0\.0\.1:1 gives no statistics of net: "):
        asked.statistics("net")
    asked.client.get_inference_statistics = lambda *_, **__: {"model_stats": []}
    with pytest.raises(VssError, match=r"cannot be read \(IndexError"):
        asked.statistics("net")
    asked.close()
