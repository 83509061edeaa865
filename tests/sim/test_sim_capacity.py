"""Bandwidth traces: formats, arithmetic against a byte-by-byte account, hostile files."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastee.simulation import CapacityTrace, parse_csv, parse_mahimahi, read_capacity, synthetic_capacity
from fastee.simulation.twin import leave_at, wire_ns

MS = 1_000_000


def test_mahimahi_counts_packets_per_millisecond():
    trace = parse_mahimahi(b"0\n0\n5\n5\n5\n9\n")
    assert trace.at.tolist() == [0, MS, 5 * MS, 6 * MS, 9 * MS, 10 * MS]
    assert trace.cum.tolist() == [0, 3000, 3000, 7500, 7500, 9000]
    assert trace.mean_rate == pytest.approx(9000 * 8 / 0.01)


def test_csv_holds_a_rate_per_second():
    trace = parse_csv(b"second,downlink_kbit_s,ping_ms,mode\n0,800,,5G\n1,,20,5G\n2,8,,LTE\n")
    assert trace.cum.tolist() == [0, 100_000, 200_000, 201_000]


def test_a_message_takes_what_the_trace_gives():
    trace = parse_mahimahi(b"0\n5\n9\n")  # 1500 bytes in ms 0, 5 and 9; then again
    traces, radio = [(trace.at.tolist(), trace.cum.tolist())], (1, 0, 0)
    assert leave_at(radio, traces, 0, 1500) == MS
    assert leave_at(radio, traces, 0, 1501) == 5 * MS + -(-MS // 1500)
    assert leave_at(radio, traces, 2 * MS, 1500) == 6 * MS
    assert leave_at(radio, traces, 0, 4500) == 10 * MS
    assert leave_at(radio, traces, 0, 6000) == 11 * MS
    assert leave_at((1, 0, 5 * MS), traces, 0, 1500) == MS


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=8).filter(any), st.integers(0, 10**8), st.integers(1, 5000), st.integers(1, 5000))
def test_messages_one_after_the_other_take_as_long_as_one(steps, start, first, second):
    trace = CapacityTrace.steps(np.array(steps) * 8e6, 0.01)
    traces, medium = [(trace.at.tolist(), trace.cum.tolist())], (1, 0, 0)
    whole = leave_at(medium, traces, start, first + second)
    parts = leave_at(medium, traces, leave_at(medium, traces, start, first), second)
    assert start < leave_at(medium, traces, start, first) <= parts
    assert whole - 1 <= parts <= whole + max(2, 10 * MS * (0 in steps) * len(steps) + 10**6)  # up to one byte is rounded off at the seam
    assert wire_ns(first, 8_000_000_000) == first


@pytest.mark.parametrize("kind", ["lte", "5g", "wifi"])
def test_synthetic_radio_has_the_mean_that_was_asked_for(kind):
    trace = synthetic_capacity(kind, 6e6, 30.0, seed=2)
    assert trace.mean_rate == pytest.approx(6e6, rel=1e-3)
    assert np.array_equal(trace.cum, synthetic_capacity(kind, 6e6, 30.0, seed=2).cum)
    assert not np.array_equal(trace.cum, synthetic_capacity(kind, 6e6, 30.0, seed=3).cum)


@pytest.mark.parametrize("text, words", [
    (b"", "no packet"), (b"1\nx\n", "line 2"), (b"3\n1\n", "must rise"), (b"-1\n", "must rise"), (b"9" * 30 + b"\n", "line 1"), (b"1\n\xff", "ASCII"),
    (b"99999999999\n", "at most"), (b"1.5\n", "line 1"), (b"nan\n", "line 1"), (b"0x10\n", "line 1"),
])  # fmt: skip
def test_hostile_mahimahi(text, words):
    with pytest.raises(ValueError, match=words):
        parse_mahimahi(text)


@pytest.mark.parametrize("text, words", [
    (b"", "header"), (b"a,b\n1,2\n", "column"), (b"downlink_kbit_s\nx\n", "line 2"), (b"downlink_kbit_s\nnan\n", "line 2"),
    (b"downlink_kbit_s\n-1\n", "line 2"), (b"downlink_kbit_s\n1e300\n", "line 2"), (b"a,downlink_kbit_s\n1\n", "line 2"),
    (b"downlink_kbit_s\n0\n0\n", "pass"), (b"\x00\xff", "ASCII"),
])  # fmt: skip
def test_hostile_csv(text, words):
    with pytest.raises(ValueError, match=words):
        parse_csv(text)


def test_files_are_read_by_their_ending(tmp_path):
    (tmp_path / "a.up").write_bytes(b"1\n2\n")
    (tmp_path / "a.csv").write_bytes(b"downlink_kbit_s\n8\n")
    (tmp_path / "a.txt").write_bytes(b"1\n")
    assert read_capacity(tmp_path / "a.up").cum[-1] == 3000
    assert read_capacity(tmp_path / "a.csv").cum[-1] == 1000
    assert read_capacity(tmp_path / "a.txt", "mahimahi").cum[-1] == 1500
    with pytest.raises(ValueError, match="format"):
        read_capacity(tmp_path / "a.txt")


@pytest.mark.parametrize("at, cum", [([0], [0]), ([0, 1], [0, 0]), ([0, 1, 1], [0, 1, 2]), ([0, 1, 2], [0, 2, 1]), ([1, 2], [0, 1]), ([0, 1], [1, 2])])
def test_impossible_traces_are_refused(at, cum):
    with pytest.raises(ValueError, match="CapacityTrace"):
        CapacityTrace(np.array(at), np.array(cum))
