"""How many bytes a push carries for real models' shapes: at most 2% of the merged weights."""

import json
from pathlib import Path

import forked

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "push.py"


def test_a_push_carries_two_percent_of_the_merged_weights():
    process = forked.run(SCRIPT)
    assert process.returncode == 0, process.stderr[-3000:]
    found = json.loads(process.stdout.strip().splitlines()[-1])
    assert found["qwen3-1.7b"]["merged"] == 3_441_149_952 and found["qwen2.5-0.5b"]["merged"] == 988_065_536
    for sizes in found.values():
        assert sizes["int8"] < 0.02 * sizes["merged"] < sizes["exact"] < 0.51 * sizes["first"]
        assert sizes["int8"] < 0.26 * sizes["exact"]
