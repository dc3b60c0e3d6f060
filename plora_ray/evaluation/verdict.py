"""What the numbers of an evaluation say, in plain words: one paragraph, honest when there is no gain. Knows comparisons only."""

from __future__ import annotations

from collections.abc import Sequence

from plora_ray.evaluation.comparison import (
    LABEL_PRIOR,
    MAJORITY,
    POPULATION,
    SHOWN_BELOW,
    SHUFFLED,
    WITH_USER,
    Comparison,
    Gain,
    Interval,
    examples_told,
)
from plora_ray.evaluation.user_gains import CHANCE

FEWEST_USERS = 10  # below it a bootstrap over users says little
CHANCE_PERCENT = 100 * CHANCE


def verdict(full: Comparison | None, few: Sequence[Comparison], zero: Comparison | None) -> str:
    """Sentences on whatever was evaluated."""
    parts = [_full(full) if full else "", _few(few) if few else "", _zero(zero) if zero else ""]
    return " ".join(part for part in parts if part)


def _full(comparison: Comparison) -> str:
    metric = _metric(comparison)
    gain = comparison.gains[POPULATION][metric]
    subject, population = (comparison.predictors[name].intervals[metric].mean for name in (WITH_USER, POPULATION))
    text = (
        f"On {comparison.rows:,} test rows of {_users(comparison)} in the generation, {_name(metric)} is "
        f"{_value(metric, subject)} with the user and {_value(metric, population)} without: {_judged(metric, gain, comparison.users)}"
        f"{_likelihood(comparison, POPULATION)}."
    )
    return text + _who(comparison) + _against_labels(comparison) + _against_trained(comparison)


def _who(comparison: Comparison) -> str:
    """Who gains and who loses, where there are users enough with rows enough to tell."""
    gains = comparison.user_gains
    if gains is None or gains.judged < FEWEST_USERS:
        return ""
    return (
        f" Of the {gains.judged:,} users with test rows enough to tell, {100 * gains.helped:.0f} % gain beyond noise and "
        f"{100 * gains.harmed:.0f} % lose; about {CHANCE_PERCENT} % would do either by chance."
    )


def _against_labels(comparison: Comparison) -> str:
    """Whether adapters are more than a habit of giving the same label."""
    if LABEL_PRIOR not in comparison.gains:
        return ""
    metric = _metric(comparison)
    gain = comparison.gains[LABEL_PRIOR][metric]
    reached = _value(metric, comparison.predictors[LABEL_PRIOR].intervals[metric].mean)
    if comparison.users < FEWEST_USERS:
        return f" The user's own past labels alone, without reading the text, reach {reached}."
    if _clear(gain) > 0:
        added = _difference(metric, gain)
        text = f" The user's own past labels alone, without reading the text, reach {reached}; the adapters add {added} to that"
    elif _clear(gain) < 0:
        worse = _difference(metric, _reversed(gain))
        text = f" But the user's own past labels alone, without the text, reach {reached}: the adapters are worse than that by {worse}"
    else:
        text = (
            f" But the user's own past labels alone, without reading the text, reach {reached}: "
            f"the adapters have not been shown to be better than that, with a difference of {_difference(metric, gain)}, p {gain.p:.2g}"
        )
    return f"{text}{_likelihood(comparison, LABEL_PRIOR)}."


def _likelihood(comparison: Comparison, over: str) -> str:
    """The same in negative log-likelihood, where accuracy was told: answers may be right more often and yet too sure."""
    if _metric(comparison) != "accuracy" or comparison.users < FEWEST_USERS:
        return ""
    return f"; in negative log-likelihood, {_judged('nll', comparison.gains[over]['nll'], comparison.users)}"


def _against_trained(comparison: Comparison, *, only_better: bool = False) -> str:
    """Which trained baselines answer better or worse on these rows beyond noise. The control with shuffled users is none.

    only_better: nothing where no baseline does better.
    """
    told = (POPULATION, LABEL_PRIOR, MAJORITY, SHUFFLED)
    gains = {name: found[comparison.loss] for name, found in comparison.gains.items() if name not in told}
    if not gains or comparison.users < FEWEST_USERS:
        return ""
    beaten = [name for name, gain in gains.items() if _clear(gain) > 0]
    better = [f"{name} (by {-gain.mean:.3g}, p {gain.p:.2g})" for name, gain in gains.items() if _clear(gain) < 0]
    if only_better and not better:
        return ""
    level = [name for name, gain in gains.items() if not _clear(gain)]
    text = f" Of {len(gains)} trained baseline{'' if len(gains) == 1 else 's'}, in {_name(comparison.loss)}, {len(beaten)} "
    text += f"{'is' if len(beaten) == 1 else 'are'} beaten beyond noise"
    text += f"; BETTER beyond noise: {', '.join(better)}" if better else ""
    return text + (f"; level: {', '.join(level)}." if level else ".")


