"""The recipes for supervised fine-tuning, on a handful of made-up questions and pictures."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoTokenizer,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from transformers.models.clip import CLIPImageProcessorPil
from trl import SFTConfig, TrlParser

from fura_rl.trainer.arguments import AdapterArguments

ROOT = Path(__file__).parents[2]
QUICK = dict(
    max_steps=4, per_device_train_batch_size=4, learning_rate=3e-3, warmup_steps=0, report_to="none",
    save_strategy="no", logging_steps=1, gradient_checkpointing="false", bf16="false", dtype="float32", use_cpu="true",
    disable_tqdm="true",
)  # fmt: skip


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / "sft" / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def words(name, **options):
    """The recipe, with changes that make it small."""
    given = [f"--config={ROOT / 'configs' / 'sft' / f'{name}.yaml'}".replace("=", " ", 1)]
    return " ".join([*given, *(f"--{key} {value}" for key, value in {**QUICK, **options}.items())]).split()


@pytest.fixture(scope="module")
def commonsense():
    return load("commonsense")


@pytest.fixture(scope="module")
def llava():
    return load("llava")


def question(task, choices, i):
    answer = choices[i % len(choices)]
    listed = " ".join(f"{choice}: thing {i + n}" for n, choice in enumerate(choices))
    instruction = f"Please choose: what is thing {i}?\n\n{listed}\n\nAnswer format: {'/'.join(choices)}"
    return {"instruction": instruction, "input": "", "output": f"the correct answer is {answer}", "answer": answer}


@pytest.mark.parametrize("name", ["commonsense", "llava"])
def test_the_recipe_is_read(name, request):
    module = request.getfixturevalue(name)
    arguments = getattr(module, f"{name.capitalize()}Arguments")
    recipe = ["--config", str(ROOT / "configs" / "sft" / f"{name}.yaml"), "--bf16", "false", "--use_cpu", "true"]
    own, training, adapter = TrlParser((arguments, SFTConfig, AdapterArguments)).parse_args_and_config(args=recipe)
    assert adapter.method == "fura" and training.weight_decay == 0 and own.dtype == "bfloat16"


def test_the_first_answer_of_a_task_counts(commonsense):
    assert set(commonsense.TASKS) == {
        "boolq", "piqa", "social_i_qa", "hellaswag", "winogrande", "ARC-Easy", "ARC-Challenge", "openbookqa",
    }  # fmt: skip
    assert commonsense.extract("boolq", "the correct answer is true, not false") == "true"
    assert commonsense.extract("hellaswag", "the correct answer is ending3") == "ending3"
    assert commonsense.extract("ARC-Easy", "the correct answer is answer5") == "answer5"
    assert commonsense.extract("openbookqa", "answer5") is None  # it has four
    assert commonsense.extract("piqa", "I do not know") is None


@pytest.mark.slow
def test_commonsense_learns_the_format_and_scores_every_task(commonsense, tmp_path, tiny_model):
    rows = {task: [question(task, choices, i) for i in range(3)] for task, choices in commonsense.TASKS.items()}
    train = tmp_path / "train.json"
    train.write_text(json.dumps([row for questions in rows.values() for row in questions] * 4))
    for task, questions in rows.items():
        (tmp_path / task).mkdir()
        (tmp_path / task / "test.json").write_text(json.dumps(questions))
    options = dict(model_name_or_path=tiny_model, train_file=train, test_dir=tmp_path, output_dir=tmp_path / "run")
    scores = commonsense.main(words("commonsense", **options, max_steps=24))
    assert list(scores) == list(commonsense.TASKS)
    assert all(
        score["questions"] == 3 and score["low"] <= score["accuracy"] <= score["high"] for score in scores.values()
    )
    assert sum(score["no_answer"] < 1 for score in scores.values()) >= 4  # the format is learnt, in most tasks
    assert json.loads((tmp_path / "run" / "scores.json").read_text()) == scores
    assert any(name.endswith("core") for name in load_file(tmp_path / "run" / "adapter_model.safetensors"))


@pytest.fixture
def tiny_llava(tmp_path, tiny_model):
    """A LLaVA of random weights: pictures of 16 x 16 are 16 patches."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    torch.manual_seed(0)
    text = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=len(tokenizer),
        pad_token_id=0, bos_token_id=None, eos_token_id=2,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, vision_feature_layer=-2,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    LlavaForConditionalGeneration(config).save_pretrained(tmp_path / "model")
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}"
        "{% else %}{% for c in m['content'] %}{{ '<image>' if c['type'] == 'image' else c['text'] }}{% endfor %}"
        "{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
        tokenizer, patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=template,
    ).save_pretrained(tmp_path / "model")  # fmt: skip
    return tmp_path / "model"


@pytest.mark.slow
def test_llava_trains_its_language_model_on_pictures(llava, tmp_path, tiny_llava):
    (tmp_path / "images").mkdir()
    rows = [{"conversations": [{"from": "human", "value": "No picture?"}, {"from": "gpt", "value": "No."}]}]
    for i, colour in enumerate(["red", "green", "blue", "white"]):
        Image.new("RGB", (20, 24), colour).save(tmp_path / "images" / f"{i}.png")
        turns = [("human", "<image>\nWhat colour is it?"), ("gpt", colour), ("human", "Sure?"), ("gpt", "Yes.")]
        rows.append({"image": f"{i}.png", "conversations": [{"from": who, "value": text} for who, text in turns]})
    data = tmp_path / "train.json"
    data.write_text(json.dumps(rows))

    found = llava.load_rows(data, tmp_path / "images")
    assert [len(row["prompt"]) for row in found] == [1] + [1, 3] * 4 and found[0]["images"] == []
    assert found[1]["prompt"][0]["content"] == "What colour is it?" and found[1]["images"][0].size == (20, 24)

    options = dict(
        model_name_or_path=tiny_llava, train_file=data, image_dir=tmp_path / "images", output_dir=tmp_path / "run"
    )
    trainer = llava.main(words("llava", **options, per_device_train_batch_size=9, learning_rate=1e-2))
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert len(losses) == 4 and losses[-1] < losses[0]
    trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert trained and all(re.search(r"language_model.*fura_", name) for name in trained)
