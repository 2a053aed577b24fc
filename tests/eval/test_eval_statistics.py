"""Estimators against brute force and closed forms, intervals against simulated coverage."""

import math
from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fura_rl.eval import statistics as stats

REPETITIONS = 4_000  # standard error of a coverage of 95%: 0.34 points


def coverage(draw_interval, repetitions=REPETITIONS):
    """Share of repetitions whose interval holds the truth; `draw_interval(rng)` returns (interval, truth)."""
    rng = np.random.default_rng(20)
    hits = 0
    for _ in range(repetitions):
        interval, truth = draw_interval(rng)
        hits += interval.low <= truth <= interval.high
    return hits / repetitions


@pytest.mark.parametrize("problems", [30, 40, 500])
def test_wilson_covers_95_percent(problems):
    def draw(rng):
        truth = rng.uniform(0.05, 0.95)
        return stats.wilson(int(rng.binomial(problems, truth)), problems), truth

    assert coverage(draw) == pytest.approx(0.95, abs=0.01)


@pytest.mark.parametrize("problems", [5, 30, 80])
@pytest.mark.parametrize("truth", [0.02, 0.3, 0.5, 0.97])
def test_exact_interval_never_covers_less_than_95_percent(problems, truth):
    """No simulation: the coverage is a sum over all outcomes."""
    covered = 0.0
    for k in range(problems + 1):
        interval = stats.exact(k, problems)
        if interval.low <= truth <= interval.high:
            covered += math.comb(problems, k) * truth**k * (1 - truth) ** (problems - k)
    assert covered >= 0.95


def test_exact_interval_has_the_published_values():
    # 0 of 10: 1 - 0.025 ** (1 / 10); 1 of 10 and 5 of 10 from Clopper and Pearson's tables.
    assert stats.exact(0, 10) == pytest.approx((0.0, 1 - 0.025**0.1), abs=1e-9)
    assert stats.exact(1, 10) == pytest.approx((0.0025, 0.4450), abs=1e-4)
    assert stats.exact(5, 10) == pytest.approx((0.1871, 0.8129), abs=1e-4)


