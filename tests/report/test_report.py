import io
import json
import math
from html.parser import HTMLParser

import msgspec
import numpy as np
import pytest
from matplotlib.image import imread
from rich.console import Console

from fastee.report import (
    Result,
    accuracy_against_cost,
    closing,
    difference,
    exit_histogram,
    latency_distribution,
    page,
    row,
    table,
)
from fastee.report.tables import COLUMNS, best, cells

MACS = [10.0, 40.0, 100.0]


def make(key="a", name="a way", *, n=50, latency=0.02, wrong=5, exits=None, wire=0.0):
    truth = np.arange(n) % 10
    label = truth.copy()
    label[:wrong] += 1
    taken = np.full(n, 2) if exits is None else np.asarray(exits)
    return row(
        key, name, f"how <{key}>", label=label, truth=truth, exit=taken, latency=latency * (1 + np.arange(n) / n), wire_bytes=np.full(n, wire),
        exit_macs=MACS, full_macs=100.0, deadline=0.03,
    )  # fmt: skip


@pytest.fixture(scope="module")
def result():
    rows = [make("full", "full & here"), make("cloud", "cloud", latency=0.01, wire=784), make("ours", "ours", exits=np.arange(50) % 3, wrong=6)]
    calibration = {"max_drop": 0.005, "confidence": 0.95, "drop": 0.001, "bound": 0.004, "samples": 3000}
    return Result(
        title="a <test> run", deadline=0.03, exit_names=["one", "two"], rows=rows, local=rows[:1], calibration=calibration,
        setting={"link": "20mbit"}, machine={"cpu": "some"}, notes=["a note"], summary=closing(rows[2], rows[0], rows[1], calibration),
    )  # fmt: skip


def test_row_counts_what_was_measured():
    found = row(
        "k", "n", "h", label=[1, 2, 3, -1], truth=[1, 2, 0, 1], exit=[0, 1, 2, -1], latency=[0.01, 0.02, 0.04, 0.0], wire_bytes=[0, 10, 30, 0],
        exit_macs=MACS, full_macs=100.0, deadline=0.03, forced=[False, True, False, False], nodes={"here": 3}, errors={"Rejected": 1},
    )  # fmt: skip
    assert (found.samples, found.failed, found.forced) == (4, 1, 1)
    assert found.nodes == {"here": 3} and found.errors == {"Rejected": 1}
    assert found.accuracy == 0.5 and found.hits == 0.5
    assert found.depth == 2.0 and found.macs == pytest.approx(0.5) and found.exits == [1, 1, 1]
    assert found.wire_bytes == 10 and found.p50 == 0.04 and found.mean == found.p99 == math.inf
    assert found.latency == [0.01, 0.02, 0.04, math.inf] and found.correct == [True, True, False, False]


def test_a_row_without_any_answer_has_no_depth():
    found = row("k", "n", "h", label=[-1], truth=[1], exit=[-1], latency=[0.0], wire_bytes=[0], exit_macs=MACS, full_macs=1.0, deadline=1.0)
    assert found.accuracy == 0 and math.isnan(found.depth) and math.isnan(found.macs)
    assert cells(found, 3)[4:7] == ["-"] * 3 and cells(found, 3)[-2:] == ["0.0", "0.0"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latency": [0.1]}, "must be equally many and not empty, got lengths"),
        ({"exit": [3, 0]}, "exit must be in -1..2, got 0..3"),
        ({"exit": [-2, 0]}, "exit must be in -1..2, got -2..0"),
    ],
)
def test_row_refuses_what_does_not_fit(change, message):
    good = {"label": [1, 1], "truth": [1, 1], "exit": [0, 0], "latency": [0.1, 0.1], "wire_bytes": [0, 0]}
    with pytest.raises(ValueError, match=message):
        row("k", "n", "h", **{**good, **change}, exit_macs=MACS, full_macs=1.0, deadline=1.0)


def test_percentiles_are_values_that_were_seen():
    found = make(n=50)
    assert found.p50 in found.latency and found.p99 in found.latency and found.p50 < found.p99 == max(found.latency)


def test_wilson_interval_of_a_known_case():
    assert make(n=100, wrong=10).interval == pytest.approx((0.8256, 0.9448), abs=1e-4)


