"""Refuses what cannot fit, and says what would."""

from engram_store.errors import ConfigError
from engram_store_client.planning.plan import Plan
from engram_store_client.planning.report import alternatives_text, refusal_text
from engram_store_client.planning.search import alternatives


def fitting_text(plan: Plan) -> str:
    """What would fit in place of a plan that does not."""
    return alternatives_text(alternatives(plan.setup, plan.limits))


def check_fits(plan: Plan) -> None:
    """Let a plan that fits pass.

    Raises:
        ConfigError: it does not fit; with what is short, and what would fit.
    """
    if not plan.fits:
        raise ConfigError(f"this run cannot fit: {refusal_text(plan)}\n{fitting_text(plan)}")
