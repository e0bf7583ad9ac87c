"""What others published, and what the records say about it."""

from dataclasses import dataclass
from math import log
from statistics import fmean

from benchmarks.shape.judging import difference
from benchmarks.shape.plan import DEFAULT, SEEDS, UNTOUCHED, study
from benchmarks.shape.records import Records
from benchmarks.shape.variants import Variant


@dataclass(frozen=True, slots=True)
class Claim:
    """One published finding, as a difference between two variants of a study."""

    who: str
    says: str
    ours: Variant
    theirs: Variant
    lower: bool = True
    """Whether the first has the lower perplexity, if the claim holds."""
    domain: str = "prose"

    def verdict(self, records: Records) -> str:
        """For the table of claims."""
        found = difference(records, self.ours, self.theirs, self.domain)
        if found is None:
            return "not run"
        if not found.finding:
            return str(found)
        holds = (found.mean < 0) == self.lower
        return f"{'holds' if holds else 'does not hold'}, {found}"


def _line(name: str, label: str) -> Variant:
    """The variant of one line of a study."""
    return next(row.variant for row in study(name).rows if row.label == label)


def _of(label: str) -> Variant:
    return _line("adaptation", label)


_TINY, _PEFT, _HERTEL, _OURS = "TinyEngram", "engram-peft", "t-hertel/Engram", "our question"

CLAIMS = (
    Claim(_HERTEL, "Engram lowers a frozen base's perplexity", DEFAULT, UNTOUCHED),
    Claim(_HERTEL, "... with the tables it really had, all zero", _of("zero table"), UNTOUCHED),
    Claim(_OURS, "... and trained tables lower it further", DEFAULT, _of("zero table")),
    Claim(_OURS, "three times the text helps a zero table", _line("steps", "zero table, 450 steps"),
          _of("zero table")),
    Claim(_OURS, "... and trained tables", _line("steps", "Engram, 450 steps"), DEFAULT),
    Claim(_HERTEL, "full fine-tuning with Engram: lowest of all", _of("full + Engram"), DEFAULT),
    Claim(_OURS, "... because of Engram", _of("full + Engram"), _of("full fine-tuning")),
    Claim(_TINY, "early layers beat late ones", DEFAULT, _line("layers", "layer 7")),
    Claim(_TINY, "early layers beat the middle, slightly", DEFAULT, _line("layers", "layer 3")),
    Claim("Engram paper", "the second layer beats the first", DEFAULT, _line("layers", "layer 0")),
    Claim(_TINY, "longer rows are better (32 against 8, more bytes)", DEFAULT,
          _line("dimension", "8 dims, 20,000 rows a head")),
    Claim(_OURS, "... at equal bytes", DEFAULT,
          _line("dimension", "8 dims, 80,000 rows a head (equal bytes)")),
    Claim(_OURS, "... and 128 against 32, at equal bytes",
          _line("dimension", "128 dims, 5,000 rows a head (equal bytes)"), DEFAULT),
    Claim(_TINY, "more heads are better", _line("heads", "12 heads x 16"), DEFAULT),
    Claim(_OURS, "... several heads are better than one", DEFAULT, _line("heads", "1 head x 192")),
    Claim(_TINY, "4-grams help", _line("orders", "2 + 3 + 4"), DEFAULT),
    Claim("Engram paper", "4-grams hurt slightly, at a fixed budget",
          _line("orders", "2 + 3 + 4"), DEFAULT, lower=False),
    Claim(_OURS, "3-grams help", DEFAULT, _line("orders", "2")),
    Claim(_TINY, "a small table beats a large one", _line("size", "1,000 rows a head"),
          _line("size", "100,000 rows a head")),
    Claim(_PEFT, "LoRA learns more than Engram", _of("LoRA, rank 16"), DEFAULT),
    Claim(_PEFT, "LoRA + Engram learns more than LoRA", _of("LoRA + Engram"), _of("LoRA, rank 16")),
    Claim(_OURS, "... and more than LoRA + a zero table", _of("LoRA + Engram"),
          _of("LoRA + zero table")),
    Claim(_PEFT, "full + Engram learns less than LoRA + Engram", _of("full + Engram"),
          _of("LoRA + Engram"), lower=False),
    Claim(_PEFT, "its hash is as good as the paper's, or better",
          _line("hash", "recipe P (engram-peft), layer 1"), DEFAULT),
    Claim(_TINY, "Engram forgets less than LoRA", DEFAULT, _of("LoRA, rank 16"), domain="code"),
    Claim(_TINY, "Engram forgets nothing", DEFAULT, UNTOUCHED, domain="code"),
)  # fmt: skip


def share_of_one_layer(records: Records, *, trained: bool) -> float | None:
    """How much of the gain of four layers one early layer has, in log perplexity; None: not run."""
    four = _line("layers", "layers 1, 3, 5, 7")
    one = DEFAULT
    if not trained:
        one, four = one.control(), four.control()
    values = [records.perplexities(v, "prose", SEEDS) for v in (UNTOUCHED, one, four)]
    if any(len(found) < len(SEEDS) for found in values):
        return None
    base, after_one, after_four = (fmean(map(log, found)) for found in values)
    return (base - after_one) / (base - after_four)
