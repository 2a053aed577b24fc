"""Sampling sharded over processes: the samples are those of one process, and failures end every rank."""

import textwrap
from ast import literal_eval

import pytest
from forked import Forked

from fura_rl.eval import Sampling, TransformersSampler, evaluate, load_benchmark
from fura_rl.prompts import load_prompt

RUN = """
import os, sys
from datetime import timedelta
import torch, torch.distributed as dist
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from fura_rl.errors import FuraError
from fura_rl.eval import Sampling, TransformersSampler, evaluate, load_benchmark
from fura_rl.eval.distributed import ShardedSampler
from fura_rl.prompts import load_prompt
from fura_rl.rewards import MathVerifier

rank, world, group, model, data, fault = *map(int, sys.argv[1:4]), *sys.argv[4:7]
torch.set_num_threads(1)
store = dist.FileStore(sys.argv[7], world)
dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=300))
tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
own = TransformersSampler(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), tokenizer, 2)
drawn = []

class Counting:
    def sample(self, requests, on_sample=None):
        drawn.extend(r.seed for r in requests)
        if fault == "sampler" and rank == world - 1:
            raise RuntimeError("out of memory")
        return own.sample(requests, on_sample)

try:
    with MathVerifier(workers=1) as verifier, ShardedSampler(Counting(), group_size=group) as sampler:
        if rank == 0:
            if fault == "before":
                raise FuraError("bad benchmark")
            result = evaluate(
                sampler, tokenizer, [load_benchmark(data)], prompt=load_prompt("boxed"), verifier=verifier,
                sampling=Sampling(temperature=1.0, n=2, max_tokens=6), progress=False,
            )
            print("TEXTS", [s.completion.text for row in result.samples["sums"] for s in row])
        else:
            sampler.serve()
except FuraError as error:
    print("ERROR", error)
print("SEEDS", sorted(drawn))
dist.destroy_process_group()
"""


@pytest.fixture
def launch(tmp_path, tiny_model, sums_file):
    def start(world, group=1, fault="none"):
        script = tmp_path / "run.py"
        script.write_text(textwrap.dedent(RUN))
        store = tmp_path / f"store-{world}-{group}-{fault}"
        processes = [Forked(script, rank, world, group, tiny_model, sums_file, fault, store) for rank in range(world)]
        outputs = []
        try:
            for process in processes:
                done = process.wait(600)
                assert done.returncode == 0, done.stderr[-2000:]
                lines = [line.split(" ", 1) for line in done.stdout.splitlines()]
                outputs.append(dict(line for line in lines if line[0].isupper()))
        finally:
            for process in processes:
                process.kill()
        return outputs

    return start


@pytest.mark.slow
def test_two_ranks_draw_what_one_draws(launch, tiny, sums_file, verifier):
    alone = evaluate(
        TransformersSampler(*tiny),
        tiny[1],
        [load_benchmark(str(sums_file))],
        prompt=load_prompt("boxed"),
        sampling=Sampling(temperature=1.0, n=2, max_tokens=6),
        verifier=verifier,
        progress=False,
    )
    completions = [sample.completion for row in alone.samples["sums"] for sample in row]
    first, second = launch(2)
    assert literal_eval(first["TEXTS"]) == [c.text for c in completions]
    seeds = [set(literal_eval(output["SEEDS"])) for output in (first, second)]
    assert len(seeds[0]) == len(seeds[1]) == 6 and not seeds[0] & seeds[1]
    assert seeds[0] | seeds[1] == {c.seed for c in completions}


@pytest.mark.slow
def test_ranks_of_one_engine_draw_the_same_share(launch):
    outputs = launch(2, group=2)
    assert outputs[0]["SEEDS"] == outputs[1]["SEEDS"]
    assert len(literal_eval(outputs[0]["SEEDS"])) == 12
    assert "TEXTS" in outputs[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "message"),
    [("sampler", "Sampling failed on another rank: RuntimeError: out of memory"), ("before", "bad benchmark")],
)
def test_a_failure_ends_every_rank(launch, fault, message):
    outputs = launch(2, fault=fault)
    assert outputs[0]["ERROR"] == message
    assert set(outputs[1]) == {"SEEDS"}
