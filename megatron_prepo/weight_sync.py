"""From the actor's shards to the engine's weights, under Hugging Face names, in buckets."""

from checkpoints_convert.megatron_to_hf import buckets

BUCKET_BYTES = 512 << 20


def sync_weights(actor, engine) -> None:
    """Give the engine the actor's weights; afterwards its version is the actor's update count.

    Collective.  The engine refuses an unknown, repeated, missing or misshapen tensor by name.
    """
    engine.load_weights(buckets(actor.hf_weights(), BUCKET_BYTES), version=actor.updates)
