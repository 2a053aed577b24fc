"""Right or wrong, and the rewards made of it. One verifier serves training, evaluation and tests."""

from .extraction import extract_answer
from .registry import load_rewards
from .verifier import Grade, MathVerifier

__all__ = ["Grade", "MathVerifier", "extract_answer", "load_rewards"]
