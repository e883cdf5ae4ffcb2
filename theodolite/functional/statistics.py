"""Comparing arms over seeds and problems, and saying what so few seeds cannot show.

The unit that varies independently is the *training run*: samples of one run share a model. Tests here therefore work on one number per
seed, paired by seed; :func:`literal_paired_t_test` alone pools samples, because publications do, and says so in its label.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, stats

Alternative = Literal["two-sided", "less", "greater"]

EXACT_SEEDS = 16
"""Up to so many pairs every sign pattern is counted (65,536); beyond, patterns are drawn."""


@dataclass(frozen=True, slots=True)
class Spread:
    """Mean over seeds and its sample standard deviation (n - 1 in the denominator; ``None`` below two seeds)."""

    n: int
    mean: float | None
    sd: float | None


@dataclass(frozen=True, slots=True)
class PairedTest:
    """The outcome of one paired comparison.

    Attributes:
        label: What was tested, and what it does not account for.
        n: Number of pairs.
        mean: Mean difference.
        low: Lower end of the interval at the confidence asked for; ``None`` where it is not defined.
        high: Upper end.
        p_value: Of the null hypothesis of no difference; NaN where it is not defined.
        independent: The pairs are independent draws, as the test assumes.
    """

    label: str
    n: int
    mean: float
    low: float | None
    high: float | None
    p_value: float
    independent: bool


def spread(values: Sequence[float | None]) -> Spread:
    r"""Mean :math:`\bar x` and :math:`s = \sqrt{\sum_i (x_i - \bar x)^2 / (n - 1)}` of the values that were measured."""
    known = [value for value in values if value is not None]
    if not known:
        return Spread(0, None, None)
    mean = math.fsum(known) / len(known)
    if len(known) == 1:
        return Spread(1, mean, None)
    return Spread(len(known), mean, math.sqrt(math.fsum((value - mean) ** 2 for value in known) / (len(known) - 1)))


def t_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float | None, float | None]:
    r"""Two-sided Student interval :math:`\bar x \pm t_{n-1}\, s / \sqrt n`; ``(None, None)`` below two values."""
    summary = spread(values)
    if summary.mean is None or summary.sd is None:
        return None, None
    half = float(stats.t.ppf(0.5 + confidence / 2, summary.n - 1)) * summary.sd / math.sqrt(summary.n)
    return summary.mean - half, summary.mean + half


def seed_level_t_test(
    arm: ArrayLike, control: ArrayLike, *, alternative: Alternative = "two-sided", confidence: float = 0.95
) -> PairedTest:
    r"""Student's paired test with one number per seed, :math:`t = \bar d \sqrt n / s_d` with :math:`n - 1` degrees of freedom.

    Args:
        arm: One value per seed, ``(n,)``.
        control: The control's values of the same seeds, in the same order.
        alternative: ``less`` asks whether the arm is lower.
        confidence: Of the interval, which is two-sided whatever the alternative.

    Raises:
        ValueError: The arms have unequal numbers of seeds, or fewer than two.
    """
    differences = _paired(arm, control)
    low, high = t_interval(differences.tolist(), confidence)
    label = "paired t-test over seeds"
    return PairedTest(label, differences.size, float(differences.mean()), low, high, _t_p_value(differences, alternative), True)


def literal_paired_t_test(arm: ArrayLike, control: ArrayLike, *, alternative: Alternative = "two-sided") -> PairedTest:
    """The paired t-test over seeds x samples that publications report: 3 seeds with 10 samples count as 30 pairs.

    Samples of one seed share a trained model, so they are not independent, and the p-value is too small: it is given for comparison and
    labelled.

    Args:
        arm: Rates ``(seeds, samples)``: entry ``[s, j]`` is the rate over problems of the j-th sample of seed s.
        control: The control's, of the same shape and order.
        alternative: As in :func:`seed_level_t_test`.

    Raises:
        ValueError: The shapes differ, or there are fewer than two pairs.
    """
    first, second = np.asarray(arm, dtype=np.float64), np.asarray(control, dtype=np.float64)
    if first.ndim != 2 or first.shape != second.shape:
        raise ValueError(f"both arms must be (seeds, samples) of one shape, not {first.shape} and {second.shape}.")
    differences = _paired(first.ravel(), second.ravel())
    low, high = t_interval(differences.tolist())
    label = f"paired t-test over {first.shape[0]} seeds x {first.shape[1]} samples, not independent: samples of a seed share a model"
    return PairedTest(label, differences.size, float(differences.mean()), low, high, _t_p_value(differences, alternative), False)


def sign_flip_test(
    arm: ArrayLike, control: ArrayLike, *, alternative: Alternative = "two-sided", n_draws: int = 100_000, seed: int = 0
) -> PairedTest:
    r"""Permutation test of paired differences: under the null each sign is as likely as its opposite.

    .. math:: p = \#\{\sigma \in \{\pm 1\}^n : T(\sigma d) \ge T(d)\} / 2^n

    exactly for up to :data:`EXACT_SEEDS` seeds, else over ``n_draws`` random patterns plus the observed one. The smallest two-sided
    p-value is :math:`2^{1-n}`: three seeds cannot reach .05 whatever they show.

    Raises:
        ValueError: As in :func:`seed_level_t_test`.
    """
    differences = _paired(arm, control)
    n = differences.size
    if n <= EXACT_SEEDS:
        signs = np.array(list(itertools.product((1.0, -1.0), repeat=n)))
    else:
        drawn = np.random.Generator(np.random.Philox(seed)).choice((1.0, -1.0), size=(n_draws, n))
        signs = np.concatenate([np.ones((1, n)), drawn])
    sums = signs @ differences
    sums = {"two-sided": np.abs(sums), "greater": sums, "less": -sums}[alternative]
    # equal sums must count as equal whatever the order in which they were added
    tolerance = 1e-12 * max(float(np.abs(differences).sum()), 1e-300)
    p_value = float((sums >= sums[0] - tolerance).mean())
    return PairedTest("sign-flip permutation test over seeds", n, float(differences.mean()), None, None, p_value, True)


def crossed_bootstrap(
    arm: ArrayLike, control: ArrayLike, *, n_resamples: int = 10_000, confidence: float = 0.95, seed: int = 0
) -> PairedTest:
    r"""Interval of the mean difference when both seeds and problems are draws (crossed clusters), by their bootstrap standard error.

    Every resample draws seeds and problems with replacement, independently; a cell's weight is the product of both counts. The same
    resample serves both arms. With :math:`\hat\sigma^*` the standard deviation of the resampled means and S seeds,

    .. math:: \bar d \pm t_{S-1}\, \hat\sigma^* \sqrt{S / (S - 1)}

    A percentile interval of so few clusters is far too narrow; the factor makes this one equal the seed-level t interval when problems
    and samples contribute nothing, and wider when they do. Resampling both ways counts the noise of single cells three times (Owen 2007,
    Annals of Applied Statistics 1), so the test errs on the side of not rejecting.

    Args:
        arm: Rates ``(seeds, problems)``: entry ``[s, i]`` is the rate over the samples of problem i under seed s.
        control: The control's, same seeds and problems in the same order.
        n_resamples: Number of bootstrap resamples.
        confidence: Of the interval.
        seed: Of the resampling.

    Raises:
        ValueError: The shapes differ, or there are fewer than two seeds or problems.
    """
    first, second = np.asarray(arm, dtype=np.float64), np.asarray(control, dtype=np.float64)
    if first.ndim != 2 or first.shape != second.shape or min(first.shape) < 2:
        raise ValueError(f"both arms must be (seeds, problems) of one shape with at least 2 of each, not {first.shape} and {second.shape}.")
    differences = first - second
    n_seeds, n_problems = differences.shape
    generator = np.random.Generator(np.random.Philox(seed))
    seed_counts = generator.multinomial(n_seeds, np.full(n_seeds, 1 / n_seeds), size=n_resamples)
    problem_counts = generator.multinomial(n_problems, np.full(n_problems, 1 / n_problems), size=n_resamples)
    means = np.einsum("rs,sp,rp->r", seed_counts, differences, problem_counts, optimize=True) / differences.size
    mean = float(differences.mean())
    error = float(means.std()) * math.sqrt(n_seeds / (n_seeds - 1))
    half = float(stats.t.ppf(0.5 + confidence / 2, n_seeds - 1)) * error
    p_value = 2 * float(stats.t.sf(abs(mean) / error, n_seeds - 1)) if error > 0 else (1.0 if mean == 0 else math.nan)
    label = "bootstrap over seeds and problems"
    return PairedTest(label, n_seeds, mean, mean - half, mean + half, p_value, True)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    r"""Holm's step-down adjustment, which bounds the chance of any false rejection over all comparisons.

    .. math:: \tilde p_{(i)} = \max_{j \le i} \min(1, (m - j + 1)\, p_{(j)})

    Args:
        p_values: One per comparison. NaN (not defined) stays NaN and does not count as a comparison.

    Source:
        Holm 1979, Scandinavian Journal of Statistics 6.
    """
    known = sorted((p, name) for name, p in p_values.items() if not math.isnan(p))
    adjusted: dict[str, float] = {}
    largest = 0.0
    for rank, (p, name) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * p))
        adjusted[name] = largest
    return {name: adjusted.get(name, math.nan) for name in p_values}


def resolvable_difference(sd: float, n: int, power: float = 0.8) -> tuple[float, float] | None:
    r"""How small a paired difference ``n`` seeds can resolve when differences have standard deviation ``sd``.

    Returns:
        The half-width :math:`t_{.975, n-1}\, s / \sqrt n` of the 95 % interval, and the true difference :math:`\delta` that a two-sided
        5 % t test detects with probability ``power`` (noncentral t with :math:`\delta \sqrt n / s`); ``None`` below two seeds or
        without spread.
    """
    if n < 2 or sd <= 0:
        return None
    critical = float(stats.t.ppf(0.975, n - 1))

    def shortfall(noncentrality: float) -> float:
        return float(stats.nct.sf(critical, n - 1, noncentrality)) - power

    upper = 2.0
    while shortfall(upper) < 0:
        upper *= 2
    noncentrality = float(optimize.brentq(shortfall, 0.0, upper, xtol=1e-9))  # pyright: ignore[reportArgumentType]
    scale = sd / math.sqrt(n)
    return critical * scale, noncentrality * scale


def matched(pass_rate: float, reference: float, tolerance: float = 0.05) -> bool:
    """Whether two pass rates count as matched: they differ by at most ``tolerance`` (both ends included).

    A claim "X lowers the hack rate" holds *at matched pass rate* only where this is true of X and what it is compared with; an arm that
    hacks less because it can do less does not satisfy it.
    """
    return abs(pass_rate - reference) <= tolerance + 1e-12


def _paired(arm: ArrayLike, control: ArrayLike) -> NDArray[np.float64]:
    first, second = np.asarray(arm, dtype=np.float64), np.asarray(control, dtype=np.float64)
    if first.ndim != 1 or first.shape != second.shape:
        raise ValueError(f"arms with unequal seeds are never compared: {first.shape} against {second.shape} values.")
    if first.size < 2:
        raise ValueError(f"a paired test needs at least 2 seeds, not {first.size}.")
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise ValueError("a paired test needs finite values; leave out seeds that were not measured, in both arms.")
    return first - second


def _t_p_value(differences: NDArray[np.float64], alternative: Alternative) -> float:
    """NaN when all differences are equal but not zero (no spread, so no t); 1 when all are zero."""
    if not differences.any():
        return 1.0
    if np.ptp(differences) == 0:
        return math.nan
    return float(stats.ttest_1samp(differences, 0.0, alternative=alternative).pvalue)  # pyright: ignore[reportAttributeAccessIssue]
