"""Which trial is the best: objectives, constraints, Pareto front, noise between seeds, early stopping."""

from typing import Any

import pytest

from pipeline.errors import UserError
from pipeline.run_folder import TrialOutcome
from pipeline.training.config import TrainConfig
from pipeline.tuning.config import TuneConfig
from pipeline.tuning.ranking import compare_trials, in_order
from pipeline.tuning.rungs import is_weak, require_rungs, rungs


def trial(number: int, status: str = "finished", repeats: str = "", **metrics: float) -> TrialOutcome:
    return TrialOutcome(f"trial-{number}", None, {}, status, 10, metrics, number=number, repeats=repeats)


def settings(**changes: Any) -> TuneConfig:
    return TuneConfig.model_validate(changes)


def test_the_best_trial_by_the_direction_of_its_metric() -> None:
    trials = [
        trial(1, psnr_y=20.0, lpips=0.3),
        trial(2, psnr_y=21.0, lpips=0.2),
        trial(3, psnr_y=22.0, lpips=0.4),
    ]
    assert compare_trials(settings(), trials).best == "trial-3"
    assert compare_trials(settings(metrics=["lpips"]), trials).best == "trial-2"


def test_stopped_failed_and_unmeasured_trials_are_never_the_best() -> None:
    trials = [
        trial(1, psnr_y=20.0),
        trial(2, "stopped", psnr_y=30.0),
        trial(3, "failed", psnr_y=40.0),
        trial(4, psnr_y=float("nan")),
        trial(5),
    ]
    ranking = compare_trials(settings(), trials)
    assert [each.trial.number for each in ranking.candidates] == [1]
    assert compare_trials(settings(), trials[1:]).best == ""


def test_constraints_exclude_trials() -> None:
    trials = [
        trial(1, psnr_y=24.0, lpips=0.1),
        trial(2, psnr_y=24.5, lpips=0.2),
        trial(3, psnr_y=25.0, lpips=0.3),
    ]
    lowest = settings(metrics=["lpips"], constraints=["psnr_y >= 24.5"])
    assert compare_trials(lowest, trials).best == "trial-2"
    assert compare_trials(settings(metrics=["lpips"], constraints=["psnr_y >= 26"]), trials).best == ""
    assert compare_trials(settings(constraints=["lpips <= 2.5e-1"]), trials).best == "trial-2"


def test_the_pareto_front_and_its_knee() -> None:
    trials = [
        trial(1, psnr_y=26.0, lpips=0.40),
        trial(2, psnr_y=25.8, lpips=0.22),
        trial(3, psnr_y=24.0, lpips=0.20),
        trial(4, psnr_y=25.0, lpips=0.30),  # worse than trial 2 in both
    ]
    ranking = compare_trials(settings(metrics=["psnr_y", "lpips"]), trials)
    assert ranking.front == ("trial-1", "trial-2", "trial-3")
    assert ranking.best == "trial-2"


def repetition(number: int, of: str, seed: int, **metrics: float) -> TrialOutcome:
    return TrialOutcome(
        f"trial-{number}", None, {"seed": seed}, "finished", 10, metrics, number=number, repeats=of
    )


def test_differences_within_the_noise_between_seeds_are_a_tie() -> None:
    # Seed 7 is better by 0.5 dB for all trials, which does not make their order uncertain.
    trials = [
        trial(1, psnr_y=20.00), repetition(11, "trial-1", 7, psnr_y=20.60),
        trial(2, psnr_y=20.05), repetition(12, "trial-2", 7, psnr_y=20.45),
        trial(3, psnr_y=18.00),
    ]  # fmt: skip
    ranking = compare_trials(settings(), trials)
    assert ranking.best == "trial-1"
    assert ranking.noise == {"psnr_y": pytest.approx(0.1, abs=1e-9)}
    assert ranking.tied == ("trial-1", "trial-2")
    third = ranking.of("trial-3")
    assert third is not None
    assert third.means["psnr_y"] == pytest.approx(18.25)
    assert compare_trials(settings(), [each for each in trials if not each.repeats]).tied == ()


