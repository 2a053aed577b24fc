"""The text of a completion, whether TRL passes it as a string or as a conversation."""

from __future__ import annotations

from typing import Any


def text_of(completion: Any) -> str:
    """The text of the last assistant message of a conversation, or the completion itself if it is a string.

    Args:
        completion: A string, or a list of messages `{"role": ..., "content": ...}`; content may be a string, None (a
            message of tool calls) or a list of parts of which those of type "text" count.
    """
    if isinstance(completion, str):
        return completion
    for message in reversed(completion):
        if message.get("role", "assistant") != "assistant":
            continue
        content = message.get("content")
        if isinstance(content, list):
            return "".join(part.get("text", "") for part in content if part.get("type") == "text")
        if content:
            return content
    return ""
