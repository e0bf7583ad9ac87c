"""Writes the tables of docs/results.md from the records, so that no figure is typed."""

import re
from collections.abc import Iterable, Sequence

from benchmarks.shape.claims import CLAIMS, share_of_one_layer
from benchmarks.shape.errors import ShapeError
from benchmarks.shape.judging import difference
from benchmarks.shape.plan import DEFAULT, SEEDS, STUDIES, UNTOUCHED, Row, Study
from benchmarks.shape.records import Records
from benchmarks.shape.variants import Rows, Variant

_MARKED = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
_MISSING = "not run"
_JUDGED = ("against", "prose, against it", "code, against it")
_DOMAINS = ("prose", "code")


def with_tables(page: str, records: Records) -> str:
    """A page whose marked places hold the tables of these records.

    Args:
        page: Markdown with places `<!-- table: NAME -->` ... `<!-- end -->`, where a name is that
            of a study or one of `facts`, `claims`, `shares` and `machines`.
        records: what was run.

    Raises:
        ShapeError: a place has an unknown name, or a study has none.
    """
    tables = {study.name: study_table(study, records) for study in STUDIES}
    tables |= {
        "facts": _facts(records),
        "claims": _claims(records),
        "shares": _shares(records),
        "machines": _machines(records),
    }
    places = [name for _, name, _ in _MARKED.findall(page)]
    if sorted(places) != sorted(tables):
        raise ShapeError(
            f"the page has places for {sorted(places)}; wanted is one for each of {sorted(tables)}"
        )
    return _MARKED.sub(lambda place: f"{place[1]}{tables[place[2]]}{place[3]}", page)


def study_table(study: Study, records: Records) -> str:
    """One study as a Markdown table."""
    return _controlled(study, records) if study.controlled else _plain(study, records)


def _controlled(study: Study, records: Records) -> str:
    head = (
        "",
        "table MB",
        "rows trained",
        "parameters beside tables",
        "zero table: prose",
        "Engram: prose",
        "tables' part",
        "Engram: code",
        *_JUDGED,
    )
    body = [
        (
            *_shape(row.label, row.variant, records),
            _values(records, row.variant.control(), "prose"),
            _values(records, row.variant, "prose"),
            _part(records, row.variant),
            _values(records, row.variant, "code"),
            *_judged(records, row, study),
        )
        for row in study.rows
    ]
    return _markdown(head, body)


def _plain(study: Study, records: Records) -> str:
    judged = any(row.reference is not None for row in study.rows)
    head = ("", "table MB", "rows trained", "parameters beside tables", "prose", "code")
    body = [
        (
            *_shape(row.label, row.variant, records),
            _values(records, row.variant, "prose"),
            _values(records, row.variant, "code"),
            *(_judged(records, row, study) if judged else ()),
        )
        for row in study.rows
    ]
    return _markdown((*head, *_JUDGED) if judged else head, body)


def _shape(label: str, variant: Variant, records: Records) -> tuple[str, str, str, str]:
    """A line's name and its budget."""
    record = records.get(variant, SEEDS[0])
    if record is None:
        return label, _MISSING, _MISSING, _MISSING
    dense, table = f"{sum(record['parameters'].values()):,}", record["table"]
    if variant.rows is not Rows.TRAINED:
        return label, "0", "", dense
    trained = f"{table['changed_rows'] / table['rows']:.0%}"
    return label, f"{table['row_bytes'] / 1e6:.1f}", trained, dense


def _values(records: Records, variant: Variant, domain: str) -> str:
    values = records.perplexities(variant, domain, SEEDS)
    return " / ".join(f"{value:.1f}" for value in values) or _MISSING


def _part(records: Records, variant: Variant) -> str:
    """What trained rows add to what the control learns."""
    found = difference(records, variant, variant.control(), "prose")
    return _MISSING if found is None else f"{found.mean * 100:+.1f} %"


