"""The tables and plots of docs/results.md: the plan, the verdicts, and what is published."""

import json
import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.shape.__main__ import main
from benchmarks.shape.claims import CLAIMS, share_of_one_layer
from benchmarks.shape.errors import ShapeError
from benchmarks.shape.judging import compare
from benchmarks.shape.plan import (
    DEFAULT,
    SEEDS,
    STUDIES,
    UNTOUCHED,
    Row,
    Study,
    planned_runs,
    study,
)
from benchmarks.shape.plots import NAMES, draw_plots, fingerprint, picture
from benchmarks.shape.records import Records, read_records
from benchmarks.shape.report import study_table, with_tables
from benchmarks.shape.variants import Run, Variant

PROJECT = Path(__file__).parents[2]
RECORDS = PROJECT / "benchmarks" / "results" / "shape.jsonl"
PAGE = PROJECT / "docs" / "results.md"
PLOTS = PROJECT / "docs" / "plots"


@pytest.mark.parametrize(
    ("ours", "theirs", "verdict"),
    [
        ([90.0, 91.0], [100.0, 101.0], "lower: -10.0 / -9.9 %"),
        ([110.0, 110.0], [100.0, 100.0], "higher: +10.0 / +10.0 %"),
        ([95.0, 105.0], [100.0, 110.0], "slightly lower: -5.0 / -4.5 %"),  # seeds differ by 10 %
        ([99.0, 103.0], [100.0, 102.0], "no finding: -1.0 / +1.0 %"),  # signs differ
        ([98.0, 93.0], [100.0, 100.0], "no finding: -2.0 / -7.0 %"),  # seeds do not agree
        ([99.2, 99.2], [100.0, 100.0], "no finding: -0.8 / -0.8 %"),  # too small
    ],
)
def test_a_difference_counts_if_the_seeds_agree(
    ours: list[float], theirs: list[float], verdict: str
) -> None:
    """And is clear beyond the spread of either side."""
    assert str(compare(ours, theirs)) == verdict


@pytest.mark.parametrize("each", STUDIES, ids=lambda each: each.name)
def test_every_line_of_a_study_is_planned_with_what_it_is_judged_against(each: Study) -> None:
    """At both seeds, with its control, each run once."""
    planned = planned_runs()
    wanted = [row.variant for row in each.rows]
    wanted += [row.reference for row in each.rows if row.reference is not None]
    if each.controlled:
        wanted += [row.variant.control() for row in each.rows]

    assert len(set(planned)) == len(planned)
    assert {Run(variant, seed) for variant in wanted for seed in SEEDS} <= set(planned)


@pytest.mark.parametrize("name", ["heads", "orders"])
def test_lines_at_equal_bytes_are_equal(name: str) -> None:
    """In bytes, in width, and in the gates' parameters, so in their control too."""
    variants = [row.variant for row in study(name).rows]

    assert {v.table_bytes for v in variants} == {DEFAULT.table_bytes}
    assert {v.control() for v in variants} == {DEFAULT.control()}


def test_a_gate_whose_width_no_control_has_is_refused() -> None:
    """Rather than compared with one of another width."""
    with pytest.raises(ShapeError, match="multiples of 12"):
        Variant(heads=1, dim=7).control()


def test_tables_say_what_was_not_run() -> None:
    """An empty file of records gives tables without figures."""
    table = study_table(study("layers"), Records({}))

    assert table.count("not run") == 9 * (len(table.splitlines()) - 2) - 2


def test_tables_have_both_seeds_and_the_verdict() -> None:
    """In a study without controls."""
    one, other = replace(DEFAULT, lr=1.0), replace(DEFAULT, lr=2.0)
    by_run = {
        Run(variant, seed): {
            "perplexity": {"prose": prose + seed, "code": 30.0},
            "parameters": {"gates": 1000, "base": 234},
            "table": {"rows": 200, "changed_rows": 150, "row_bytes": 15_400_000},
        }
        for variant, prose in ((one, 200.0), (other, 150.0))
        for seed in SEEDS
    }
    rows = (Row("one", one), Row("other", other, one))

    table = study_table(Study("s", "S", rows, controlled=False), Records(by_run))

    assert table.splitlines()[-1] == (
        "| other | 15.4 | 75% | 1,234 | 150.0 / 151.0 | 30.0 / 30.0 | one "
        "| lower: -25.0 / -24.9 % | no finding: +0.0 / +0.0 % |"
    )


def ended_at(prose: dict[Variant, float]) -> Records:
    """Runs whose seeds agree to a hundredth."""
    by_run = {
        Run(variant, seed): {"perplexity": {"prose": value + 0.01 * seed, "code": 30.0}}
        for variant, value in prose.items()
        for seed in SEEDS
    }
    return Records(by_run)


