"""What a sweep's table says of its methods: by hand-made runs, so that every number can be worked out."""

import json
from pathlib import Path

import pytest

from fura_rl.trainer.sweep import SweepRun
from fura_rl.trainer.sweep_results import chosen_on_others, plot_sweep, summarise, sweep_table


@pytest.fixture
def sweep(tmp_path):
    """`sweep({method: {rate: [final accuracy of seed 1, 2, ...]}})`; a None is a run that is not done."""

    def make(accuracies, spectra=None):
        runs = []
        for method, rates in accuracies.items():
            for rate, finals in rates.items():
                for seed, final in enumerate(finals, 1):
                    folder = tmp_path / f"{method}-{rate}-{seed}"
                    setting = f"learning_rate={rate:g}"
                    options = {"learning_rate": rate, "max_steps": 2}
                    runs.append(SweepRun(method, setting, seed, options, folder))
                    if final is not None:
                        finish(folder, final, (spectra or {}).get(method))
        return runs

    return make


def finish(folder: Path, final: float, spectra):
    folder.mkdir()
    curve = [{"step": step, "scores": {"b": {"accuracy": value}}} for step, value in ((0, 0.1), (2, final))]
    (folder / "summary.json").write_text(json.dumps({"steps": 2, "evaluations": curve, "trainable_parameters": 1234}))
    rows = [{"step": step, "reward": step / 4, "step_time": 2.0, "num_tokens": 100.0 * step} for step in (1, 2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if spectra:
        (folder / "spectra.json").write_text(json.dumps(spectra))


def by_method(rows):
    return {row["method"]: row for row in rows}


def test_the_best_setting_and_the_one_chosen_on_other_seeds(sweep):
    rows = by_method(summarise(sweep({"fura": {1e-3: [0.9, 0.5, 0.6], 2e-3: [0.5, 0.8, 0.6]}})))
    fura = rows["fura"]
    assert fura["setting"] == "learning_rate=0.001" and fura["accuracy"] == pytest.approx(2.0 / 3)
    assert fura["seeds"] == {1: 0.9, 2: 0.5, 3: 0.6} and fura["trainable_parameters"] == 1234
    # seed 1: the others have 0.55 and 0.70; seed 2: 0.75 and 0.55; seed 3: 0.70 and 0.65
    assert fura["chosen"] == {1: 0.5, 2: 0.5, 3: 0.6}
    assert fura["median_over_settings"] == pytest.approx((2.0 / 3 + 1.9 / 3) / 2)


def test_a_setting_with_fewer_seeds_is_not_the_best(sweep):
    runs = sweep({"fura": {1e-3: [0.9, 0.7], 2e-3: [0.85, None]}})
    assert summarise(runs)[0]["setting"] == "learning_rate=0.001" and summarise(runs)[0]["accuracy"] == pytest.approx(
        0.8
    )


def test_one_seed_allows_no_interval(sweep):
    runs = sweep({"fura": {1e-3: [0.9], 2e-3: [0.5]}, "lora": {1e-3: [0.7], 2e-3: [None]}})
    rows = by_method(summarise(runs))
    assert rows["fura"]["chosen"] == {} and rows["fura"]["interval"] is None
    assert rows["lora"]["against"]["difference"] == pytest.approx(-0.2) and rows["lora"]["against"]["interval"] is None
    assert chosen_on_others({"a": {1: 0.5}}) == {}
    assert "| lora | 1,234 | learning_rate=0.001 | 0.700 | 0.700 .. 0.700 | - |" in sweep_table(summarise(runs))


def test_methods_are_compared_seed_by_seed_on_what_others_chose(sweep):
    rows = by_method(summarise(sweep({"fura": {1e-3: [0.5, 0.7, 0.9]}, "lora": {1e-3: [0.6, 0.9, 1.0]}})))
    against = rows["lora"]["against"]
    assert against["method"] == "fura" and "against" not in rows["fura"]
    assert against["difference"] == pytest.approx(0.4 / 3) and against["wins"][:2] == [3, 3]
    # differences 0.1, 0.2, 0.1: standard error 0.0333, quantile 4.302653
    assert against["interval"] == pytest.approx([0.4 / 3 - 0.143422, 0.4 / 3 + 0.143422], abs=1e-5)
    assert "+0.133 [-0.010, +0.277], better on 3 of 3" in sweep_table(list(rows.values()))


def test_methods_are_compared_problem_by_problem(sweep):
    """Two seeds, three problems of two samples; `lora` solves b always, and c where `fura` does not."""
    runs = sweep({"fura": {1e-3: [0.5, 0.5]}, "lora": {1e-3: [0.5, 0.5]}, "full": {1e-3: [0.5, None]}})
    right = {
        ("fura", 1): {"a": (1, 1), "b": (0, 1), "c": (0, 0)}, ("fura", 2): {"a": (1, 1), "b": (0, 0), "c": (0, 1)},
        ("lora", 1): {"a": (1, 1), "b": (1, 1), "c": (0, 1)}, ("lora", 2): {"a": (1, 1), "b": (1, 1), "d": (1, 1)},
    }  # fmt: skip
    for run in runs:
        folder = run.folder / "evaluations"
        for step in (0, 2):
            rows = [
                {"benchmark": "x", "id": problem, "sample": i, "correct": bool(sample) if step else None}
                for problem, samples in right.get((run.method, run.seed), {}).items()
                for i, sample in enumerate(samples)
            ]
            if rows:
                folder.mkdir(exist_ok=True)
                (folder / f"step_{step:06d}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = by_method(summarise(runs))
    found = rows["lora"]["by_problem"]
    # a: 0; b: 1 - 1/4 over both seeds; c: 1/2 of seed 1, the only one in which both answered it; d: only one did
    assert found["problems"] == 3 and found["difference"] == pytest.approx((0 + 0.75 + 0.5) / 3)
    # 27 draws of three problems, and one of them alone is more than 2.5%: from "a" three times to "b" three times
    assert found["interval"] == [0.0, 0.75]
    assert "by_problem" not in rows["fura"] and rows["full"]["by_problem"] is None
    assert "| +0.417 [+0.000, +0.750], 3 problems |" in sweep_table(list(rows.values()))


def test_an_unfinished_method_is_compared_like_with_like(sweep):
    """LoRA has one seed, so no setting that other seeds chose: both are taken at their best."""
    runs = sweep({"fura": {1e-3: [0.7, 0.5], 2e-3: [0.6, 0.65]}, "lora": {1e-3: [0.65, None], 2e-3: [0.6, None]}})
    rows = by_method(summarise(runs))
    assert rows["fura"]["setting"] == "learning_rate=0.002"
    assert rows["lora"]["against"]["difference"] == pytest.approx(0.65 - 0.6)


def test_rates_with_fewer_seeds_are_not_in_the_range_of_good_ones(sweep):
    runs = sweep({"fura": {1e-3: [0.70, 0.70], 2e-3: [0.69, 0.69], 4e-3: [0.95, None]}})
    assert summarise(runs)[0]["good_rates"] == {"low": 1e-3, "high": 2e-3, "to_the_edge": True}


@pytest.mark.parametrize(
    ("finals", "low", "high", "edge"),
    [
        ((0.50, 0.89, 0.90, 0.50), 2e-3, 4e-3, False),
        ((0.89, 0.50, 0.90, 0.89), 4e-3, 8e-3, True),  # a rate beyond a bad one does not count
        ((0.90, 0.87, 0.80, 0.10), 1e-3, 1e-3, True),
    ],
)
def test_the_range_of_good_learning_rates(sweep, finals, low, high, edge):
    runs = sweep({"fura": {rate: [final] for rate, final in zip((1e-3, 2e-3, 4e-3, 8e-3), finals, strict=True)}})
    assert summarise(runs)[0]["good_rates"] == {"low": low, "high": high, "to_the_edge": edge}


def test_spectra_stand_beside_the_methods_that_have_them(sweep):
    layers = [
        {"name": "a", "drift": 0.1, "norm": 0.2, "rank": 0.3},
        {"name": "b", "drift": 0.3, "norm": 0.4, "rank": 0.5},
    ]
    rows = summarise(sweep({"fura": {1e-3: [0.5, 0.6]}, "full": {1e-3: [0.5, 0.6]}}, spectra={"fura": layers}))
    assert by_method(rows)["full"]["spectra"] is None
    assert sweep_table(rows).endswith("| fura | 0.3000 | 0.4000 | 0.2000 |")


def test_plots_are_drawn_from_what_is_there(sweep, tmp_path):
    runs = sweep({"fura": {1e-3: [0.5, None], 2e-3: [0.6, 0.7]}, "lora": {1e-3: [None, None]}})
    (tmp_path / "fura-0.002-1" / "metrics.jsonl").unlink()
    plot_sweep(runs, summarise(runs), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
