"""A short soak test; `make soak MINUTES=30` is the long one."""

from benchmarks import soak


def test_soak() -> None:
    report = soak.run(minutes=0.2, period=4.0)
    assert report["faults"] == []
    assert report["counts"]["equal answers"] > 10
    assert (
        report["counts"].get("servers killed", 0) + report["counts"].get("servers stopped", 0) > 0
    )  # as chance has it
