"""The search space of a sweep: which values are drawn, which are refused, and that none is drawn twice."""

import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import UserError
from pipeline.run_folder import TrialOutcome, TrialPlan
from pipeline.training.config import TrainConfig
from pipeline.tuning.config import TuneConfig
from pipeline.tuning.proposals import as_database, number_of_trials, propose, startup_trials, study
from pipeline.tuning.space import (
    check_space,
    flag_text,
    from_optuna,
    grid,
    points,
    to_optuna,
    trial_config,
    trial_name,
)

BASE = TrainConfig.model_validate({"gan": {"steps": 100}, "psnr": {"steps": 100}})
PAPER = {"gan.pixel_weight": 1e-2, "gan.adversarial_weight": 5e-3}
WEIGHTS = {
    "gan.pixel_weight": {"low": 1e-3, "high": 1.0, "log": True},
    "gan.adversarial_weight": {"low": 1e-4, "high": 5e-2, "log": True},
}


def sweep(space: dict[str, Any], **changes: Any) -> TuneConfig:
    return TuneConfig.model_validate({"space": space, **changes})


def proposals(
    settings: TuneConfig, count: int, base: TrainConfig = BASE, known: list[TrialPlan] | None = None
) -> list[TrialPlan]:
    """Plans, each proposed after the earlier ones have ended; their PSNR is their adversarial weight."""
    plans = list(known or [])
    for number in range(len(plans), count):
        outcomes = {trial_name(plan.values): ended(plan) for plan in plans}
        values = propose(settings, base, plans, outcomes, {})
        if values is None:
            break
        plans.append(TrialPlan(number, values))
    return plans


def ended(plan: TrialPlan, **metrics: float) -> TrialOutcome:
    measured = metrics or {"psnr_y": plan.values.get("gan.adversarial_weight", 1.0), "ssim_y": 0.5}
    return TrialOutcome("trial", None, plan.values, "finished", 200, measured, number=plan.number)


def test_integer_and_quantized_ranges_and_choices_of_any_json_value() -> None:
    choices = [None, 0.5]
    layers = [{"conv5_4": 1.0}, {"conv4_4": 0.5, "conv5_4": 0.5}]
    settings = sweep(
        {
            "model.num_block": {"low": 1, "high": 3},
            "gan.pixel_weight": {"low": 0.1, "high": 0.7, "step": 0.2},
            "adam.clip_norm": {"choice": choices},
            "shuffle_channels": {"choice": [True, False]},
            "perceptual.layers": {"choice": layers},
            "gan.schedule.milestones": {"choice": [[10, 20], [50]]},
        },
        trials=40,
    )
    check_space(settings, BASE)
    drawn = [plan.values for plan in proposals(settings, 40)]
    assert {type(values["model.num_block"]) for values in drawn} == {int}
    assert {values["model.num_block"] for values in drawn} == {1, 2, 3}
    assert {round(values["gan.pixel_weight"], 9) for values in drawn} == {0.1, 0.3, 0.5, 0.7}
    assert {values["adam.clip_norm"] for values in drawn} == {None, 0.5}
    assert {values["shuffle_channels"] for values in drawn} == {True, False}
    for values in drawn:
        assert from_optuna(settings, to_optuna(settings, values)) == values
        assert values == json.loads(json.dumps(values))
        trial = trial_config(BASE, values)
        assert trial.perceptual.layers == values["perceptual.layers"]
        assert list(trial.gan.schedule.milestones) == values["gan.schedule.milestones"]


@pytest.mark.parametrize("search", ["random", "tpe"])
def test_no_values_are_tried_twice_and_a_small_space_ends(search: str) -> None:
    settings = sweep(
        {"model.residual_scale": {"choice": [0.1, 0.2]}, "model.num_block": {"low": 1, "high": 2}},
        trials=50,
        search=search,
    )
    assert number_of_trials(settings) == 4
    drawn = [plan.values for plan in proposals(settings, 50)]
    assert len(drawn) == 4
    assert all(values in drawn for values in grid(settings) or [])


def test_grid_runs_every_combination_in_order() -> None:
    settings = sweep(
        {
            "model.residual_scale": {"choice": [0.1, 0.2]},
            "gan.pixel_weight": {"low": 0.0, "high": 1.0, "step": 0.5},
        },
        search="grid",
        trials=99,
    )
    assert [tuple(plan.values.values()) for plan in proposals(settings, 99)] == [
        (0.1, 0.0), (0.1, 0.5), (0.1, 1.0), (0.2, 0.0), (0.2, 0.5), (0.2, 1.0)
    ]  # fmt: skip


def test_points_come_first_and_are_completed_from_the_configuration() -> None:
    settings = sweep(WEIGHTS, points=[{}, {"gan.pixel_weight": 0.5}], trials=3)
    first, second, third = (plan.values for plan in proposals(settings, 3))
    assert first == PAPER
    assert second == PAPER | {"gan.pixel_weight": 0.5}
    assert third not in (first, second)


