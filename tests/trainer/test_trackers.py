"""TensorBoard gets what `metrics.jsonl` gets, under the same names; nobody gets a secret."""

import json
import struct

import yaml
from tensorboardX.proto.event_pb2 import Event

from fura_rl import train_grpo


def events(path):
    """The events of a TensorBoard file: TFRecords, each a length, a checksum, the bytes, a checksum."""
    content, at = path.read_bytes(), 0
    while at < len(content):
        (length,) = struct.unpack_from("<Q", content, at)
        yield Event.FromString(content[at + 12 : at + 12 + length])
        at += 12 + length + 4


SECRET = "hf_notToBeSeenAnywhere"


def test_tensorboard_has_the_same_metrics_and_no_file_a_secret(recipe, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("MASTER_PORT", "0")
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({**recipe, "max_steps": 2, "report_to": ["tensorboard"], "use_cpu": True}))
    assert train_grpo.main(["--config", str(file), "--hub_token", SECRET]) == 0
    output = capfd.readouterr()
    assert "hub_token: <hidden>" in output.out and SECRET not in output.out + output.err
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(files) > 10 and not [path for path in files if SECRET.encode() in path.read_bytes()]
    seen = {
        (value.tag, event.step): value.simple_value
        for path in (tmp_path / "run" / "tensorboard").glob("events.*")
        for event in events(path)
        for value in event.summary.value
        if value.HasField("simple_value")
    }
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        for name, value in row.items():
            if name in ("step", "time") or value is None:
                continue
            tag = f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}"
            assert (tag, row["step"]) in seen, tag
            if name not in ("epoch", "train_runtime"):
                assert seen[tag, row["step"]] == struct.unpack("f", struct.pack("f", value))[0], name
    assert {"train/reward", "train/entropy", "eval/test_accuracy"} <= {tag for tag, _ in seen}
    assert not (tmp_path / "runs").exists()  # where its writer would put what comes before training
