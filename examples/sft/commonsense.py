r"""Supervised fine-tuning on commonsense questions, with TRL's own SFTTrainer, scored on the eight tasks.

    accelerate launch examples/sft/commonsense.py --config configs/sft/commonsense.yaml

Data has the format of LLM-Adapters' 170k mixture (Hu et al., arXiv 2304.01933; not shipped): a JSON list of
`{"instruction", "input", "output", "answer"}`, where `output` is "the correct answer is answer2" and `answer` is
"answer2". `test_dir` holds `<task>/test.json` in the same format. As there, a prediction is the first word of the
task's kind in a greedy completion of at most 32 tokens.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer, TrlParser
from trl.models.utils import unwrap_model_for_generation

from fura_rl.eval.statistics import wilson
from fura_rl.trainer.arguments import AdapterArguments
from fura_rl.trainer.methods import adapter_config

ARC = [f"answer{i}" for i in range(1, 6)]
TASKS = {
    "boolq": ["true", "false"],
    "piqa": ["solution1", "solution2"],
    "social_i_qa": ARC[:3],
    "hellaswag": [f"ending{i}" for i in range(1, 5)],
    "winogrande": ["option1", "option2"],
    "ARC-Easy": ARC,
    "ARC-Challenge": ARC,
    "openbookqa": ARC[:4],
}
PROMPT = """Below is an instruction that describes a task. Write a response that appropriately completes the request.

### Instruction:
{instruction}

### Response:
"""


@dataclass
class CommonsenseArguments:
    """What is trained on and scored."""

    model_name_or_path: str = field(metadata={"help": "Hub id or path of a causal LM."})
    train_file: str = field(metadata={"help": "A JSON list of instructions and outputs."})
    test_dir: str | None = field(default=None, metadata={"help": "Folder of <task>/test.json."})
    test_limit: int | None = field(default=None, metadata={"help": "Use only the first questions of each task."})
    test_batch: int = field(default=32, metadata={"help": "Questions that are answered at a time."})
    dtype: str = field(default="bfloat16", metadata={"help": "Of the base weights."})


def render(row: dict[str, str]) -> str:
    """The prompt of a row."""
    instruction = row["instruction"] + (f"\n\n{row['input']}" if row.get("input") else "")
    return PROMPT.format(instruction=instruction)


def load_rows(path: str | Path) -> Dataset:
    """Rows for SFTTrainer, which puts the end of the sequence after a completion and takes its loss there only."""
    rows = json.loads(Path(path).read_text(encoding="utf-8"))
    return Dataset.from_list([{"prompt": render(row), "completion": row["output"]} for row in rows])


def extract(task: str, text: str) -> str | None:
    """The first answer of the task's kind in a completion, None if there is none."""
    found = re.search("|".join(TASKS[task]), text)
    return found and found[0]


@torch.no_grad()
def answer(model: Any, tokenizer: Any, prompts: list[str], batch: int) -> list[str]:
    """Greedy completions of at most 32 tokens."""
    texts = []
    for start in tqdm(range(0, len(prompts), batch), desc="Answers", leave=False):
        inputs = tokenizer(prompts[start : start + batch], return_tensors="pt", padding=True, padding_side="left")
        inputs = {key: inputs[key].to(model.device) for key in ("input_ids", "attention_mask")}
        out = model.generate(**inputs, max_new_tokens=32, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        texts += tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts


def score(trainer: SFTTrainer, tokenizer: Any, arguments: CommonsenseArguments) -> dict[str, dict[str, float]]:
    """Accuracy of each task found in `test_dir`, with its 95% interval, and the share without an answer.

    Every rank answers its share of the questions; under ZeRO-3 each holds the whole model meanwhile.
    """
    with unwrap_model_for_generation(trainer.model_wrapped, trainer.accelerator) as model:
        model.eval()
        return _scores(model, tokenizer, arguments, PartialState())


def _scores(
    model: Any, tokenizer: Any, arguments: CommonsenseArguments, state: PartialState
) -> dict[str, dict[str, float]]:
    scores = {}
    for task in TASKS:
        file = Path(arguments.test_dir or "") / task / "test.json"
        if not file.is_file():
            continue
        rows = json.loads(file.read_text(encoding="utf-8"))[: arguments.test_limit]
        # Ranks that hold a part of the model generate in step, so each gets as many questions: the last ones twice.
        share = -(-len(rows) // state.num_processes)
        numbers = [min(i, len(rows) - 1) for i in range(state.process_index * share, (state.process_index + 1) * share)]
        own = [rows[i] for i in numbers]
        texts = answer(model, tokenizer, [render(row) for row in own], arguments.test_batch)
        answers = [(extract(task, text), row["answer"]) for text, row in zip(texts, own, strict=True)]
        outcomes = gather_object(answers)[: len(rows)]
        right = sum(prediction == gold for prediction, gold in outcomes)
        low, high = wilson(right, len(rows))
        scores[task] = {
            "accuracy": right / len(rows),
            "low": low,
            "high": high,
            "no_answer": sum(prediction is None for prediction, _ in outcomes) / len(rows),
            "questions": len(rows),
        }
    return scores


def main(argv: list[str] | None = None) -> dict[str, dict[str, float]]:
    parser = TrlParser((CommonsenseArguments, SFTConfig, AdapterArguments))
    arguments, training, adapter = parser.parse_args_and_config(args=argv)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model_name_or_path)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    torch.backends.cuda.enable_cudnn_sdp(False)  # NaN gradients at some lengths (pytorch#196678)
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(arguments.model_name_or_path, dtype=arguments.dtype),
        args=training,
        train_dataset=load_rows(arguments.train_file),
        processing_class=tokenizer,
        peft_config=adapter_config(adapter),
    )
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    trainer.save_model()
    scores: dict[str, dict[str, float]] = {}
    if arguments.test_dir:
        scores = score(trainer, tokenizer, arguments)
    if scores and trainer.is_world_process_zero():
        Path(training.output_dir, "scores.json").write_text(json.dumps(scores, indent=1) + "\n", encoding="utf-8")
        for task, values in scores.items():
            interval = f"[{values['low']:.3f}, {values['high']:.3f}]"
            print(f"{task:14} {values['accuracy']:.3f} {interval} of {values['questions']}")
    return scores


if __name__ == "__main__":
    main()
