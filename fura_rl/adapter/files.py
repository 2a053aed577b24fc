"""Adapter files: what may be opened at all."""

from pathlib import Path

from huggingface_hub import constants, file_exists, try_to_load_from_cache
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from .errors import AdapterError


def check_adapter_file(folder: str, subfolder: str | None = None, revision: str | None = None) -> None:
    """Raises AdapterError if the weights in `folder` (or of this Hub repository) are pickled or cannot be read."""
    path = Path(folder, subfolder or "")
    if path.is_dir():
        weights = path / SAFETENSORS_WEIGHTS_NAME
        pickled = not weights.exists() and (path / WEIGHTS_NAME).exists()
        if weights.exists():
            try:
                with safe_open(weights, framework="pt"):
                    pass
            except SafetensorError as error:
                raise AdapterError(f"{weights} is truncated or no safetensors file ({error}).") from error
    else:
        names = [f"{subfolder}/{name}" if subfolder else name for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)]
        if constants.HF_HUB_OFFLINE:
            safe, pickle = (isinstance(try_to_load_from_cache(folder, name, revision=revision), str) for name in names)
        else:
            safe, pickle = (file_exists(folder, name, revision=revision) for name in names)
        pickled = pickle and not safe
    if pickled:
        raise AdapterError(
            f"{folder} holds {WEIGHTS_NAME}, a pickle, which can run code when it is loaded: fura-rl reads "
            f"{SAFETENSORS_WEIGHTS_NAME} only. Save the adapter again with safe_serialization=True."
        )
