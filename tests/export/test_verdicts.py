"""How often equals are called different, and a true difference is found: the verdict's own arithmetic on synthetic rounds.

A round's time is the machine's (shared by both, it cancels), the opening's luck (which stays until it is closed), the round's own noise,
which remembers the round before, and heavy tails.
"""

import numpy as np
import pytest

from export.stopwatch.bench_case import Case, Timed
from export.stopwatch.bench_rows import comparison_rows

OPENINGS, ROUNDS = 5, 4  # as the stopwatch does it: 20 rounds


def rounds(random, rate, luck, noise, memory, machine):
    found = {}
    previous = 0.0
    for o in range(OPENINGS):
        opening = random.normal(0, luck)
        for r in range(ROUNDS):
            previous = memory * previous + random.normal(0, noise) * (1 - memory**2) ** 0.5
            tail = 0.3 if random.random() < 0.03 else 0.0  # somebody else woke up
            centre = np.log(rate) + opening + previous + tail + machine[o * ROUNDS + r]
            found[o, o * ROUNDS + r] = np.exp(centre + random.normal(0, noise, 8))
    return found


def share_called(rate, luck, noise, memory, trials):
    """Share of comparisons that end in FASTER or SLOWER; the noise floor is that of one twin, as in a run."""
    random, called = np.random.default_rng(20), 0
    for _ in range(trials):
        machine = np.cumsum(random.normal(0, 0.02, OPENINGS * ROUNDS))
        a, b, twin = (
            Timed(Case("s", name, 32, None), 1, {}, rounds(random, r, luck, noise, memory, machine))
            for name, r in (("onnx-int8", rate), ("onnx-fp32", 1.0), ("twin", 1.0))
        )
        (of_twin,) = (r for r in comparison_rows([twin, b], 0.0, ("s", "onnx-fp32")))
        floor = max(of_twin.value, 1 / of_twin.value) - 1
        (row,) = comparison_rows([a, b], floor)
        called += row.conditions["verdict"] != "INCONCLUSIVE"
    return called / trials


@pytest.mark.parametrize(
    ("luck", "noise", "memory"),
    [(0.0, 0.02, 0.0), (0.0, 0.02, 0.8), (0.01, 0.005, 0.5), (0.06, 0.05, 0.8)],  # the last: both processors taken by others
)
def test_equals_are_called_different_in_at_most_5_percent(luck, noise, memory):
    assert share_called(1.0, luck, noise, memory, trials=400) <= 0.05


def test_a_true_difference_of_5_percent_is_found_on_a_quiet_machine():
    assert share_called(1.05, luck=0.005, noise=0.01, memory=0.5, trials=400) >= 0.8
    assert share_called(1 / 1.05, luck=0.01, noise=0.01, memory=0.0, trials=100) >= 0.8
