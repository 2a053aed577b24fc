"""Into which blocks the adapters of a server fit."""

import pytest
import torch

from fura_rl.adapter.basis import aligned_block_size, closest_block_size
from fura_rl.errors import FuraError
from fura_rl.rollout.multi_settings import MultiSettings, common_block_sizes
from fura_rl.rollout.payload import Adapter


def adapter(*shapes):
    return Adapter({}, {str(i): {"core": torch.zeros(n, b, b)} for i, (n, b) in enumerate(shapes)})


def test_blocks_of_all_adapters_and_of_the_default_size_fit():
    sizes = common_block_sizes([adapter((32, 64), (128, 48)), adapter((64, 32))])
    assert sizes == {2048: 64, 6144: 96}  # 48 and the default's 96


def test_aligned_blocks_keep_their_size_where_the_default_would_make_them_too_large():
    width = 18944
    assert (closest_block_size(width), aligned_block_size(width)) == (148, 128)
    assert common_block_sizes([adapter((148, 128))]) == {width: 128}
    with pytest.raises(FuraError, match=r"Layers of 18944 features have blocks of 4736 .* Merge such an adapter"):
        common_block_sizes([adapter((148, 128)), adapter((128, 148))])


def test_settings_travel_through_the_environment(monkeypatch):
    for name, value in MultiSettings(folders=["a"], block_sizes={18944: 128}).to_environment().items():
        monkeypatch.setenv(name, value)
    found = MultiSettings.from_environment()
    assert found.folders == ["a"] and found.block_size(18944) == 128 and found.block_size(2048) == 64