@pytest.mark.parametrize(
    ("late", "verdict"),
    [
        (200.0, "holds, lower: -25.0 / -25.0 %"),
        (100.0, "does not hold, higher: +50.0 / +50.0 %"),
        (150.0, "no finding: +0.0 / +0.0 %"),
    ],
)
def test_a_claim_is_judged_by_its_direction(late: float, verdict: str) -> None:
    """Layer 1 against layer 7, as an example."""
    claim = next(each for each in CLAIMS if each.says == "early layers beat late ones")

    found = claim.verdict(ended_at({claim.ours: 150.0, claim.theirs: late}))

    assert found == verdict
    assert claim.verdict(Records({})) == "not run"


def test_what_is_claimed_was_planned() -> None:
    """Both sides of every published finding."""
    wanted = {variant for claim in CLAIMS for variant in (claim.ours, claim.theirs)}

    assert {Run(variant, seed) for variant in wanted for seed in SEEDS} <= set(planned_runs())


def test_the_share_of_one_layer_is_of_log_perplexities() -> None:
    """From 400 to 200 is half of the way from 400 to 100."""
    four = replace(DEFAULT, layers=(1, 3, 5, 7))
    records = ended_at({UNTOUCHED: 400.0, DEFAULT: 200.0, four: 100.0})

    assert share_of_one_layer(records, trained=True) == pytest.approx(0.5, abs=1e-3)
    assert share_of_one_layer(records, trained=False) is None


def test_a_page_without_a_place_for_a_study_is_refused() -> None:
    """No study is left out quietly."""
    with pytest.raises(ShapeError, match="wanted is one for each of"):
        with_tables("<!-- table: layers -->\n<!-- end -->", Records({}))


def test_a_plot_carries_the_fingerprint_of_what_it_shows(tmp_path: Path) -> None:
    """Pictures of other records have another one."""
    pytest.importorskip("matplotlib")
    published = read_records(RECORDS)

    paths = draw_plots(published, tmp_path)

    assert [path.stem for path in paths] == list(NAMES)
    for path in paths:
        own = fingerprint(picture(path.stem, published))
        assert description_of(path) == own != fingerprint(picture(path.stem, Records({})))


def test_the_published_page_is_what_the_records_give() -> None:
    """Text cannot drift from figures."""
    page = PAGE.read_text()

    assert with_tables(page, read_records(RECORDS)) == page


@pytest.mark.parametrize("name", NAMES)
def test_the_published_plots_show_the_records(name: str) -> None:
    """And the page shows the plots."""
    expected = fingerprint(picture(name, read_records(RECORDS)))

    assert description_of(PLOTS / f"{name}.png") == expected
    assert f"plots/{name}.png" in PAGE.read_text()


def test_the_command_writes_page_and_plots_again(tmp_path: Path) -> None:
    """From the records alone; places on the page may be empty before."""
    pytest.importorskip("matplotlib")
    page = tmp_path / "results.md"
    page.write_text(
        re.sub(r"(<!-- table: .*?-->\n).*?(<!-- end)", r"\1\2", PAGE.read_text(), flags=re.S)
    )

    main(["--records", str(RECORDS), "report", "--page", str(page), "--plots", str(tmp_path)])

    assert page.read_text() == PAGE.read_text()
    assert {path.stem for path in tmp_path.glob("*.png")} == set(NAMES)


def test_the_command_says_what_is_wrong(tmp_path: Path) -> None:
    """In one line, and leaves the page alone."""
    (tmp_path / "records.jsonl").write_text("{}\n")
    page = tmp_path / "results.md"
    page.write_text("as it was")

    with pytest.raises(SystemExit, match=r"error: .*line 1 is no record"):
        main(["--records", str(tmp_path / "records.jsonl"), "report", "--page", str(page)])

    assert page.read_text() == "as it was"


def test_every_planned_run_is_published_once() -> None:
    """So no line of the page says that something was not run."""
    lines = RECORDS.read_text().splitlines()
    published = read_records(RECORDS)

    assert len(published.by_run) == len(lines)
    assert set(published.by_run) == set(planned_runs())
    assert "not run" not in PAGE.read_text()


def test_published_records_name_no_place() -> None:
    """Of the machine they were run on: a text of a record never is a path."""
    for line in RECORDS.read_text().splitlines():
        assert not [text for text in texts_in(json.loads(line)) if "/" in text]


def texts_in(value: object) -> Iterator[str]:
    """All of a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from texts_in(each)


def description_of(path: Path) -> str:
    """The Description of a PNG file, from its tEXt chunks; each chunk's checksum is right."""
    data, at = path.read_bytes(), 8
    while at < len(data):
        size, kind = struct.unpack_from(">I4s", data, at)
        body = data[at + 8 : at + 8 + size]
        assert zlib.crc32(kind + body) == struct.unpack_from(">I", data, at + 8 + size)[0]
        if kind == b"tEXt" and body.startswith(b"Description\0"):
            return body.partition(b"\0")[2].decode()
        at += size + 12
    raise AssertionError(f"{path} has no description")
