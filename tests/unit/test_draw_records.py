"""Pictures of docs/performance.md are drawn from the committed records."""

import json
from pathlib import Path

import pytest

from benchmarks.draw_records import ON_THE_PAGE, ROOT, read_record

RESULTS = ROOT / "benchmarks" / "results"


@pytest.mark.parametrize("bench", ON_THE_PAGE)
def test_a_record_is_read_as_it_was_written(bench: str) -> None:
    path: Path = RESULTS / f"{bench}.json"
    record, read = json.loads(path.read_text()), read_record(path).to_json()
    for kept, again in zip(record["results"], read["results"], strict=True):
        assert again["name"] == kept["name"]
        for figure in ("median_ms", "p95_ms", "ratio_to"):
            assert again[figure] == pytest.approx(kept[figure], rel=2e-3, abs=1e-3), kept["name"]
    for kept, again in zip(record["quantities"], read["quantities"], strict=True):
        assert again["median"] == kept["median"]
    assert read["targets"] == record["targets"]
    assert read["series"] == record["series"]


@pytest.mark.parametrize("bench", ON_THE_PAGE)
def test_the_page_shows_its_picture(bench: str) -> None:
    assert (ROOT / "docs" / "plots" / f"{bench}.png").stat().st_size > 10_000
    assert f"](plots/{bench}.png)" in (ROOT / "docs" / "performance.md").read_text()
