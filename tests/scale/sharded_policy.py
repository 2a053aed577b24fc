"""Run by `test_sharding.py` once per rank: trains a tiny policy under a kind of sharding and prints what came of it.

    python sharded_policy.py KIND RANK WORLD STORE ARCHITECTURE SIDE

Each rank takes its share of the same batch. The last line printed is JSON: losses, names of the merged stream in order,
and the largest difference of a streamed weight from that of the same training in one process.
"""

import json
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from peft import get_peft_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from fura_rl import FuraConfig
from fura_rl.rollout import merged_weights

ROWS, LENGTH, STEPS, VOCABULARY = 8, 12, 4, 66


def policy(architecture: str, side: str):
    """A random model with odd sizes (22 rows of an MLP do not divide by 4) and a FuRA adapter, also of the biases."""
    config_class, tied = {"llama": (LlamaConfig, False), "qwen2": (Qwen2Config, True)}[architecture]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        config_class(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=22,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=tied,
        )
    )
    config = FuraConfig(target_modules="all-linear", side=side, train_bias=architecture == "qwen2")
    return get_peft_model(model, config)


def train(model, rows: slice, optimizer=None) -> list[float]:
    """Losses on this rank's rows, of steps whose gradient is the mean over all rows.

    Without an optimizer, `model` is a DeepSpeed engine, which has its own.
    """
    tokens = torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))[rows]
    losses = []
    for _ in range(STEPS):
        loss = model(input_ids=tokens, labels=tokens).loss
        if optimizer is None:
            model.backward(loss)
            model.step()
        else:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append(float(loss))
    return losses


def sgd(model) -> torch.optim.SGD:
    """Adam would turn rounding of tiny gradients into whole steps."""
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=3e-2)


def deepspeed_engine(model, stage: int):
    import deepspeed

    config = {
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "train_micro_batch_size_per_gpu": 1,
        "zero_allow_untested_optimizer": True,
    }
    return deepspeed.initialize(model=model, optimizer=sgd(model), config=config)[0]


def held(parameter: torch.nn.Parameter) -> int:
    """How many of its entries this rank keeps."""
    if hasattr(parameter, "ds_tensor"):
        return parameter.ds_tensor.numel()
    return parameter.to_local().numel() if isinstance(parameter, DTensor) else parameter.numel()


def main() -> None:
    kind, rank, world, store, architecture, side = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:7]
    torch.set_num_threads(1)
    reference = policy(architecture, side)
    reference_losses = train(reference, slice(None), sgd(reference))
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, world), rank=rank, world_size=world, timeout=timedelta(seconds=300)
    )
    model = forward = policy(architecture, side)
    gather = {}
    if kind == "fsdp2":
        mesh = init_device_mesh("cpu", (world,))
        for layer in model.get_base_model().model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    elif kind == "ddp":
        forward = DistributedDataParallel(model)
    else:
        forward = deepspeed_engine(model, stage=int(kind.removeprefix("zero")))
    if kind == "zero3":
        import deepspeed

        gather = {"gather": deepspeed.zero.GatheredParameters}
    share = ROWS // world
    own = train(forward, slice(rank * share, (rank + 1) * share), None if "zero" in kind else sgd(forward))
    losses = torch.tensor(own)
    dist.all_reduce(losses)

    stream = [(name, tensor.clone()) for name, tensor in merged_weights(model, **gather)]
    bf16 = {name: tensor.clone() for name, tensor in merged_weights(model, dtype=torch.bfloat16, **gather)}
    expected, start = dict(merged_weights(reference)), dict(merged_weights(policy(architecture, side)))
    assert [name for name, _ in stream] == list(expected)
    assert all(torch.equal(bf16[name], tensor.to(torch.bfloat16)) for name, tensor in stream)
    parameters = list(model.parameters())
    print(
        json.dumps(
            {
                "losses": (losses / world).tolist(),
                "reference": reference_losses,
                "difference": max(float((tensor - expected[name]).abs().max()) for name, tensor in stream),
                "moved": max(float((tensor - start[name]).abs().max()) for name, tensor in stream),
                "held": sum(held(p) for p in parameters),
                "parameters": sum(p.numel() for p in reference.parameters()),
            }
        )
    )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
