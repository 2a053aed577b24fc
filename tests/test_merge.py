"""`fura-rl merge`: the dense checkpoint computes what the adapted model computes."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from fura_rl import FuraConfig
from fura_rl.cli import app
from fura_rl.errors import FuraError
from fura_rl.merge import merge

TEXT = "Ann has 3 apples and buys 4 more."


@pytest.fixture(scope="module", params=["input", "output"])
def adapter(request, tmp_path_factory, tiny_model):
    """An adapter of the tiny model whose trained tensors are far from zero."""
    torch.manual_seed(0)
    config = FuraConfig(target_modules="all-linear", task_type="CAUSAL_LM", side=request.param)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.02)
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder)
    return folder


def logits(model, tokenizer):
    with torch.no_grad():
        return model(**tokenizer(TEXT, return_tensors="pt", return_token_type_ids=False)).logits


def test_logits_and_tokenizer_are_the_adapted_models(adapter, tiny_model, tmp_path):
    out = tmp_path / "merged"
    result = CliRunner().invoke(app, ["merge", str(adapter), "--out", str(out), "--dtype", "float32"])
    assert result.exit_code == 0, result.output
    assert not (out / "adapter_config.json").exists() and not list(tmp_path.glob("*.partial"))
    tokenizer = AutoTokenizer.from_pretrained(out)
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype="float32")
    before = logits(base, tokenizer)
    wanted = logits(PeftModel.from_pretrained(base, adapter), tokenizer)
    assert (wanted - before).abs().max() > 0.1
    merged = AutoModelForCausalLM.from_pretrained(out)
    assert merged.dtype == torch.float32
    torch.testing.assert_close(logits(merged, tokenizer), wanted, atol=2e-4, rtol=0)
    messages = [{"role": "user", "content": TEXT}]
    original = AutoTokenizer.from_pretrained(tiny_model)
    assert tokenizer.apply_chat_template(messages) == original.apply_chat_template(messages)


def test_the_dtype_is_the_base_checkpoints(adapter, tmp_path):
    merge(adapter, tmp_path / "merged")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto").dtype == torch.bfloat16


def test_mistakes(adapter, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    with pytest.raises(FuraError, match="exists already"):
        merge(adapter, tmp_path / "taken")
    with pytest.raises(FuraError, match="is not an adapter"):
        merge(tmp_path / "taken", tmp_path / "out")
    with pytest.raises(FuraError, match="cannot be loaded"):
        merge(adapter, tmp_path / "out", base=str(tmp_path / "no-model"))
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]
