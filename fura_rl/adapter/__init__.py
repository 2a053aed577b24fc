"""FuRA as a method of PEFT: configuration, layers, model. Importing this package registers it."""

from .config import FuraConfig
from .errors import AdapterError
from .layer import FuraLayer
from .model import FuraModel
from .registration import register_fura
from .saving import load_deltas, save_adapter

register_fura(FuraConfig, FuraModel)

__all__ = ["AdapterError", "FuraConfig", "FuraLayer", "FuraModel", "load_deltas", "save_adapter"]
