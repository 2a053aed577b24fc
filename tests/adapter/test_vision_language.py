"""A vision-language model of random weights, with FuRA on its language part."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny_nets import fura_layers
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from fura_rl.adapter import FuraConfig

IMAGE_TOKEN, VISION_START = 60, 61


def tiny_qwen2_vl() -> Qwen2VLForConditionalGeneration:
    torch.manual_seed(0)
    config = Qwen2VLConfig(
        text_config=dict(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=64, rope_scaling={"type": "mrope", "mrope_section": [1, 1, 2]}, max_position_embeddings=128,
            pad_token_id=0, bos_token_id=1, eos_token_id=2,
        ),
        vision_config=dict(depth=1, embed_dim=16, hidden_size=32, num_heads=2, mlp_ratio=2, patch_size=4,
                           temporal_patch_size=2, spatial_merge_size=2, in_channels=3),
        image_token_id=IMAGE_TOKEN, vision_start_token_id=VISION_START, vision_end_token_id=62, video_token_id=63,
    )  # fmt: skip
    model = Qwen2VLForConditionalGeneration(config)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """Two prompts with one image of 4 x 4 patches (4 merged tokens) each."""
    torch.manual_seed(1)
    ids = torch.tensor([[5, VISION_START, *[IMAGE_TOKEN] * 4, 62, 7, 8, 9]] * 2)
    patches = torch.randn(2 * 16, 3 * 2 * 4 * 4)
    types = (ids == IMAGE_TOKEN).int()
    return dict(
        input_ids=ids, pixel_values=patches, image_grid_thw=torch.tensor([[1, 4, 4]] * 2), mm_token_type_ids=types
    )


def test_language_part_trains_saves_loads_and_merges(batch, tmp_path):
    base = tiny_qwen2_vl()
    start = base(**batch).logits.detach()
    config = FuraConfig(target_modules=r".*language_model.*\.(q|k|v|o|gate|up|down)_proj", block_size="head")
    model = get_peft_model(base, config)
    layers = fura_layers(model)
    assert len(layers) == 14 and all("language_model" in name for name in layers)
    assert torch.equal(model(**batch).logits, start)

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    assert not any(p.grad is not None for n, p in model.named_parameters() if "visual" in n)

    trained = model(**batch).logits.detach()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_qwen2_vl(), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(loaded(**batch).logits, trained)
    torch.testing.assert_close(loaded.merge_and_unload()(**batch).logits, trained, rtol=1e-4, atol=1e-4)


def test_all_linear_reaches_the_vision_tower_too(batch):
    model = get_peft_model(tiny_qwen2_vl(), FuraConfig(target_modules="all-linear"))
    assert any("visual" in name for name in fura_layers(model))
    loss = model(**batch, labels=batch["input_ids"]).loss
    loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
