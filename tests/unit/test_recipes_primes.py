"""The moduli of hash heads."""

import pytest

from engram_store.errors import RecipeError
from engram_store.recipes.primes import distinct_moduli, is_prime


def test_is_prime_agrees_with_a_sieve_below_10000() -> None:
    sieve = [False, False, *[True] * 9_998]
    for factor in range(2, 100):
        if sieve[factor]:
            sieve[factor * factor :: factor] = [False] * len(range(factor * factor, 10_000, factor))
    assert [is_prime(number) for number in range(10_000)] == sieve


@pytest.mark.parametrize(
    "pseudoprime", [2_047, 1_373_653, 25_326_001, 1_309, 561, 8_911, 41_041, 2_147_483_641]
)
def test_composites_that_fool_single_witnesses_are_recognised(pseudoprime: int) -> None:
    assert not is_prime(pseudoprime)


@pytest.mark.parametrize("prime", [2, 3, 5, 7, 16_000_057, 20_000_003, 2_147_483_647])
def test_primes_are_recognised(prime: int) -> None:
    assert is_prime(prime)


def test_no_prime_is_used_twice_and_each_order_starts_at_its_own_base() -> None:
    assert distinct_moduli([10, 12], heads=2, layers=2) == (
        ((11, 13), (17, 19)),
        ((23, 29), (31, 37)),
    )


def test_an_order_with_a_lower_base_fills_the_gap_below() -> None:
    """Searches restart at each base; they do not run on from the last prime."""
    assert distinct_moduli([100, 10], heads=2, layers=1) == (((101, 103), (11, 13)),)


@pytest.mark.parametrize("base", [1, 0, -5, 2**31])
def test_bases_without_31_bit_primes_are_refused(base: int) -> None:
    with pytest.raises(RecipeError):
        distinct_moduli([base], heads=1, layers=1)
