"""Keys of earlier edits, handed from batch to batch by sequential methods (MEMIT-seq, AlphaEdit) as a delta's state.

The state holds, per edited parameter, keys as rows, and the fingerprint of the model they were read on. Only K K^T ever
enters a solve, so once there are more keys than dimensions they are replaced by the triangular factor with the same
K K^T: the state never outgrows one matrix per layer.
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from retcon.checked import under
from retcon.errors import DeltaMismatch
from retcon.lm.devices import float64_device
from retcon.lm.model import LM
from retcon.lm.site import Site

_BASE, _KEYS = "base", "keys/"


def earlier_keys(
    state: Mapping[str, Tensor] | None, lm: LM, sites: Sequence[Site]
) -> dict[str, Float[Tensor, "n_earlier m"]]:
    """Return the earlier keys in a state, by parameter name; none where there is no state yet.

    Raises:
        DeltaMismatch: the state is of another model or of other layers.
    """
    if state is None:
        return {}
    if _BASE not in state or not torch.equal(state[_BASE], _fingerprint(lm)):
        raise DeltaMismatch(
            f"the state given does not belong to {lm.name!r} (it is another model's, or another method's); start "
            "without a state, or on the model it was made on"
        )
    found = under(_KEYS, state)
    wanted = {site.name: site.shape[1] for site in sites}
    if {name: keys.shape[1] for name, keys in found.items()} != wanted:
        raise DeltaMismatch(
            f"the state given holds keys of {', '.join(found) or 'nothing'}; this method edits {', '.join(wanted)}. "
            "Go on with the layers that the earlier batches used, or start without a state."
        )
    return found


def extended(
    earlier: Mapping[str, Float[Tensor, "n_earlier m"]], fresh: Mapping[str, Float[Tensor, "n m"]], lm: LM
) -> dict[str, Tensor]:
    """Return the state after a batch whose keys are `fresh`."""
    state = {_KEYS + name: _joined(earlier.get(name), keys, lm.device) for name, keys in fresh.items()}
    return {_BASE: _fingerprint(lm), **state}


def _joined(earlier: Tensor | None, fresh: Tensor, device: torch.device) -> Tensor:
    if earlier is None:
        rows = fresh
    else:
        rows = torch.cat([earlier, fresh.to(torch.promote_types(earlier.dtype, fresh.dtype))])
    if len(rows) <= rows.shape[1]:
        return rows
    there = rows.to(float64_device(device, rows.shape[1]), torch.float64)
    return torch.linalg.qr(there, mode="r").R.to(rows.device)  # R^T R = sum of k k^T


def _fingerprint(lm: LM) -> Tensor:
    return torch.tensor(list(bytes.fromhex(lm.fingerprint())), dtype=torch.uint8)
