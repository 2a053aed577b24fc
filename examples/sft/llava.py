r"""Visual instruction tuning in LLaVA's format, with TRL's own SFTTrainer and FuRA on the language model.

    accelerate launch examples/sft/llava.py --config configs/sft/llava.yaml

Data has the format of LLaVA-1.5's mixture (Liu et al., arXiv 2310.03744; not shipped): a JSON list of `{"image",
"conversations": [{"from": "human", "value": "<image>\n..."}, {"from": "gpt", "value": ...}, ...]}`. Each reply is one
example, whose prompt is all that stands before it; the loss is taken on the reply only.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Image, List
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import SFTConfig, SFTTrainer, TrlParser

from fura_rl.trainer.arguments import AdapterArguments
from fura_rl.trainer.methods import adapter_config

ROLES = {"human": "user", "gpt": "assistant"}
MARK = "<image>"
LANGUAGE = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"  # not the vision tower, not the projector


@dataclass
class LlavaArguments:
    """What is trained on."""

    model_name_or_path: str = field(metadata={"help": "Hub id or path of a vision-language model."})
    train_file: str = field(metadata={"help": "A JSON list of conversations about images."})
    image_dir: str = field(metadata={"help": "Folder that the images' paths begin in."})
    dtype: str = field(default="bfloat16", metadata={"help": "Of the base weights."})


def examples(row: dict[str, Any], images: Path) -> list[dict[str, Any]]:
    """One example for each reply: `prompt` and `completion` as messages, and the image, if there is one."""
    turns = [
        {"role": ROLES[turn["from"]], "content": turn["value"].replace(MARK, "").strip()}
        for turn in row["conversations"]
    ]
    files = [str(images / row["image"])] if row.get("image") else []
    return [
        {"prompt": turns[:i], "completion": turns[i : i + 1], "images": files}
        for i, turn in enumerate(turns)
        if turn["role"] == "assistant"
    ]


def load_rows(path: str | Path, images: str | Path) -> Dataset:
    """Rows for SFTTrainer; images are opened when they are needed."""
    rows = json.loads(Path(path).read_text(encoding="utf-8"))
    found = [example for row in rows for example in examples(row, Path(images))]
    return Dataset.from_list(found).cast_column("images", List(Image()))


def main(argv: list[str] | None = None) -> SFTTrainer:
    parser = TrlParser((LlavaArguments, SFTConfig, AdapterArguments))
    arguments, training, adapter = parser.parse_args_and_config(args=argv)
    config = adapter_config(adapter)
    if config is not None and adapter.target_modules == ["all-linear"]:
        config.target_modules = LANGUAGE
    torch.backends.cuda.enable_cudnn_sdp(False)  # NaN gradients at some lengths (pytorch#196678)
    trainer = SFTTrainer(
        AutoModelForImageTextToText.from_pretrained(arguments.model_name_or_path, dtype=arguments.dtype),
        args=training,
        train_dataset=load_rows(arguments.train_file, arguments.image_dir),
        processing_class=AutoProcessor.from_pretrained(arguments.model_name_or_path),
        peft_config=config,
    )
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    main()
