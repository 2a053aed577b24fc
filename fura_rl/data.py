"""Training data: a hub id or a local file with `problem` and `answer` becomes the rows that TRL's GRPO reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetNotFoundError

from fura_rl.errors import FuraError
from fura_rl.prompts import Prompt
from fura_rl.rewards import extract_answer

# Column names of well-known math sets, in the order in which they are looked for.
PROBLEM_COLUMNS = ("problem", "question", "prompt")
ANSWER_COLUMNS = ("answer", "final_answer", "solution")  # of a `solution`, its last \\boxed{} is the answer
FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


def load_problems(name_or_path: str, *, split: str = "train", config: str | None = None) -> Dataset:
    """Load problems from a Hugging Face dataset id or a local JSONL or Parquet file.

    Args:
        name_or_path: A path that exists, or a hub id.
        split: Split of a hub dataset; a local file is one split.
        config: Configuration name of a hub dataset.

    Returns:
        A dataset with the string columns `problem` and `answer`, and whatever else the source has.

    Raises:
        FuraError: The source does not exist, lacks a column, is empty, or has an empty problem or answer.
    """
    path = Path(name_or_path)
    if path.is_file():
        if path.suffix not in FORMATS:
            raise FuraError(f"{path}: unknown file type {path.suffix!r}; use .jsonl, .json or .parquet.")
        if path.stat().st_size == 0:
            raise FuraError(f"{path} is empty.")
        dataset = load_dataset(FORMATS[path.suffix], data_files=str(path), split="train")
    elif path.suffix in FORMATS:
        raise FuraError(f"The dataset file {path} does not exist.")
    else:
        try:
            dataset = load_dataset(name_or_path, config, split=split)
        except (DatasetNotFoundError, ConnectionError, ValueError) as error:
            raise FuraError(f"Cannot load the dataset {name_or_path!r}: {str(error).splitlines()[0]}") from error
    return _with_problem_and_answer(dataset, name_or_path)


def _with_problem_and_answer(dataset: Dataset, source: str) -> Dataset:
    for wanted, candidates in (("problem", PROBLEM_COLUMNS), ("answer", ANSWER_COLUMNS)):
        found = next((name for name in candidates if name in dataset.column_names), None)
        if found is None:
            raise FuraError(
                f"{source} has no column {wanted!r} (also tried: {', '.join(candidates[1:])}); "
                f"it has {', '.join(dataset.column_names)}."
            )
        if found == "solution":
            dataset = dataset.map(lambda row: {"answer": extract_answer(row["solution"]) or ""}, desc="Answers")
        elif found != wanted:
            dataset = dataset.rename_column(found, wanted)
    if not len(dataset):
        raise FuraError(f"{source} has no rows.")
    if "\n#### " in str(dataset[0]["answer"]):  # GSM8K: the solution, then "#### " and the answer
        dataset = dataset.map(lambda row: {"answer": row["answer"].rsplit("#### ", 1)[-1]}, desc="Answers")
    for wanted in ("problem", "answer"):
        for row, value in enumerate(dataset[wanted]):
            if value is None or not str(value).strip():
                raise FuraError(f"{source}: row {row} has an empty {wanted}.")
    return dataset


def to_prompts(dataset: Dataset, prompt: Prompt, tokenizer: Any) -> Dataset:
    """Rows for `GRPOTrainer`: `prompt` (messages, or text if the tokenizer has no chat template) and `answer`."""

    def row(example: dict[str, Any]) -> dict[str, Any]:
        return {"prompt": prompt.for_tokenizer(example["problem"], tokenizer), "answer": str(example["answer"])}

    return dataset.map(row, remove_columns=dataset.column_names, desc="Prompts")
