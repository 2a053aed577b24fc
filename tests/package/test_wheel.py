"""A wheel built from the tree carries every room and every recipe, and imports from where it is installed."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CHECK = """
import json, fura_rl, fura_rl.rewards, fura_rl.eval, fura_rl.configs, fura_rl.cli
from fura_rl.eval import load_benchmark
from fura_rl.rewards import MathVerifier
with MathVerifier(workers=1) as verifier:
    grade = verifier.grade([r"\\boxed{\\frac{2}{4}}"], ["1/2"])[0]
files = [fura_rl.configs.path(name) for name in ("demo.yaml", "accelerate/zero3.yaml", "deepspeed/zero3.json")]
found = all(file.is_file() for file in files)
print(json.dumps([[m.__file__ for m in (fura_rl, fura_rl.rewards, fura_rl.eval)], found, grade.reason]))
"""


@pytest.mark.slow
def test_wheel_installs_and_imports(tmp_path):
    source = tmp_path / "source"
    files = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    for name in files.stdout.splitlines():
        if not name.startswith("tests/") and (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, source], check=True)
    (wheel,) = tmp_path.glob("fura_rl-*.whl")
    site = tmp_path / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", site, wheel], check=True)
    assert {path.name for path in site.iterdir()} - {"bin", f"{wheel.name.split('-py3')[0]}.dist-info"} == {"fura_rl"}
    process = subprocess.run(
        [sys.executable, "-c", CHECK], cwd=tmp_path, env={"PYTHONPATH": str(site), "PATH": "/usr/bin:/bin"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-2000:]
    where, found, reason = json.loads(process.stdout.splitlines()[-1])
    assert all(Path(path).is_relative_to(site) for path in where)
    assert found and reason == "correct"


def test_python_that_is_too_old_is_told_so(tmp_path):
    """The environment script speaks before anything else can fail (here with the limit moved above this Python)."""
    script = tmp_path / ".ci" / "environment.py"
    script.parent.mkdir()
    script.write_text((ROOT / ".ci" / "environment.py").read_text().replace("(3, 11)", "(4, 0)"))
    process = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert process.returncode == 2
    assert process.stderr.startswith("error: fura-rl needs Python 3.11 or newer") and process.stderr.count("\n") == 1