def test_a_point_equals_a_choice_by_value() -> None:
    settings = sweep({"gan.pixel_weight": {"choice": [0.0, 1.0]}}, points=[{"gan.pixel_weight": 1}], trials=9)
    assert [json.dumps(plan.values) for plan in proposals(settings, 9)] == [
        '{"gan.pixel_weight": 1.0}', '{"gan.pixel_weight": 0.0}'
    ]  # fmt: skip


@pytest.mark.parametrize("search", ["random", "tpe"])
def test_invalid_values_inside_a_range_are_drawn_again(search: str) -> None:
    settings = sweep({"crop_px": {"low": 64, "high": 128}}, search=search, trials=12)
    drawn = [plan.values["crop_px"] for plan in proposals(settings, 12)]
    assert sorted(drawn) == [64, 96, 128]


def test_a_grid_excludes_invalid_combinations() -> None:
    settings = sweep({"crop_px": {"low": 64, "high": 128, "step": 8}}, search="grid", trials=9)
    assert [plan.values["crop_px"] for plan in proposals(settings, 9)] == [64, 96, 128]


def test_an_optional_integer_is_drawn_as_an_integer() -> None:
    settings = sweep({"gan.schedule.period_steps": {"low": 20, "high": 90}})
    base = TrainConfig.model_validate({"gan": {"steps": 100, "schedule": {"shape": "cosine"}}})
    for plan in proposals(settings, 4, base):
        assert type(plan.values["gan.schedule.period_steps"]) is int


@pytest.mark.parametrize("search", ["random", "tpe"])
@pytest.mark.parametrize("metrics", [["psnr_y"], ["psnr_y", "ssim_y"]])
def test_a_resumed_sweep_proposes_what_an_undisturbed_one_does(search: str, metrics: list[str]) -> None:
    settings = sweep(WEIGHTS, search=search, trials=12, metrics=metrics)
    undisturbed = proposals(settings, 12)
    assert proposals(settings, 12, known=undisturbed[:7]) == undisturbed
    assert proposals(settings, 12, BASE.model_copy(update={"seed": 1})) != undisturbed


def test_tpe_learns_from_the_trials_and_meets_constraints() -> None:
    settings = sweep(WEIGHTS, search="tpe", trials=40, constraints=["ssim_y >= 0.4"])
    values = [plan.values["gan.adversarial_weight"] for plan in proposals(settings, 40)]
    start = startup_trials(40)
    assert sum(values[-10:]) / 10 > 1.5 * sum(values[:start]) / start


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"gan.beauty": {"low": 0.1, "high": 1.0}}, "tune.space: gan.beauty: no such field"),
        ({"gan.pixel_weight": {"low": -1.0, "high": 1.0}}, "tune.space: gan.pixel_weight=-1.0"),
        ({"model.num_block": {"low": 1.5, "high": 3}}, "model.num_block: low=1.5: .*give a whole number"),
        ({"model.num_block": {"low": 1, "high": 3, "step": 0.5}}, "model.num_block: step=0.5"),
        ({"tune.trials": {"low": 1, "high": 2}}, "tune.space: tune: no such field"),
        ({"model.residual_scale": {"choice": ["much"]}}, "model.residual_scale"),
        ({"model.residual_scale": {"choice": [0.1, 0.1]}}, "model.residual_scale: a value is listed twice"),
        ({"workers": {"choice": [1, 2]}}, "tune.space: workers has no effect on what is trained"),
        ({"log_every_steps": {"low": 1, "high": 9}}, "log_every_steps has no effect"),
        ({"gan.allow_random_start": {"choice": [True, False]}}, "gan.allow_random_start has no effect"),
        ({"psnr.schedule.milestones": {"choice": [[1], [2]]}}, "psnr.schedule.milestones has no effect"),
        ({"precision": {"low": 1, "high": 2}}, "tune.space: precision"),
        ({"shuffle_channels": {"low": 0, "high": 1}}, r"shuffle_channels: true or false, .* use choice"),
        ({"use_gpu": {"choice": [False, True]}}, "use_gpu has no effect"),
    ],
)
def test_a_space_that_cannot_be_searched_is_refused(space: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        check_space(sweep(space), BASE)
    assert "\n" not in str(caught.value)


def test_fields_of_stage_2_have_no_effect_without_stage_2() -> None:
    base = BASE.model_copy(update={"gan": BASE.gan.model_copy(update={"steps": 0})})
    with pytest.raises(UserError, match=r"gan\.pixel_weight has no effect"):
        check_space(sweep(WEIGHTS), base)
    check_space(sweep({"psnr.learning_rate": {"low": 1e-4, "high": 1e-3}}), base)


@pytest.mark.parametrize("field", ["gan.discriminator_learning_rate", "gan.loss", "gan.pixel_loss"])
def test_fields_of_a_loss_without_weight_have_no_effect(field: str) -> None:
    values: dict[str, Any] = {
        "gan.discriminator_learning_rate": [1e-4, 1e-5],
        "gan.loss": ["relativistic", "vanilla"],
        "gan.pixel_loss": ["l1", "charbonnier"],
    }
    space = {field: {"choice": values[field]}}
    check_space(sweep(space), BASE)
    weights = {"adversarial_weight": 0.0, "pixel_weight": 0.0}
    base = BASE.model_copy(update={"gan": BASE.gan.model_copy(update=weights)})
    with pytest.raises(UserError, match=f"{field} has no effect"):
        check_space(sweep(space), base)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"points": [{"gan.steps": 3}]}, r"tune.points\[0\]: gan.steps is not a field of tune.space"),
        ({"points": [{"gan.pixel_weight": 7.0}]}, r"tune.points\[0\]: gan.pixel_weight=7.0 is outside"),
        ({"points": [{}, {}]}, r"tune.points\[1\]: the same values"),
        ({"search": "grid"}, "tune.search=grid: every range needs a step"),
    ],
)
def test_points_and_grids_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_space(sweep(WEIGHTS, **changes), BASE)