def test_a_single_repeated_trial_is_compared_by_its_mean() -> None:
    trials = [trial(1, psnr_y=21.0), repetition(11, "trial-1", 7, psnr_y=19.0), trial(2, psnr_y=20.5)]
    ranking = compare_trials(settings(), trials)
    assert ranking.best == "trial-2"
    assert [each.means["psnr_y"] for each in ranking.candidates] == [20.5, 20.0]


def test_constraints_are_checked_on_what_was_measured() -> None:
    # Seed 7 is better by 2 dB for the repeated trials; the third one was measured without it.
    trials = [
        trial(1, psnr_y=24.0), repetition(11, "trial-1", 7, psnr_y=26.0),
        trial(2, psnr_y=24.2), repetition(12, "trial-2", 7, psnr_y=26.2),
        trial(3, psnr_y=23.5),
    ]  # fmt: skip
    ranking = compare_trials(settings(constraints=["psnr_y >= 24"]), trials)
    assert [each.trial.run_name for each in ranking.candidates] == ["trial-2", "trial-1"]


def test_trials_are_ordered_from_the_best_with_their_repetitions_and_excluded_ones_last() -> None:
    trials = [
        trial(1, "failed"), trial(2, "stopped", psnr_y=30.0),
        trial(3, psnr_y=23.0),  # violates the constraint
        trial(4, psnr_y=24.0), trial(5, psnr_y=25.5), repetition(6, "trial-5", 7, psnr_y=24.9), trial(7, psnr_y=25.3),
    ]  # fmt: skip
    ranking = compare_trials(settings(constraints=["psnr_y >= 24"]), trials)
    assert [each.number for each in in_order(trials, ranking)] == [7, 5, 6, 4, 3, 2, 1]
    assert ranking.repeated_means() == {"trial-5": {"psnr_y": pytest.approx(25.2)}}


def test_a_difference_larger_than_the_noise_is_not_a_tie() -> None:
    trials = [
        trial(1, psnr_y=20.00), repetition(11, "trial-1", 7, psnr_y=20.51),
        trial(2, psnr_y=21.00), repetition(12, "trial-2", 7, psnr_y=21.50),
    ]  # fmt: skip
    assert compare_trials(settings(), trials).tied == ("trial-2",)


def test_rungs_multiply_and_end_before_the_last_step() -> None:
    asha = settings(scheduler="asha", grace_steps=100, reduction_factor=3)
    assert rungs(asha, 1000) == [100, 300, 900]
    assert rungs(asha, 900) == [100, 300]
    assert rungs(asha, 100) == []


def test_a_trial_must_be_among_the_best_third_at_a_rung() -> None:
    def weak(own: dict[int, float], *others: dict[int, float], metric: str = "psnr_y") -> bool:
        asha = settings(scheduler="asha", grace_steps=100, reduction_factor=3, metrics=[metric])
        return is_weak(asha, 1000, own, others)

    assert not weak({100: 20.0})
    assert weak({100: 20.0}, {100: 21.0})
    assert not weak({100: 20.0}, {100: 21.0}, metric="lpips")
    assert not weak({100: 21.0}, {100: 20.0}, {100: 19.0})
    # Between rungs nothing is decided; values at the rung count, not later ones.
    assert not weak({100: 22.0, 200: 1.0}, {100: 21.0})
    assert not weak({120: 20.0}, {110: 19.0, 300: 99.0})
    assert not weak({50: 0.0}, {100: 21.0})
    # A trial that is about to finish is not stopped.
    assert not weak({1000: 0.0}, {100: 1.0, 900: 21.0})
    assert weak({100: float("nan")})


def test_early_stopping_without_a_validation_to_stop_at_is_refused() -> None:
    config = TrainConfig.model_validate(
        {"psnr": {"steps": 100}, "gan": {"steps": 200}, "validate_every_steps": 100}
    )
    require_rungs(settings(scheduler="asha", grace_steps=50), config)
    require_rungs(settings(grace_steps=500), config)
    with pytest.raises(
        UserError, match=r"tune\.grace_steps=150: no validation of the gan stage .* \(200 steps\)"
    ):
        require_rungs(settings(scheduler="asha", grace_steps=150), config)