def _few(points: Sequence[Comparison]) -> str:
    last = next((point for point in reversed(points) if point.users >= FEWEST_USERS), points[-1])
    metric = _metric(last)
    gain = last.gains[POPULATION][metric]
    text = (
        f"For users the generation has never met, {last.examples} of their own examples each bring {_name(metric)} to "
        f"{_value(metric, last.predictors[WITH_USER].intervals[metric].mean)} ({_users(last)}): {_judged(metric, gain, last.users)}"
        f"{_likelihood(last, POPULATION)}."
    )
    first = _clear_from(points, metric)
    if first is not None and first != last.examples:
        text += f" The gain is clear from {examples_told(first)} on."
    if any(point.users != last.users for point in points):
        text += " Users with fewer examples are left out of the later points, so compare each point with its own population figure."
    return text + _against_labels(last) + _against_trained(last, only_better=True)


def _clear_from(points: Sequence[Comparison], metric: str) -> int | None:
    """The fewest examples from which on every point with enough users shows a gain."""
    first = None
    for point in reversed([point for point in points if point.users >= FEWEST_USERS]):
        if _clear(point.gains[POPULATION][metric]) <= 0:
            break
        first = point.examples
    return first


def _zero(comparison: Comparison) -> str:
    metric = _metric(comparison)
    text = (
        f"New users without examples get the population's answer: {_name(metric)} "
        f"{_value(metric, comparison.predictors[POPULATION].intervals[metric].mean)} on {comparison.rows:,} rows of {_users(comparison)}"
    )
    if MAJORITY not in comparison.gains:
        return f"{text}.{_against_trained(comparison, only_better=True)}"
    gain, always = comparison.gains[MAJORITY][metric], "the mean label" if metric == "mse" else "the most frequent label"
    text += f"; against always answering {always}: {_judged(metric, gain, comparison.users)}{_likelihood(comparison, MAJORITY)}."
    return text + _against_trained(comparison, only_better=True)


def _metric(comparison: Comparison) -> str:
    """What people think in: accuracy of a classification, squared error of a regression."""
    return next(iter(comparison.predictors[POPULATION].intervals))


def _clear(gain: Gain) -> int:
    """1 for a gain, -1 for a loss, 0 where the interval or p (adjusted for the predictors compared) leave it open."""
    if gain.p >= SHOWN_BELOW:
        return 0
    return 1 if gain.low > 0 else -1 if gain.high < 0 else 0


def _judged(metric: str, gain: Gain, users: int) -> str:
    if users < FEWEST_USERS:
        few = "1 user is" if users == 1 else f"{users} users are"
        return f"a difference of {_difference(metric, gain)}, but {few} too few to conclude anything"
    if _clear(gain) > 0:
        return f"a gain of {_difference(metric, gain)}"
    if _clear(gain) < 0:
        return f"a LOSS of {_difference(metric, _reversed(gain))}"
    return f"no gain could be shown, with a difference of {_difference(metric, gain)}, p {gain.p:.2g}"


def _reversed(gain: Interval) -> Interval:
    return Interval(-gain.mean, -gain.high, -gain.low)


def _difference(metric: str, gain: Interval) -> str:
    if metric == "accuracy":
        return f"{100 * gain.mean:.1f} points (95 % interval {100 * gain.low:.1f} to {100 * gain.high:.1f})"
    return f"{gain.mean:.3g} (95 % interval {gain.low:.3g} to {gain.high:.3g})"


def _value(metric: str, value: float) -> str:
    return f"{100 * value:.1f} %" if metric == "accuracy" else f"{value:.4g}"


def _name(metric: str) -> str:
    return {"accuracy": "accuracy", "mse": "the mean squared error", "nll": "the negative log-likelihood"}[metric]


def _users(comparison: Comparison) -> str:
    return f"{comparison.users:,} user{'' if comparison.users == 1 else 's'}"