def test_a_base_value_outside_the_space_is_not_a_point() -> None:
    settings = sweep({"gan.pixel_weight": {"low": 0.5, "high": 1.0}}, points=[{}])
    with pytest.raises(UserError, match=r"outside tune\.space"):
        points(settings, BASE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"space": {"gan.pixel_weight": {"low": 1.0, "high": 0.5}}}, "need low < high"),
        ({"space": {"gan.pixel_weight": {"low": 0.0, "high": 0.5, "log": True}}}, "low > 0 with log"),
        ({"space": {"gan.pixel_weight": {"low": 0.1, "high": 0.5, "log": True, "step": 0.1}}}, "has no step"),
        ({"space": {"gan.pixel_weight": {"low": 0.1, "high": 0.5, "step": 1.0}}}, "larger than high - low"),
        ({"space": {}}, "at least 1 item"),
        ({"space": {"gan.pixel_weight": 3}}, "gan.pixel_weight=3: give"),
        ({"space": {"gan.pixel_weight": {"low": 3}}}, "gan.pixel_weight: high: missing"),
        ({"space": {"gan.pixel_weight": {"low": "a", "high": 1}}}, "gan.pixel_weight: low='a'"),
        ({"space": {"crop_px": {"low": 1, "high": 2, "stp": 1}}}, "crop_px: stp: .* did you mean step"),
        ({"space": {"crop_px": {"choice": 3}}}, "crop_px: choice=3"),
        ({"metrics": ["psnr_y", "psnr_y"]}, "listed twice"),
        ({"metrics": ["psnr_y"], "modes": ["min"]}, "psnr_y is better when larger; use max"),
        ({"metrics": ["lpips"], "modes": ["max"]}, "lpips is better when smaller; use min"),
        ({"metrics": ["psnr_y", "ssim_y"], "modes": ["max"]}, "one for each of 2 metrics"),
        ({"metrics": ["psnr_y", "ssim_y"], "scheduler": "asha"}, "one metric"),
        ({"constraints": ["psnr_y > 24"]}, "write METRIC >= NUMBER"),
        ({"constraints": ["psnr_y >= ."]}, "write METRIC >= NUMBER"),
        ({"constraints": ["psnr_y >= 1e999"]}, "write METRIC >= NUMBER"),
        ({"search": "optuna"}, "search"),
    ],
)
def test_invalid_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TuneConfig.model_validate(changes)


def test_the_study_opens_as_an_sqlite_file(tmp_path: Path) -> None:
    settings = sweep(WEIGHTS, trials=3)
    plans = proposals(settings, 3)
    outcomes = {trial_name(plan.values): ended(plan) for plan in plans[:2]}
    validations = {trial_name(plans[2].values): {10: {"psnr_y": 20.0}}}
    content = as_database(study(settings, plans, outcomes, validations))
    (tmp_path / "study.db").write_bytes(content)
    with sqlite3.connect(tmp_path / "study.db") as database:
        states = database.execute("select state from trials order by number").fetchall()
        assert [state for (state,) in states] == ["COMPLETE", "COMPLETE", "RUNNING"]
        assert database.execute("select intermediate_value from trial_intermediate_values").fetchall() == [
            (20.0,)
        ]


def test_values_are_quoted_for_a_shell() -> None:
    assert [flag_text(value) for value in (0.5, None, True, [1, 2], "a b")] == [
        "0.5", "null", "true", "'[1, 2]'", "'a b'"
    ]  # fmt: skip
