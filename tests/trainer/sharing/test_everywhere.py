"""Every file that a sharing verb writes loads whole in diffusers and in ComfyUI, and is off by what the verb stated."""

import pytest

from host.conftest import NO_HOST
from host.server import hosts
from support.sharing_table import KINDS, table

EXACT = 1e-6  # of fp32's rounding


@pytest.fixture(scope="module", params=hosts() or [None], ids=lambda path: path.parent.name if path else "none")
def measured(request, tmp_path_factory):
    return table(tmp_path_factory.mktemp("files"), request.param)


@pytest.mark.host
@pytest.mark.skipif(not hosts(), reason=NO_HOST)
@pytest.mark.parametrize("kind", KINDS)
def test_files_load_whole_and_differ_as_stated(kind, measured):
    rows = {row.verb.split(" --to")[0]: row for row in measured if row.kind == kind}
    assert set(rows) == {"convert", "tag", "merge", "merge --rank 6", "resize --rank 4", "extract --rank 4"}
    for row in rows.values():
        assert (row.diffusers_unmatched, row.host_unmatched) == (0, 0), row
        assert row.diffusers_error == pytest.approx(row.stated, rel=1e-3, abs=EXACT), row
        assert row.host_error == pytest.approx(row.stated, rel=1e-3, abs=EXACT), row
    assert rows["tag"].stated == 0 and (rows["convert"].stated == 0) == (kind != "sd3")
    assert max(rows[verb].stated for verb in ("convert", "merge")) < 1e-3 < 0.1 < rows["resize --rank 4"].stated
