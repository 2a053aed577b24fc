"""Prompt templates: one object renders the same prompt for training and for evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fura_rl.errors import FuraError

PLACEHOLDER = "{problem}"

TEMPLATES = {
    # The prompt of the paper's RL runs (arXiv 2605.22869).
    "boxed": (
        "{problem}\n\nThink for a bit about the question and then put your final answer as a number inside \\boxed{}."
    ),
    # The prompt that Qwen's own math evaluations use.
    "qwen-boxed": "{problem}\nPlease reason step by step, and put your final answer within \\boxed{}.",
    "plain": "{problem}",
}


@dataclass(frozen=True)
class Prompt:
    """A user message with a `{problem}` placeholder.

    Args:
        name: The template's name or file, kept for reports.
        text: The template; the first `{problem}` is replaced, every other brace stays as it is.
    """

    name: str
    text: str

    def messages(self, problem: str) -> list[dict[str, str]]:
        """The conversation that poses `problem`: one user message."""
        return [{"role": "user", "content": self.text.replace(PLACEHOLDER, problem, 1)}]

    def for_tokenizer(self, problem: str, tokenizer: Any) -> list[dict[str, str]] | str:
        """What TRL takes as a prompt: messages if the tokenizer has a chat template, else the plain text."""
        messages = self.messages(problem)
        return messages if getattr(tokenizer, "chat_template", None) else messages[0]["content"]

    def token_ids(self, problem: str, tokenizer: Any) -> list[int]:
        """Token ids of the prompt, ready to generate from; the chat template is applied when there is one."""
        messages = self.messages(problem)
        if getattr(tokenizer, "chat_template", None):
            encoded = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=True
            )
            return list(encoded["input_ids"])
        return list(tokenizer(messages[0]["content"])["input_ids"])


def load_prompt(name_or_path: str) -> Prompt:
    """A template by name (`boxed`, `qwen-boxed`, `plain`) or from a text file that contains `{problem}`.

    Raises:
        FuraError: The name is unknown and no such file exists, or the file has no `{problem}`.
    """
    if name_or_path in TEMPLATES:
        return Prompt(name_or_path, TEMPLATES[name_or_path])
    path = Path(name_or_path)
    if not path.is_file():
        raise FuraError(f"Unknown prompt {name_or_path!r}: neither a file nor one of {', '.join(sorted(TEMPLATES))}.")
    text = path.read_text(encoding="utf-8")
    if PLACEHOLDER not in text:
        raise FuraError(f"The prompt file {name_or_path} has no {PLACEHOLDER} placeholder.")
    return Prompt(name_or_path, text)
