"""Moduli: the primes that size the table part of each hash head."""

from collections.abc import Sequence

from engram_store.errors import RecipeError

_WITNESSES = (2, 3, 5, 7)


def is_prime(number: int) -> bool:
    """Whether `number` is prime; exact for every number below 3,215,031,751.

    Source: Pomerance, Selfridge, Wagstaff, "The pseudoprimes to 25*10^9" (1980): four
    witnesses decide that range. Table parts are smaller: row ids fit 31 bits.
    """
    if number < 2:
        return False
    for witness in _WITNESSES:
        if number % witness == 0:
            return number == witness
    twos = ((number - 1) & (1 - number)).bit_length() - 1
    odd = (number - 1) >> twos
    return all(_passes(number, witness, odd, twos) for witness in _WITNESSES)


def _passes(number: int, witness: int, odd: int, twos: int) -> bool:
    """Whether Miller-Rabin finds no proof against `number`, where number - 1 = odd * 2^twos."""
    power = pow(witness, odd, number)
    if power in (1, number - 1):
        return True
    for _ in range(twos - 1):
        power = power * power % number
        if power == number - 1:
            return True
    return False


def distinct_moduli(
    bases: Sequence[int], *, heads: int, layers: int
) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """The primes of all heads of a model: none is used twice, whatever the layer.

    For every layer and order the search starts again at the order's base and steps over the
    primes taken before, so the result depends on all layers at once and on their sequence.

    Source: `find_next_prime` and `calculate_vocab_size_across_layers` of the official demo.

    Args:
        bases: by order, the smallest allowed prime: the wanted rows of one head.
        heads: hash heads of each order.
        layers: how many layers share the pool of primes.

    Returns:
        [layers][orders][heads].

    Raises:
        RecipeError: a base is below 2, or a layer has too many rows for 31-bit row ids.
    """
    for base in bases:
        if not 2 <= base < 2**31:
            raise RecipeError(f"rows per head must be 2 to {2**31 - 1:,}, got {base:,}")
    taken: set[int] = set()
    # Everything from a base up to its last find is composite or taken, so that a search from
    # the same base goes on there: same primes, without walking the stretch again.
    last = {base: base - 1 for base in bases}

    def next_free(base: int) -> int:
        candidate = last[base] + 1
        while candidate in taken or not is_prime(candidate):
            candidate += 1
        last[base] = candidate
        taken.add(candidate)
        return candidate

    def of_layer() -> tuple[tuple[int, ...], ...]:
        # Refused here, because millions of heads would take hours to find their primes.
        rows = 0
        orders = []
        for base in bases:
            primes = []
            for _ in range(heads):
                primes.append(next_free(base))
                rows += primes[-1]
                if rows >= 2**31:
                    raise RecipeError(
                        f"{heads:,} heads for each of {len(bases)} orders, with {list(bases)} rows "
                        f"or more, need more than the {2**31 - 1:,} rows of a table"
                    )
            orders.append(tuple(primes))
        return tuple(orders)

    return tuple(of_layer() for _ in range(layers))
