r"""One spelling for an answer: LaTeX layout, units of style and typographic variants are removed.

Two answers whose canonical forms agree are equal; two whose forms differ may still be (`1/2` and `0.5`).
Standard library only: the grading workers import this module without the rest of the package.
"""

from __future__ import annotations

import re

# Typographic characters with an ASCII or LaTeX spelling that a parser knows.
_UNICODE = str.maketrans(
    {
        **dict.fromkeys("\u2212\u2013\u2014\u2010\u2011\ufe63\uff0d", "-"),
        **dict.fromkeys("\u00a0\u2009\u202f\u2002\u2003\u3000\t\r\n", " "),
        **dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff", ""),
        **dict(zip("，；：（）［］｛｝＝＜＞％＋", ",;:()[]{}=<>%+", strict=True)),
        **{chr(0xFF10 + digit): str(digit) for digit in range(10)},
        **dict.fromkeys("€£¥₹₽₩", " "),
        "×": r"\times ",
        "·": r"\cdot ",
        "⋅": r"\cdot ",
        "÷": "/",
        "∕": "/",
        "π": r"\pi ",
        "∞": r"\infty ",
        "√": r"\sqrt ",
        "≤": r"\leq ",
        "≥": r"\geq ",
        "≠": r"\neq ",
        "∪": r"\cup ",
        "∩": r"\cap ",
        "∈": r"\in ",
        "±": r"\pm ",
        "°": r"^\circ ",
        "∅": r"\emptyset ",
        "θ": r"\theta ",
        "²": "^2",
        "³": "^3",
        "½": r"\frac{1}{2}",
        "¼": r"\frac{1}{4}",
        "¾": r"\frac{3}{4}",
    }
)
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")

_SPACE_COMMANDS = re.compile(r"(?<!\\)\\(?:qquad|quad|,|;|:|>|!|enspace|thinspace|hspace\{[^{}]*\}|(?=\s))|(?<!\\)~")
_SIZE_COMMANDS = re.compile(r"\\(?:left|right|middle)\s*\.|\\(?:left|right|middle|[bB]igg?[lrm]?)(?![a-zA-Z])")
_STYLE_COMMANDS = re.compile(r"\\(?:displaystyle|textstyle|scriptstyle|limits|nolimits|strut|mathstrut)(?![a-zA-Z])")
_FONT_ONE_SYMBOL = re.compile(
    r"\\(?:mathrm|mathbf|mathit|mathsf|boldsymbol|bm|vec|overline|overrightarrow)\{(\w|\d+)\}"
)
_TEXT = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt|normal|up|md)?|mbox|hbox|mathrm|mathbf|mathit|mathsf|operatorname\*?|emph)\s*\{([^{}]*)\}"
)
# Words set as text after a number are its unit. Not those that change the value: `5 million`, `8:30 p.m.`
_UNIT_TEXT = re.compile(
    r"(?<=[\d})])\s*\\(?:text(?:bf|it|rm|normal)?|mbox|mathrm)\s*\{"
    r"(?!\s*(?:[ap]\.?\s?m\b|hundred|thousand|[mbtr]+illion|dozen|percent|base))\s*[a-zA-Z][a-zA-Z ./]*\}"
    r"(?:\s*\^\s*\{?[23]\}?)?\s*$"
)
_MATH_DELIMITERS = re.compile(r"(?<!\\)(?:\\[\[\]()]|\$+)")
_FRAC_DIGITS = re.compile(r"\\frac\s*(\d)\s*(\d)")
_FRAC_DIGIT_BRACE = re.compile(r"\\frac\s*(\d)\s*(?=\{)")
_FRAC_BRACE_DIGIT = re.compile(r"(\\frac\s*\{[^{}]*\})\s*([a-zA-Z0-9])")
# TeX would put only the 1 of `\sqrt 13` under the root; whoever writes it means 13.
_SQRT_TOKEN = re.compile(r"\\sqrt\s*([a-zA-Z]|\d+)")
_DEGREES = re.compile(r"\s*\^\s*\{?\s*\\(?:circ|degree)\s*\}?|\s*\\degree(?![a-zA-Z])")
_PERCENT = re.compile(r"\s*(?:\\?%|(?<![a-zA-Z])(?:percent(?:age)?|pct)(?![a-zA-Z]))", re.IGNORECASE)
_AND_OR = re.compile(r"\s*,?\s*(?<![a-zA-Z\\])(?:and|or)(?![a-z])\s*,?\s*")
_SINGLE_BRACES = re.compile(r"([\^_])\s*\{\s*([a-zA-Z0-9])\s*\}")
_THIN_COMMA = re.compile(r"\{\s*,\s*\}")
_EMPHASIS = re.compile(r"\*\*|`|^\s*#+\s*")

