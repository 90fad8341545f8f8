"""What a trainer finds in its slots, and in the matrices that its bridge lends.

    python read_slots.py OUT [OPTION ...]

A process of its own, as a trainer is, which has never imported torch. OPTIONs are `jaxdraft.train`'s. OUT is JSON.
"""

import hashlib
import json
import sys
from pathlib import Path

import jax
import numpy as np

from jaxdraft.bridges import mapped_weights, open_bridge
from jaxdraft.cli import parse_args
from jaxdraft.features import FeatureStream
from jaxdraft.gpu_memory import claim_gpu_memory
from jaxdraft.held_out import prepare_jax
from jaxdraft.run import make_plan
from jaxdraft.target import load_frozen, open_target

ROWS = 7  # more than there are slots: each comes round again


def digest(array) -> str:
    return hashlib.sha256(np.ascontiguousarray(np.asarray(array)).tobytes()).hexdigest()


def seen(array, producer) -> dict:
    """An array that was made of a producer: where it is, and what is in it."""
    return {
        "dtype": str(array.dtype),
        "platform": next(iter(array.devices())).platform,
        "in_place": array.unsafe_buffer_pointer() == producer.address,
        "digest": digest(array),
    }


def main(out: str, arguments: list[str]) -> None:
    config = parse_args(arguments)
    prepare_jax(config)
    device = jax.local_devices()[0]
    claim_gpu_memory([device])
    target = open_target(config.target)
    found = {"slots": [], "addresses": []}
    with open_bridge(config, config.draft.target_layer_ids, log_path=Path(out).with_suffix(".log")) as bridge:
        lengths, none = np.frombuffer(bridge.ready.indexes["train"].lengths, "<i4"), np.empty(0, np.int32)
        requests = [
            request for _, request in zip(range(ROWS), make_plan(config, lengths, none).requests(0), strict=False)
        ]
        stream = FeatureStream(bridge, requests)
        for slot in stream:
            (filled,) = slot.filled
            producers = bridge.slot(filled, 0)
            found["slots"].append({n: seen(getattr(slot.batch, n), producer) for n, producer in producers.items()})
            found["addresses"].append(producers["features"].address)
            stream.release(slot.filled)
        try:
            lent = mapped_weights(bridge, device)
        except ValueError as error:
            found["not_lent"] = str(error)
        else:
            own = zip(("embedding", "head"), load_frozen(config.target, target, lent["embedding"].dtype), strict=True)
            producers = bridge.weights(device.local_hardware_id)
            found["lent"] = {name: seen(array, producers[name]) for name, array in lent.items()}
            found["of_the_file"] = {name: digest(matrix) for name, matrix in own}
            del lent
    found["torch"] = "torch" in sys.modules
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
