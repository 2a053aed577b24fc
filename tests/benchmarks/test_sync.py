"""The sync benchmark on small shapes: it runs, and what it says beside the seconds is true."""

import json
import sys
from pathlib import Path

import forked
import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "sync.py"
sys.path.insert(0, str(SCRIPT.parent))


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.parametrize("server", [False, pytest.param(True, marks=pytest.mark.soak)])
def test_rows_and_drift(server):
    process = forked.run(SCRIPT, "--shape", "tiny", "--rounds", "2", *([] if server else ["--no-server"]))
    assert process.returncode == 0, process.stderr[-3000:]
    report = json.loads(process.stdout.strip().splitlines()[-1])["models"]["tiny"]
    rows = {row["row"]: row for row in report["rows"]}
    assert list(rows) == ["copy", "fura", "fura, by name", "trl, fura", "trl, lora_r32"]
    assert all(row["drift"] == 0 for name, row in rows.items() if "lora" not in name)
    assert 0 < rows["trl, lora_r32"]["drift"] < 1e-6  # in float32; unmerging by subtraction leaves rounding behind
    assert report["gaps"].keys() == {"after a sync", "decoded"}
    assert all(gap < 1e-5 for gap in report["gaps"].values())
    if server:
        assert report["server"]["gap"] < 1e-5
        assert report["server"]["bytes"] < 0.6 * report["server"]["first_bytes"] < 0.3 * report["merged_bytes"]


@pytest.mark.soak
@pytest.mark.vllm
def test_a_server_that_ends_is_not_waited_for(tmp_path):
    from sync_server import SyncServer

    missing = tmp_path / "missing"
    with SyncServer(str(missing), tmp_path / "log", "float32") as server, pytest.raises(SystemExit) as stopped:
        server.connect()
    first, *log = str(stopped.value).splitlines()
    assert first.startswith(f"The server at {server.url} ended with status ") and str(missing) in "".join(log)
