"""`examples/quickstart.ipynb`: its cells run in order, and its stored outputs come from such a run."""

import json
import os
from pathlib import Path

import forked
import pytest

NOTEBOOK = Path(__file__).parents[2] / "examples" / "quickstart.ipynb"


def cells():
    return [c for c in json.loads(NOTEBOOK.read_text())["cells"] if c["cell_type"] == "code"]


def test_it_was_run_from_top_to_bottom():
    assert [cell["execution_count"] for cell in cells()] == list(range(1, len(cells()) + 1))
    assert not any(output["output_type"] == "error" for cell in cells() for output in cell["outputs"])


@pytest.mark.slow
def test_its_cells_run(tmp_path):
    """With a single step of GRPO."""
    script = tmp_path / "notebook.py"
    script.write_text("\n".join("".join(cell["source"]) for cell in cells()))
    environment = {**os.environ, "MPLBACKEND": "agg", "FURA_NOTEBOOK_STEPS": "1", "TMPDIR": str(tmp_path)}
    process = forked.run(script, cwd=NOTEBOOK.parent, environment=environment)
    assert process.returncode == 0, process.stderr[-3000:]
    for words in ("same bits as the base model: True", "after 1 steps", "merged and adapted", "\\boxed{"):
        assert words in process.stdout
