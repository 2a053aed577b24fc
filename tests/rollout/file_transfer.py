"""vLLM's weight transfer through a file, for machines without NCCL: a backend for the server, and TRL's client of it.

Everything else of the `merged` transport is what runs on GPUs: TRL's order of calls, our stream, vLLM's endpoints and
its loading. The server imports this module as its worker extension, which registers the backend.
"""

from dataclasses import dataclass

from safetensors.torch import load_file, save_file
from trl.generation.vllm_client import VLLMClient
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import WeightTransferEngine
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from fura_rl.rollout.worker import FuraWorker


@dataclass
class Nothing:
    pass


@dataclass
class File:
    path: str
    names: list


class FileEngine(WeightTransferEngine):
    init_info_cls, update_info_cls = Nothing, File

    def init_transfer_engine(self, init_info):
        pass

    def start_weight_update(self):
        initialize_layerwise_reload(self.model)

    def finish_weight_update(self):
        finalize_layerwise_reload(self.model, self.model_config)

    def update_weights(self, update_info):
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info):
        tensors = load_file(update_info.path)
        self.model.load_weights((name, tensors[name]) for name in update_info.names)

    def shutdown(self):
        pass

    @staticmethod
    def trainer_send_weights(iterator, trainer_args):  # vLLM 0.26 asks for it; TRL's client sends by itself
        raise NotImplementedError


if "file" not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine("file", FileEngine)


class Extension(FuraWorker):
    """What `fura-rl serve` adds to a worker, from this module."""


class FileClient(VLLMClient):
    """TRL's client where it would open and use an NCCL group.

    Attributes:
        folder: Where files are written; set before use.
    """

    folder = None

    def init_communicator(self, device):
        self._post(f"{self.base_url}/init_weight_transfer_engine", json={"init_info": {}})

    def update_named_params(self, metadata, named_params):
        tensors = {}
        for (name, dtype, shape), (own_name, tensor) in zip(metadata, named_params, strict=True):
            assert (name, dtype, tuple(shape)) == (own_name, str(tensor.dtype).removeprefix("torch."), tensor.shape)
            tensors[name] = tensor.clone()
        path = self.folder / "weights.safetensors"
        save_file(tensors, path)
        info = {"path": str(path), "names": list(tensors)}
        self._start_weight_update()
        self._post(f"{self.base_url}/update_weights", json={"update_info": info})
        self._finish_weight_update()
