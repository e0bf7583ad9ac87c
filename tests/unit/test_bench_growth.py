"""`bench growth`: tables of several sizes in one run, and nothing left behind."""

import json
from pathlib import Path

import pytest

from engram_store.bench import GrowthWorkload, run_bench
from engram_store.bench.growth import COMMIT, PARTS, WINDOW
from engram_store.bench.report import print_report
from engram_store.errors import ConfigError

TINY = GrowthWorkload(rows=20_000, tokens=256, repetitions=2, factors=(1, 4))


def test_growth_compares_every_part_with_the_smallest_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Lines, curves and targets; the tables are gone afterwards."""
    report = run_bench("growth", TINY, tmp_path, lambda _: None)

    data = json.loads(json.dumps(report.to_json()))
    ratios = {result["name"]: set(result["ratio_to"]) for result in data["results"]}
    for part in PARTS:
        small, large = f"{part}: 0.02 M rows", f"{part}: 0.08 M rows"
        assert ratios[small] == set()
        assert ratios[large] == {small}
    assert [series["name"] for series in data["series"]] == list(PARTS)
    for series in data["series"]:
        assert series["y"][0] == 1
        assert series["x"][0] < 22_000 < 80_000 <= series["x"][1]
    commits = {t.name: t.median_ms for t in report.timings if t.name.startswith(COMMIT)}
    measured = {target["what"]: target["measured"] for target in data["targets"]}
    grown = commits[f"{COMMIT}: 0.08 M rows"] / commits[f"{COMMIT}: 0.02 M rows"]
    assert measured[f"a {COMMIT}, 0.08 M rows against 0.02 M rows"] == pytest.approx(grown)
    assert f"a {WINDOW}, 0.08 M rows against 0.02 M rows" in measured
    unique = [quantity["median"] for quantity in data["quantities"]]
    assert unique == sorted(unique)
    assert len(set(unique)) == 2
    assert data["workload"]["tables"][1]["remap_bytes"] >= 4 * 80_000
    assert not list(tmp_path.iterdir())
    print_report(report)
    assert "commit: 0.08 M rows" in capsys.readouterr().out


@pytest.mark.parametrize("factors", [(), (1,), (10, 1), (1, 1), (0, 1)])
def test_sizes_that_do_not_grow_are_refused(factors: tuple[int, ...], tmp_path: Path) -> None:
    """Before anything is made."""
    workload = GrowthWorkload(rows=20_000, tokens=256, repetitions=1, factors=factors)

    with pytest.raises(ConfigError, match="the smallest first"):
        run_bench("growth", workload, tmp_path, lambda _: None)

    assert not list(tmp_path.iterdir())