_RELATIONS = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"\\(?:leqslant|leqq|le)(?![a-zA-Z])|<=|=<", r"\\leq "),
        (r"\\(?:geqslant|geqq|ge)(?![a-zA-Z])|>=", r"\\geq "),
        (r"\\ne(?![a-zA-Z])|!=|\\not\s*=", r"\\neq "),
        (r"\\lt(?![a-zA-Z])", "<"),
        (r"\\gt(?![a-zA-Z])", ">"),
        (r"\\(?:dfrac|tfrac|cfrac)(?![a-zA-Z])", r"\\frac"),
        (r"\\(?:infin)(?![a-zA-Z])|(?<![a-zA-Z\\])(?:infinity|inf)(?![a-zA-Z])", r"\\infty "),
        (r"\+\s*\\infty", r"\\infty "),
        (r"\\(?:varnothing|O)(?![a-zA-Z])", r"\\emptyset "),
        (r"\\colon(?![a-zA-Z])|\\ratio(?![a-zA-Z])", ":"),
        (r"\\(?:lbrace|\{)", r"\\{"),
        (r"\\(?:rbrace|\})", r"\\}"),
        (r"\\(?:lvert|rvert|vert)(?![a-zA-Z])", "|"),
        (r"\\(?:dotsc|dots|ldots|cdots)(?![a-zA-Z])", r"\\ldots "),
    ]
]
_ARRAY = re.compile(r"\[?\s*\\begin\{array\}\s*\{[^{}]*\}(.*?)\\end\{array\}\s*\]?")
_MATRIX_KIND = re.compile(r"\\(begin|end)\{(?:b|B|p|small)?matrix\}")
_DOUBLED_COMMAND = re.compile(r"\\\\(?=[a-zA-Z])")


def canonical(answer: str) -> str:
    r"""The canonical LaTeX of an answer: no layout, no `$`, one spelling of fractions, relations, text and matrices.

    Spaces that matter to a parser (`\pi r`, `64 square feet`) stay as one space; `compact` removes them.
    """
    # One space at most from here on, which also keeps every pattern below linear.
    s = re.sub(r"\s+", " ", _CONTROL.sub("", answer.translate(_UNICODE)))
    s = _EMPHASIS.sub("", s)
    if "matrix" not in s and "array" not in s and "cases" not in s:
        # Escaped twice on the way through JSON; only in matrices a doubled backslash has a meaning.
        s = _DOUBLED_COMMAND.sub(r"\\", s)
    # A dollar sign is currency or a delimiter; neither is part of a value.
    s = _MATH_DELIMITERS.sub(" ", s.replace(r"\$", ""))
    s = re.sub(r"\\!\s*", "", s)
    s = _THIN_COMMA.sub(",", s)
    s = re.sub(r"(?<=\d)\s*\\[,;:]\s*(?=\d{3}(?!\d))", "", s)  # thin space as a thousands separator
    s = _SPACE_COMMANDS.sub(" ", s)
    s = _SIZE_COMMANDS.sub("", s)
    s = _STYLE_COMMANDS.sub("", s)
    for pattern, replacement in _RELATIONS:
        s = pattern.sub(replacement, s)
    s = _ARRAY.sub(r"\\begin{matrix}\1\\end{matrix}", s)
    s = _MATRIX_KIND.sub(r"\\\1{matrix}", s)
    s = _FONT_ONE_SYMBOL.sub(r"\1", s)
    s = _UNIT_TEXT.sub("", s.rstrip(" .,;"))
    s = _TEXT.sub(r" \1 ", s)
    s = _DEGREES.sub(" ", s)
    s = _PERCENT.sub("%", s)
    s = _FRAC_DIGITS.sub(r"\\frac{\1}{\2}", s)
    s = _FRAC_DIGIT_BRACE.sub(r"\\frac{\1}", s)
    s = _FRAC_BRACE_DIGIT.sub(r"\1{\2}", s)
    s = _SQRT_TOKEN.sub(r"\\sqrt{\1}", s)
    s = re.sub(r"(?<=\d)i(?![a-zA-Z])", " i", s)  # `9i`: the parser sees the imaginary unit only as a word of its own
    s = _AND_OR.sub(" , ", s)
    s = _SINGLE_BRACES.sub(r"\1\2", s)
    s = re.sub(r"\s+", " ", s).strip()
    return s.rstrip(".;:, ").strip() if not s.endswith(r"\}") else s


def compact(form: str) -> str:
    """A canonical form without spaces, except those that end a command (`\\pi r`): for comparing strings."""
    return re.sub(r"(\\[a-zA-Z]+) (?=[a-zA-Z])|\s", lambda m: m.group(1) + " " if m.group(1) else "", form)
