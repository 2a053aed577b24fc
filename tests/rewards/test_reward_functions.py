"""Rewards by name: TRL's signature, values by hand, logged metrics, user functions and user errors."""

import inspect
import pickle
from collections import defaultdict

import pytest

from fura_rl.errors import FuraError
from fura_rl.rewards import MathVerifier, load_rewards
from fura_rl.rewards.messages import text_of

NAMES = ["accuracy", "format", "soft_overlong", "repetition", "cosine_length"]


@pytest.fixture(scope="module")
def verifier():
    with MathVerifier() as verifier:
        yield verifier


def chat(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def one(name: str, verifier: MathVerifier | None = None, **options):
    return load_rewards([name], verifier, **options)[0]


def test_names_and_signature(verifier: MathVerifier) -> None:
    """TRL names the metric columns after `__name__` and passes every column of the data set by keyword."""
    rewards = load_rewards(NAMES, verifier, max_completion_length=100)
    assert [reward.__name__ for reward in rewards] == NAMES
    for reward in rewards:
        parameters = inspect.signature(reward).parameters
        assert "completions" in parameters
        assert any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        values = reward(
            prompts=[chat("?")] * 2,
            completions=[chat(r"\boxed{1}"), chat("no")],
            completion_ids=[[1, 2, 3], [4]],
            answer=["1", "2"],
            unique_id=["a", "b"],
            trainer_state=None,
            log_extra=None,
            log_metric=lambda name, value: None,
        )
        assert len(values) == 2 and all(isinstance(value, float) for value in values)


def test_accuracy_of_strings_conversations_and_both_columns(verifier: MathVerifier) -> None:
    reward = one("accuracy", verifier)
    texts = [r"so \boxed{0.5}", r"\boxed{3}", "the answer is 4"]
    answers = [r"\frac{1}{2}", "4", "4"]
    assert reward(completions=texts, answer=answers) == [1.0, 0.0, 0.0]
    assert reward(completions=[chat(text) for text in texts], solution=answers) == [1.0, 0.0, 0.0]
    assert reward(completions=texts, solution=["wrong"] * 3, answer=answers) == [1.0, 0.0, 0.0]  # `answer` goes first
    assert reward(completions=[r"\boxed{18}"], answer=[18]) == [1.0]  # a column of integers


def test_accuracy_gives_no_reward_without_a_reference(verifier: MathVerifier) -> None:
    assert one("accuracy", verifier)(completions=[r"\boxed{1}"] * 3, answer=["1", None, " "]) == [1.0, None, None]


def test_accuracy_needs_a_column(verifier: MathVerifier) -> None:
    with pytest.raises(FuraError, match="`answer` or `solution`"):
        one("accuracy", verifier)(completions=["x"])


def test_accuracy_logs_shares(verifier: MathVerifier) -> None:
    logged = defaultdict(list)
    one("accuracy", verifier, max_completion_length=4)(
        completions=[r"\boxed{1}", r"\boxed{2}", "none", r"\boxed{1}"],
        answer=["1", "1", "1", None],
        completion_ids=[[0] * 4, [0] * 3, [0] * 5, [0]],
        log_metric=lambda name, value: logged[name].append(value),
    )
    values = {name: value for name, (value,) in logged.items()}
    assert values.pop("verifier/seconds") >= 0
    assert values == {
        "verifier/correct": 0.25,
        "verifier/no_answer": 0.25,
        "verifier/timeout": 0.0,
        "verifier/error": 0.25,
        "verifier/truncated": 0.5,
        "verifier/cache_hits": 0.0,
        "verifier/algebra": 0.0,
    }


def test_verdicts_by_algebra_are_cached(verifier: MathVerifier) -> None:
    reward = one("accuracy", verifier)
    logged: dict[str, float] = {}
    for _ in range(2):
        reward(completions=[r"\boxed{(x+7)(x-7)}", r"\boxed{1}"], answer=["x^2-49", "1"], log_metric=logged.__setitem__)
    assert logged["verifier/cache_hits"] == 0.5 and logged["verifier/algebra"] == 0.0


@pytest.mark.parametrize(
    ("style", "text", "fits"),
    [
        ("boxed", r"\boxed{1}", True),
        ("boxed", r"\boxed{1", False),
        ("boxed", r"\boxed{}", False),
        ("think", "<think>a</think> b", True),
        ("think", "a</think> b", True),  # the opening tag may be part of the prompt
        ("think", "<think>a</think>", False),
        ("think", "<think>a b", False),
        ("think", "<think>a</think> b </think> c", False),
        ("think_boxed", r"<think>a</think> \boxed{2}", True),
        ("think_boxed", r"<think>\boxed{2}</think> b", False),
    ],
)
def test_format(style: str, text: str, fits: bool) -> None:
    assert one("format", format_style=style)(completions=[text, chat(text)]) == [float(fits)] * 2


def test_soft_overlong_is_dapo_equation_13() -> None:
    reward = one("soft_overlong", max_completion_length=100, overlong_buffer=20)
    ids = [[0] * n for n in (0, 80, 90, 100, 130)]
    assert reward(completions=["x"] * 5, completion_ids=ids) == [0.0, 0.0, -0.5, -1.0, -1.0]


def test_repetition_counts_repeated_ngrams() -> None:
    reward = one("repetition", repetition_ngram=2, repetition_penalty=-1.0)
    assert reward(completions=["x"] * 4, completion_ids=[[1, 2, 3, 4], [5] * 5, [1], []]) == [0.0, -0.75, 0.0, 0.0]


def test_cosine_length_at_its_ends_and_middle(verifier: MathVerifier) -> None:
    reward = one("cosine_length", verifier, max_completion_length=10)
    right, wrong = [r"\boxed{1}"] * 4, [r"\boxed{2}"] * 4
    ids = [[0] * n for n in (0, 5, 10, 20)]
    assert reward(completions=right, answer=["1"] * 4, completion_ids=ids) == pytest.approx([1.0, 0.75, 0.5, 0.5])
    assert reward(completions=wrong, answer=["1"] * 4, completion_ids=ids) == pytest.approx([-1.0, -0.75, -0.5, -0.5])
    assert reward(completions=[r"\boxed{1}"], answer=[None], completion_ids=[[0]]) == [None]


@pytest.mark.parametrize("name", ["soft_overlong", "repetition", "cosine_length"])
def test_token_rewards_need_token_ids(verifier: MathVerifier, name: str) -> None:
    with pytest.raises(FuraError, match="completion_ids"):
        one(name, verifier, max_completion_length=10)(completions=["x"], answer=["1"])


def test_trl_agrees_on_the_shaping_rewards() -> None:
    """The same formulas as TRL's own functions."""
    rewards = pytest.importorskip("trl.rewards")
    ids = [[0] * 90, list(range(50)), [1, 2] * 30, [0] * 120]
    ours = one("soft_overlong", max_completion_length=100, overlong_buffer=20)
    theirs = rewards.get_soft_overlong_punishment(100, 20)
    assert ours(completions=["x"] * 4, completion_ids=ids) == pytest.approx(theirs(completion_ids=ids))
    ours = one("repetition", repetition_ngram=3)
    theirs = rewards.get_repetition_penalty_reward(3)
    assert ours(completions=["x"] * 4, completion_ids=ids) == pytest.approx(theirs(completion_ids=ids))


def test_own_function_by_import_path(tmp_path, monkeypatch) -> None:
    (tmp_path / "own_rewards_module.py").write_text(
        "def shout(completions, **columns):\n    return [float(text.isupper()) for text in completions]\nvalue = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    reward = one("own_rewards_module:shout")
    assert reward.__name__ == "shout" and reward(completions=["A", "b"]) == [1.0, 0.0]
    with pytest.raises(FuraError, match="no function 'whisper'"):
        one("own_rewards_module:whisper")
    with pytest.raises(FuraError, match="no function 'value'"):
        one("own_rewards_module:value")
    with pytest.raises(FuraError, match="Cannot import"):
        one("no_such_module:shout")


def test_user_errors_are_sentences(verifier: MathVerifier) -> None:
    with pytest.raises(FuraError, match="Unknown reward 'acuracy'"):
        one("acuracy")
    with pytest.raises(FuraError, match="needs the option 'max_completion_length'"):
        one("soft_overlong")
    with pytest.raises(FuraError, match="No reward takes the option 'lenght'"):
        one("accuracy", verifier, lenght=3)
    with pytest.raises(FuraError, match="overlong_buffer"):
        one("soft_overlong", max_completion_length=10, overlong_buffer=11)
    with pytest.raises(FuraError, match="format_style"):
        one("format", format_style="xml")
    with pytest.raises(FuraError, match="one answer each"):
        verifier.grade(["a", "b"], ["1"])


def test_options_left_at_none_keep_their_defaults() -> None:
    assert one("repetition", repetition_ngram=None, max_completion_length=7).ngram == 20


def test_rewards_can_be_pickled(verifier: MathVerifier) -> None:
    for reward in load_rewards(NAMES, verifier, max_completion_length=10):
        copy = pickle.loads(pickle.dumps(reward))
        assert copy.__name__ == reward.__name__


@pytest.mark.parametrize(
    ("completion", "text"),
    [
        ("plain", "plain"),
        (chat("one"), "one"),
        ([*chat("one"), {"role": "tool", "content": "result"}, *chat("two")], "two"),
        ([{"role": "assistant", "content": None, "tool_calls": []}], ""),
        ([{"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "image"}]}], "a"),
        ([], ""),
    ],
    ids=str,
)
def test_text_of_a_completion(completion, text: str) -> None:
    assert text_of(completion) == text
