"""The nodes on files and pictures that others made: a part of the fuzz run, in a ComfyUI's own Python."""

from __future__ import annotations

from host.server import hosts
from support.fuzzing import fuzz_nodes


def test_a_part_of_the_run_ends_as_the_whole(tmp_path):
    reports = fuzz_nodes(hosts()[0], tmp_path / "host", count=240, seed=12)
    for name, report in reports.items():
        assert report.bad == [] and report.events == 0, name
        assert report.accepted and report.refused, name
    assert any("numbers that are not finite" in text for text in reports["node loader"].said)
    assert any("The mask has" in text for text in reports["node pictures"].said)