def _judged(records: Records, row: Row, study: Study) -> tuple[str, str, str]:
    """Both domains beside the line's reference."""
    if row.reference is None:
        return "", "", ""
    against = next(each.label for each in study.rows if each.variant == row.reference)
    prose, code = (
        _MISSING if found is None else str(found)
        for found in (difference(records, row.variant, row.reference, d) for d in _DOMAINS)
    )
    return against, prose, code


def _claims(records: Records) -> str:
    """What others published, and what these runs say about it."""
    body = [(claim.says, claim.who, claim.domain, claim.verdict(records)) for claim in CLAIMS]
    return _markdown(("finding", "of", "measured in", "here"), body)


def _shares(records: Records) -> str:
    """One early layer beside four."""
    lines = [("zero table", False), ("Engram", True)]
    shares = [(name, share_of_one_layer(records, trained=trained)) for name, trained in lines]
    body = [(name, _MISSING if share is None else f"{share:.0%}") for name, share in shares]
    return _markdown(("", "of the gain of layers 1, 3, 5, 7, layer 1 alone has"), body)


def _facts(records: Records) -> str:
    """The base and its text."""
    if not records.by_run:
        return _MISSING + "\n"
    record = next(iter(records.by_run.values()))
    base, settings = record["base"], record["settings"]
    tokens = base["tokens"]
    learned, step = base["settings"], settings["batch"] * settings["time"]
    facts = {
        "base": f"Llama, {base['parameters']:,} parameters, {settings['blocks']} layers of width "
        f"{settings['hidden']}, vocabulary {settings['vocabulary']:,}",
        "base learned": f"{learned['base_steps']} steps of {learned['batch'] * learned['time']:,} "
        f"tokens of code, of which there are {tokens['code']:,}",
        "a run learns": f"{DEFAULT.steps} steps of {step:,} tokens of prose, of which there are "
        f"{tokens['prose']:,}: no sequence twice",
        "files": f"{base['files']['code']} of code, {base['files']['prose']} of prose; every "
        "tenth is held out as a whole",
        "evaluated on": f"{settings['eval_sequences'] * (settings['time'] - 1):,} tokens of each "
        "domain, from all over the held-out files",
        "runs": f"{len(records.by_run)}, at the seeds {' and '.join(map(str, SEEDS))}",
    }
    untouched = records.get(UNTOUCHED, SEEDS[0])
    if untouched is not None:
        values = untouched["perplexity"]
        facts["its perplexity"] = f"{values['prose']:.1f} prose, {values['code']:.1f} code"
    return _markdown(("", ""), list(facts.items()))


def _machines(records: Records) -> str:
    """Where and when runs took place, and with what."""
    every = [record["machine"] for record in records.by_run.values()]
    if not every:
        return _MISSING + "\n"
    dates = sorted(machine["date"] for machine in every)
    seconds = sorted(r["seconds"]["training"] for r in records.by_run.values() if r["steps"])
    versions = dict.fromkeys(
        f"{name} {version}" for machine in every for name, version in machine["versions"].items()
    )
    rows = [
        ("processor", _distinct(machine["cpu"] for machine in every)),
        ("cores", _distinct(f"{machine['cores']}, one thread a run" for machine in every)),
        ("Python", _distinct(machine["python"] for machine in every)),
        ("versions", ", ".join(versions)),
        ("revision", _distinct(str(machine["revision"]) for machine in every)),
        ("between", f"{dates[0]} and {dates[-1]}"),
        ("training of a run", f"{seconds[0]:.0f} to {seconds[-1]:.0f} s, beside other jobs"),
    ]
    return _markdown(("", ""), rows)


def _distinct(values: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(values))


def _markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A table; columns of figures are set right, those of words left."""
    columns = ["".join(column) for column in zip(*body, strict=True)]
    rule = ["---" if any(map(str.isalpha, column)) else "---:" for column in columns]
    lines = [head, rule, *body]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
