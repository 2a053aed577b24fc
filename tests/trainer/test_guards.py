"""Each guard, provoked by what it is there for; and what it does then."""

from itertools import pairwise

import pytest
import torch

from fura_rl.errors import FuraError
from fura_rl.trainer.checkpoints import list_checkpoints
from fura_rl.trainer.guards import GUARDS, load_guards


def by_length(completions, **_):
    """A reward that varies in every group, so that there is something to learn."""
    return [len(completion) + 0.01 * i for i, completion in enumerate(completions)]


def trained(trainer):
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}


class NanAt:
    """`by_length`, but NaN in the generations of some steps (from 1)."""

    __name__ = "nan_at"

    def __init__(self, *steps, value=float("nan")):
        self.steps, self.value = steps, value

    def __call__(self, completions, trainer_state, **_):
        bad = trainer_state.global_step + 1 in self.steps
        return [self.value] * len(completions) if bad else by_length(completions)


def test_training_does_without_the_attention_that_makes_nan(train):
    torch.backends.cuda.enable_cudnn_sdp(True)
    train(by_length, max_steps=1)
    assert not torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize("value", [float("inf"), None])
def test_a_reward_that_is_no_number_skips_the_step(train, caplog, value):
    """The step's parameters are those of the step before; the next step trains on."""
    snapshots = []

    class Watched(NanAt):
        def __call__(self, completions, **kwargs):
            snapshots.append(trained(trainers[0]))
            return super().__call__(completions, **kwargs)

    trainers = []
    trainer = train(Watched(2, value=value), prepare=trainers.append, max_steps=3)
    snapshots.append(trained(trainer))
    moved = [any(not torch.equal(before[n], after[n]) for n in before) for before, after in pairwise(snapshots)]
    assert moved == [True, False, True]
    assert "the rewards (nan_at) of 8 of 8 rollouts at step 2. The optimiser step is skipped." in caplog.text


def test_skipping_ends(train):
    with pytest.raises(FuraError, match=r"Guard nonfinite stopped .*at step 4, for 3 steps in a row"):
        train(NanAt(2, 3, 4), {"nonfinite": {"steps": 3}})


def test_a_nan_gradient_stops_if_asked_to(train):
    """A gradient that really is NaN: a hook on one parameter poisons it, as a faulty kernel would."""

    def poison(trainer):
        parameter = next(p for p in trainer.model.parameters() if p.requires_grad)
        parameter.register_hook(lambda gradient: gradient * float("nan"))

    with pytest.raises(FuraError, match="NaN or infinite values in the gradient at step 1"):
        train(by_length, {"nonfinite": {"action": "stop"}}, prepare=poison)


def test_a_learning_rate_that_explodes_stops_before_a_checkpoint(train, tmp_path):
    """An infinite adapter is never saved."""
    with pytest.raises(FuraError, match=r"in the adapter after step 1\. No checkpoint was written"):
        train(by_length, learning_rate=1e39, max_grad_norm=0.0, save_strategy="steps", save_steps=1)
    assert not list_checkpoints(tmp_path)


def test_rolling_back_restores_adapter_and_optimiser(train, tmp_path, caplog):
    """Rewards fail from step 4 to 5; the adapter goes back to checkpoint 3 or older, and the run goes on to its end."""
    guards = {"nonfinite": {"action": "rollback"}}
    states = {}

    class Watched(NanAt):
        def __call__(self, completions, trainer_state, **kwargs):
            states[trainer_state.global_step] = trained(trainers[0])
            return super().__call__(completions, trainer_state=trainer_state, **kwargs)

    trainers = []
    trainer = train(Watched(4), guards, prepare=trainers.append, max_steps=5, save_strategy="steps", save_steps=2)
    assert trainer.state.global_step == 5
    assert f"Rolled back to {tmp_path / 'checkpoint-2'}" in caplog.text
    for name, value in states[2].items():  # as at checkpoint 2, bit for bit
        assert torch.equal(states[4][name], value)
    assert any(not torch.equal(states[3][n], states[4][n]) for n in states[3])
    optimiser = trainer.optimizer.state_dict()["state"]
    assert {int(entry["step"]) for entry in optimiser.values()} == {3}  # two steps kept, step 5 since


def test_rolling_back_without_a_checkpoint_stops(train):
    with pytest.raises(FuraError, match="there is no checkpoint from before to roll back to"):
        train(NanAt(1), {"nonfinite": {"action": "rollback"}})


def test_rollbacks_are_counted(train):
    guards = {"nonfinite": {"action": "rollback", "max_rollbacks": 1}}
    with pytest.raises(FuraError, match="at step 4, after 1 rollbacks"):
        train(NanAt(3, 4), guards, save_strategy="steps", save_steps=1)


def test_reward_collapse(train):
    with pytest.raises(FuraError, match=r"no rollout earned a reward: reward has been <= 0 for 3 steps .* at step 4"):
        train(lambda completions, trainer_state, **_: [float(trainer_state.global_step < 1)] * len(completions),
              {"reward": {"steps": 3}})  # fmt: skip


def test_runaway_length(train):
    """The tiny model cannot answer within two tokens: every completion is cut."""
    with pytest.raises(FuraError, match=r"completions run into max_completion_length: .* >= 0.99 for 2 steps"):
        train(by_length, {"length": {"steps": 2}}, max_completion_length=2)


def test_entropy_collapse(train):
    """At a temperature near zero the policy is deterministic."""
    with pytest.raises(FuraError, match="the policy has become deterministic"):
        train(by_length, {"entropy": {"steps": 2}}, temperature=1e-3)


def test_kl_explosion(train):
    """A learning rate far too high drives the policy away from the reference at once."""
    with pytest.raises(FuraError, match=r"the policy has left the reference: kl has been >= 1 for 2 steps"):
        train(by_length, {"kl": {"above": 1.0, "steps": 2}}, beta=0.01, learning_rate=0.3, max_grad_norm=0.0,
              lr_scheduler_type="constant", max_steps=8)  # fmt: skip


def test_a_healthy_run_meets_no_guard(train, caplog):
    assert train(by_length, beta=0.01).state.global_step == 6
    assert "Guard" not in caplog.text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rewards": {"steps": 3}}, "Unknown guard 'rewards'; did you mean reward?"),
        ({"reward": {"step": 3}}, "no setting 'step'; did you mean steps?"),
        ({"reward": {"action": "skip"}}, "cannot 'skip': its actions are stop, rollback"),
        ({"kl": {"above": "high"}}, "above is a number, not 'high'"),
        ({"kl": 3}, "takes settings"),
    ],
)
def test_mistakes_in_the_recipe(changes, words):
    with pytest.raises(FuraError) as error:
        load_guards(changes)
    assert words in str(error.value)


def test_guards_can_be_changed_and_switched_off():
    guards = load_guards({"kl": {"above": 5, "action": "rollback"}, "entropy": False})
    assert guards["kl"].above == 5 and guards["kl"].steps == GUARDS["kl"].steps
    assert set(guards) == set(GUARDS) - {"entropy"}
