"""Which importance ratios count as clipped, and how adapted layers are grouped when a fault is looked for."""

from types import SimpleNamespace

import pytest
import torch

from fura_rl.trainer.engine_check import by_decoder_layer, clipped_share

GAP = torch.log(torch.tensor([[1.0, 4.0, 0.2, 9.0], [2.0, 2.0, 2.0, 1.0], [1.0, 1.0, 1.0, 1.0]]))
MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]]).bool()


@pytest.mark.parametrize(
    "mode, low, high, expected",
    [
        ("token_truncate", None, 3.0, 1 / 7),  # 4; not the 9 that is masked out
        ("token_mask", 0.5, 3.0, 2 / 7),
        ("token_truncate", None, None, 0.0),
        ("sequence_mask", None, 3.0, 1 / 2),  # 0.8 and 8; a rollout without tokens does not count
        ("sequence_truncate", 0.9, None, 1 / 2),
    ],
)
def test_clipped_share(mode, low, high, expected):
    args = SimpleNamespace(
        vllm_importance_sampling_mode=mode,
        vllm_importance_sampling_clip_min=low,
        vllm_importance_sampling_clip_max=high,
    )
    assert float(clipped_share(GAP, MASK, args)) == pytest.approx(expected)
    assert float(clipped_share(GAP, torch.zeros_like(MASK), args)) == 0


def test_layers_are_grouped_by_decoder_layer():
    names = ["model.layers.0.mlp.up_proj", "model.layers.10.mlp.up_proj", "model.layers.0.self_attn.q_proj", "lm_head"]
    assert by_decoder_layer(names) == {
        "model.layers.0": [names[0], names[2]],
        "model.layers.10": [names[1]],
        "lm_head": ["lm_head"],
    }
