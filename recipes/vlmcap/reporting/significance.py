"""Which scores of two runs differ by more than chance."""

from collections.abc import Sequence

from vlmcap.evaluation.scoring import SCORE_LABELS, paired_comparison
from vlmcap.reporting.runs import ScoredRun

SIGNIFICANT = 0.05


def compare_with(reference: str, runs: Sequence[ScoredRun], resamples: int = 1000) -> dict[str, dict[str, dict]]:
    """Run -> score -> {"difference", "interval", "p_value", "p_holm"}, each run against the one named `reference`.

    p values are of `paired_comparison`; "p_holm" is Holm's correction over the runs compared, for each score.
    """
    base = next(run for run in runs if run.name == reference)
    tests = {
        run.name: paired_comparison(run.metrics, base.metrics, resamples=resamples)
        for run in runs
        if run.name != reference
    }
    for key in SCORE_LABELS:
        tested = [test[key] for test in tests.values() if key in test]
        for test, adjusted in zip(tested, holm([test["p_value"] for test in tested]), strict=True):
            test["p_holm"] = adjusted
    return tests


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction: for p_(1) <= ... <= p_(m), max over j <= i of min(1, (m - j + 1) p_(j)).

    S. Holm, A simple sequentially rejective multiple test procedure, Scandinavian Journal of Statistics 6 (1979).
    """
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted
