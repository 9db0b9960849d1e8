"""Recording and plans inside Hugging Face Accelerate and Lightning Fabric: two processes, gradient accumulation."""

from __future__ import annotations

from pathlib import Path

import pytest
import ranked_launches
from test_distributed import differences, launch, single, succeed

from precscope.profiles import Profile

SCRIPT = Path(ranked_launches.__file__)


@pytest.mark.parametrize(
    ("kind", "package"),
    [("accelerate", "accelerate"), pytest.param("fabric", "lightning_fabric", marks=pytest.mark.slow)],
)
def test_a_run_of_another_launcher_is_recorded_as_a_plain_loop_is(tmp_path, kind, package):
    pytest.importorskip(package)
    succeed(launch(2, kind, tmp_path, script=SCRIPT))
    both = Profile.load(tmp_path / "run")
    assert both.run["merged_over"] == 2 and not list((tmp_path / "run").glob("rank-*"))
    reference = single(tmp_path, "exact", of_many=2 * ranked_launches.MICRO)
    assert differences(both, reference) == 0
    planned = Profile.load(tmp_path / "planned").history()
    outputs = planned[(planned.module == "first") & (planned.role == "output")]
    assert set(outputs.source) == {"bf16"}