def test_json_round_trip_keeps_every_number(result):
    again = Result.from_json(result.to_json())
    assert again == result
    assert json.loads(result.to_json())["rows"][1]["wire_bytes"] == 784


def test_json_round_trip_of_missing_answers(result):
    lost = row("k", "n", "h", label=[-1, 1], truth=[1, 1], exit=[-1, 0], latency=[0, 0.1], wire_bytes=[0, 0], exit_macs=MACS, full_macs=1.0, deadline=1.0)
    again = Result.from_json(msgspec.structs.replace(result, rows=[lost]).to_json())
    assert again.rows == [lost] and again.rows[0].latency[0] == math.inf


def test_from_json_names_the_field_that_does_not_fit(result):
    raw = json.loads(result.to_json())
    raw["rows"][0]["accuracy"] = "high"
    with pytest.raises(msgspec.ValidationError, match=r"accuracy|rows"):
        Result.from_json(json.dumps(raw))


def test_closing_does_not_hide_a_loss(result):
    full, cloud, ours = result.rows
    text = closing(ours, full, cloud, result.calibration)
    assert "2.00x SLOWER than all there" in text and "-2.00 points" in text
    assert "guarantee: drop <= 0.40 points with 95 % confidence" in text
    assert "2.00x faster than all there" in closing(cloud, ours, full, result.calibration).replace("all here", "all there")


def test_difference_is_paired():
    a, b = make(n=100, wrong=10), make(n=100, wrong=14)
    found, spread = difference(a, b)
    assert found == pytest.approx(0.04) and spread == pytest.approx(1.959964 * math.sqrt((6 - 16 / 100) / 1e4))
    assert difference(a, a)[0] == 0 < difference(a, a)[1]
    assert difference(b, a)[0] == pytest.approx(-0.04)
    with pytest.raises(ValueError, match="same samples, got 100 and 50"):
        difference(a, make(n=50))


def test_closing_claims_no_guarantee_that_the_bound_does_not_give(result):
    full, cloud, ours = result.rows
    weak = closing(ours, full, cloud, {**result.calibration, "bound": 0.009})
    assert "NOT guaranteed" in weak and "guarantee:" not in weak
    none = closing(ours, full, cloud, {**result.calibration, "bound": None})
    assert "without a guarantee" in none


def test_table_has_a_line_per_row_and_marks_the_best(result):
    console = Console(file=io.StringIO(), width=200, force_terminal=False)
    console.print(table(result.rows, "title", 3))
    text = console.file.getvalue()
    assert all(name in text for name, _ in COLUMNS) and all(r.name in text for r in result.rows)
    winners = best(result.rows, 3)
    assert winners["mean ms"] == cells(result.rows[1], 3)[4] and winners["bytes/sample"] == "0"
    assert best([], 3) == {}


@pytest.mark.parametrize("plot", ["accuracy", "latency", "exits"])
def test_plots_are_pngs_with_ink(result, plot):
    draw = {
        "accuracy": lambda: accuracy_against_cost(result.rows),
        "latency": lambda: latency_distribution(result.rows, 0.03),
        "exits": lambda: exit_histogram(result.rows, result.exit_names),
    }[plot]
    png = draw()
    pixels = imread(io.BytesIO(png))
    assert pixels.shape[1] >= 1000 and pixels[..., :3].std() > 0.05
    assert draw() == png


def test_plots_refuse_no_rows():
    with pytest.raises(ValueError, match="rows must not be empty"):
        accuracy_against_cost([])


class _Page(HTMLParser):
    void = {"meta", "img", "br", "link"}

    def __init__(self):
        super().__init__()
        self.open, self.images, self.texts, self.others = [], [], [], []

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        if tag == "img":
            self.images.append(values["src"])
        self.others += [v for k, v in attributes if k in ("href", "src") and not v.startswith("data:image/png;base64,")]
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        self.texts.append(text)


def test_page_is_whole_and_self_contained(result):
    html = page(result)
    found = _Page()
    found.feed(html)
    assert found.open == [] and found.others == []
    assert len(found.images) == 3 and all(len(src) > 10_000 for src in found.images)
    text = "".join(found.texts)
    assert result.summary in text and "full & here" in text and "how <full>" in text and "a note" in text
    assert "<test>" not in html and "how <full>" not in html  # escaped
