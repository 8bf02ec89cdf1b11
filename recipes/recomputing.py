"""Layers that compute their activations again in the backward pass instead of keeping them (gradient checkpointing)."""

from transformers import PreTrainedModel

from onegpu.adapters import RecipeError

from .schema import Checkpointing

__all__ = ["recompute"]


def recompute(model: PreTrainedModel, asked: Checkpointing | None) -> str:
    """Let a model recompute what a recipe asks for; returns a line about what is not done.

    Raises:
        RecipeError: the model cannot.
    """
    if asked is None:
        return ""
    at_host = model.device.type == "cpu"
    try:
        # Reentrant checkpointing would need an input with a gradient, and passes over hooks.
        model.activation_checkpointing_enable(
            {"use_reentrant": False}, every_n_layers=asked.every, offload=asked.offload and not at_host
        )
    except ValueError as cause:
        raise RecipeError(f"train.gradient_checkpointing: {cause}") from cause
    return "nothing is offloaded: activations are in the memory of the host" if at_host and asked.offload else ""
