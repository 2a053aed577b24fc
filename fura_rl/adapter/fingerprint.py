"""How an adapter knows its base weight again: a few entries, a hash, and a probe of the basis."""

import hashlib

import torch

SAMPLES = 64
DIFFERENT = 0.5  # NF4 moves a weight's entries by about 10%, fine-tuning by a few %, another model by 140%
PROBE_TOLERANCE = 1e-3


def sample_entries(weight: torch.Tensor) -> torch.Tensor:
    """64 entries of `weight` (out, in) at fixed pseudo-random places, in float32."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = (torch.randint(size, (SAMPLES,), generator=generator).to(weight.device) for size in weight.shape)
    return weight[rows, columns].float()


def is_other_weight(recorded: torch.Tensor, found: torch.Tensor) -> bool:
    """Whether two samples come from different weights, rather than from one in two precisions or fine-tunings."""
    return bool(are_other_weights(recorded.to(found.device), found))


def are_other_weights(recorded: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """`is_other_weight` of many samples (*, 64) at once, as booleans (*)."""
    scale = torch.maximum(recorded.norm(dim=-1), found.norm(dim=-1))
    return (recorded - found).norm(dim=-1) > DIFFERENT * scale


def weight_fingerprint(weight: torch.Tensor) -> torch.Tensor:
    """SHA-256 (32 bytes, uint8) of the values of `weight` (out, in) in float32: bf16 loaded as float32 hashes alike."""
    digest = hashlib.sha256(str(tuple(weight.shape)).encode())
    for rows in weight.split(1024):
        digest.update(rows.float().cpu().contiguous().numpy())
    return torch.tensor(list(digest.digest()), dtype=torch.uint8)


def basis_probe(basis: torch.Tensor) -> torch.Tensor:
    """`V^T r` (n, b) in float32 with one fixed vector `r`: changes if any vector flips its sign or turns."""
    reference_b = torch.randn(basis.shape[-1], generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return (reference_b.to(basis.device) @ basis.double()).float().cpu()


def same_probe(recorded: torch.Tensor, found: torch.Tensor) -> bool:
    """Whether two probes belong to one basis."""
    return recorded.shape == found.shape and bool(((recorded.cpu() - found).abs() < PROBE_TOLERANCE).all())