@given(st.integers(1, 300).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_intervals_hold_the_estimate_and_mirror(counts):
    k, n = counts
    for method in (stats.wilson, stats.exact):
        low, high = method(k, n)
        assert 0.0 <= low <= k / n <= high <= 1.0
        mirrored = method(n - k, n)
        assert (1 - mirrored.high, 1 - mirrored.low) == pytest.approx((low, high), abs=1e-9)


@pytest.mark.parametrize(
    ("problems", "samples", "alpha", "beta"),
    [(30, 8, 0.5, 1.5), (30, 8, 1.5, 0.5), (40, 32, 1.0, 1.0), (100, 4, 0.5, 0.5)],
)
def test_bootstrap_over_problems_covers_95_percent(problems, samples, alpha, beta):
    """Problems of Beta-distributed difficulty, k samples each: the model behind avg@k."""

    def draw(rng):
        means = rng.binomial(samples, rng.beta(alpha, beta, problems)) / samples
        return stats.mean_interval(means, draws=1_000, seed=int(rng.integers(2**31))), alpha / (alpha + beta)

    assert coverage(draw) == pytest.approx(0.95, abs=0.01)


def test_paired_bootstrap_covers_95_percent():
    def draw(rng):
        a = rng.binomial(8, rng.beta(0.5, 1.0, 40)) / 8
        b = rng.binomial(8, rng.beta(0.6, 1.0, 40)) / 8
        truth = 0.6 / 1.6 - 0.5 / 1.5
        return stats.paired_bootstrap(a, b, draws=1_000, seed=int(rng.integers(2**31))), truth

    assert coverage(draw) == pytest.approx(0.95, abs=0.01)


def test_bootstrap_agrees_with_every_resample_of_a_small_sample():
    values = np.array([0.0, 0.25, 0.25, 0.5, 1.0])
    every = np.array([np.mean(pick) for pick in product(values, repeat=5)])
    drawn = stats._bootstrap_means(values[:, None], 200_000, seed=0)[:, 0]
    for point in np.linspace(0.01, 0.99, 50):  # between the possible means
        assert (drawn < point).mean() == pytest.approx((every < point).mean(), abs=0.005)


def test_bootstrap_is_seeded_and_columns_do_not_disturb_each_other():
    values = np.random.default_rng(3).random((30, 3))
    assert stats.bootstrap(values) == stats.bootstrap(values)
    assert stats.bootstrap(values)[1] == pytest.approx(stats.bootstrap(values[:, 1])[0])


def test_nothing_solved_is_not_certainty():
    """0 of 30 problems in 8 samples each: the bootstrap alone would say [0, 0]."""
    assert stats.mean_interval(np.zeros(30)) == stats.wilson(0, 30)
    assert stats.mean_interval(np.zeros(30)).high > 0.1
    same = stats.paired_bootstrap(np.ones(30) / 2, np.ones(30) / 2)
    assert same.low == -same.high and same.high == pytest.approx(stats.exact(0, 30).high)


@pytest.mark.parametrize(
    ("degrees", "quantile"),
    [(1, 12.706205), (2, 4.302653), (4, 2.776445), (8, 2.306004), (29, 2.045230), (30, 2.042272), (99, 1.984217)],
)
def test_student_t_quantiles(degrees, quantile):
    assert stats.student_t(0.975, degrees) == pytest.approx(quantile, abs=2e-6)


def test_an_interval_over_five_seeds():
    """By hand: mean 3, standard deviation sqrt(2.5), 2.776445 * sqrt(2.5 / 5)."""
    low, high = stats.t_interval([1, 2, 3, 4, 5])
    assert low == pytest.approx(3 - 1.963243, abs=1e-5) and high == pytest.approx(3 + 1.963243, abs=1e-5)
    with pytest.raises(ValueError, match="at least two"):
        stats.t_interval([0.5])


@pytest.mark.parametrize("seeds", [2, 5])
def test_coverage_of_an_interval_over_seeds(seeds):
    """95% of 4,000 intervals hold the mean, within three standard errors."""
    draws = np.random.default_rng(0).normal(size=(4000, seeds))
    held = np.mean([low <= 0 <= high for low, high in map(stats.t_interval, draws.tolist())])
    assert abs(held - 0.95) < 3 * (0.95 * 0.05 / 4000) ** 0.5


@given(st.lists(st.booleans(), min_size=1, max_size=9), st.data())
def test_pass_at_k_is_the_mean_over_all_subsets(correct, data):
    k = data.draw(st.integers(1, len(correct)))
    brute = np.mean([any(subset) for subset in combinations(correct, k)])
    assert stats.pass_at_k(sum(correct), len(correct), k) == pytest.approx(brute)


def majority_by_hand(groups, correct, voters):
    """Every tie-breaking order counts the same."""
    votes = {}
    for i in voters:
        if groups[i] is not None:
            votes.setdefault(groups[i], []).append(correct[i])
    if not votes:
        return 0.0
    top = max(len(v) for v in votes.values())
    return np.mean([any(v) for v in votes.values() if len(v) == top])


@given(st.lists(st.one_of(st.none(), st.integers(0, 3)), min_size=1, max_size=8), st.data())
def test_maj_at_k_is_the_mean_over_all_subsets(groups, data):
    k = data.draw(st.integers(1, len(groups)))
    correct = [group == 0 for group in groups]
    brute = np.mean([majority_by_hand(groups, correct, voters) for voters in combinations(range(len(groups)), k)])
    assert stats.maj_at_k(groups, correct, k) == pytest.approx(brute)


def test_maj_at_k_ties_silence_and_one_vote():
    assert stats.maj_at_k([0, 0, 1, 1], [True, True, False, False], 4) == 0.5
    assert stats.maj_at_k([0, 1, 2], [True, False, False], 3) == pytest.approx(1 / 3)
    assert stats.maj_at_k([None, None, 0], [False, False, True], 3) == 1.0
    assert stats.maj_at_k([None, None], [False, False], 2) == 0.0
    # One voter: maj@1 is the accuracy, a sample without an answer being wrong.
    assert stats.maj_at_k([0, 0, 1, None], [True, True, False, False], 1) == 0.5


def test_maj_at_k_samples_subsets_where_there_are_too_many():
    """32 samples, 8 voters: 10,518,300 subsets. Two answers only, so the truth is hypergeometric."""
    right, total, k = 14, 32, 8
    groups = [0] * right + [1] * (total - right)
    correct = [group == 0 for group in groups]
    weights = [math.comb(right, i) * math.comb(total - right, k - i) / math.comb(total, k) for i in range(k + 1)]
    truth = sum(weight * (1.0 if i > k - i else 0.5 if 2 * i == k else 0.0) for i, weight in enumerate(weights))
    estimate = stats.maj_at_k(groups, correct, k)
    assert estimate == pytest.approx(truth, abs=3 * math.sqrt(truth * (1 - truth) / stats.MAX_SUBSETS))
    assert estimate == stats.maj_at_k(groups, correct, k)


def permutation_by_hand(differences):
    observed = abs(sum(differences))
    sums = [
        abs(sum(s * d for s, d in zip(signs, differences, strict=True)))
        for signs in product((-1, 1), repeat=len(differences))
    ]
    return np.mean([s >= observed for s in sums])


@given(st.lists(st.integers(-4, 4), min_size=1, max_size=9))
def test_permutation_is_the_share_of_all_sign_flips(differences):
    assert stats.permutation(differences) == pytest.approx(permutation_by_hand(differences))


@given(st.integers(0, 60), st.integers(0, 60), st.integers(0, 40))
def test_mcnemar_is_the_permutation_test_of_single_samples(lost, gained, equal):
    assert stats.mcnemar(lost, gained) == pytest.approx(stats.permutation([1] * gained + [-1] * lost + [0] * equal))


def test_mcnemar_published_example():
    # 2 against 10 discordant pairs: 2 * (1 + 12 + 66) / 4096.
    assert stats.mcnemar(2, 10) == pytest.approx(2 * 79 / 4096)
    assert stats.mcnemar(0, 0) == 1.0
    assert stats.mcnemar(7, 7) == 1.0


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_decides_as_the_step_down_procedure(p_values):
    adjusted = stats.holm(p_values)
    for alpha in (0.01, 0.05, 0.2):
        rejected = set()
        for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
            if (len(p_values) - rank) * p_values[i] > alpha:
                break
            rejected.add(i)
        assert {i for i, p in enumerate(adjusted) if p <= alpha} == rejected


def test_holm_known_values():
    assert stats.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


@pytest.mark.parametrize("call", [lambda: stats.wilson(3, 2), lambda: stats.exact(0, 0), lambda: stats.wilson(-1, 2)])
def test_impossible_counts_are_refused(call):
    with pytest.raises(ValueError, match="successes"):
        call()


@pytest.mark.parametrize("counts", [(3, 2, 1), (1, 4, 5), (1, 4, 0)])
def test_impossible_pass_at_k_is_refused(counts):
    with pytest.raises(ValueError, match="pass@k"):
        stats.pass_at_k(*counts)
