from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from onegpu.recipes import Recipe, Train
from onegpu.recipes.tasks.chat import Chat
from onegpu.recipes.tasks.classification import Classification

MODELS: list[type[BaseModel]] = [Recipe, Train, Chat, Classification]
FIELDS = [(model, name) for model in MODELS for name in model.model_fields]


@pytest.mark.parametrize(("model", "name"), FIELDS, ids=lambda value: getattr(value, "__name__", value))
def test_every_setting_is_documented(model: type[BaseModel], name: str) -> None:
    assert model.model_fields[name].description


@pytest.mark.parametrize("model", MODELS)
def test_unknown_keys_are_refused(model: type[BaseModel]) -> None:
    with pytest.raises(ValidationError, match="extra_forbidden"):
        model.model_validate({"base": "b", "task": "chat", "data": "d", "nonsense": 1})


@pytest.mark.parametrize(
    "model", [Train(), Recipe(base="b", task="chat"), Chat(data="d")], ids=lambda m: type(m).__name__
)
def test_settings_cannot_be_changed_after_reading(model: BaseModel) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        setattr(model, next(iter(type(model).model_fields)), "other")


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"steps": 1, "epochs": 1}, "not both"),
        ({"schedule": "constant", "warmup": 0.1}, "constant_with_warmup"),
        ({"schedule": "constant", "warmup": 5}, "constant_with_warmup"),
        ({"steps": 0}, "steps"),
        ({"steps": 1.0}, "steps"),
        ({"steps": "1"}, "steps"),
        ({"steps": True}, "steps"),
        ({"effective_batch": 0}, "effective_batch"),
        ({"micro_batch": "all"}, "micro_batch"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"learning_rate": "2e-4"}, "learning_rate"),
        ({"learning_rate": float("inf")}, "learning_rate"),
        ({"learning_rate": 1e38}, "learning_rate"),  # torch cannot apply it, and says so in the first step
        ({"learning_rate": 1e-8, "schedule": "polynomial"}, "`polynomial` ends at 1e-07"),
        ({"weight_decay": float("inf")}, "weight_decay"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"clip": 0.0}, "clip"),
        ({"warmup": 1.0}, "warmup"),
        ({"warmup": -1}, "warmup"),
        ({"optimizer": "adam"}, "optimizer"),
        ({"schedule": "cosin"}, "schedule"),
        ({"precision": "fp8"}, "precision"),
        ({"evaluate_every": 0}, "evaluate_every"),
        ({"checkpoint_every": 0}, "checkpoint_every"),
        ({"gradient_checkpointing": 1}, "must be true, false, or settings such as {every: 2}"),
        ({"gradient_checkpointing": {"every": 0}}, "every"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**32}, "seed"),  # numpy's generator takes 32 bits, and would say so after the base was read
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        Train.model_validate(settings)


@pytest.mark.parametrize(
    "settings",
    [{"warmup": 0}, {"warmup": 5}, {"warmup": 0.03}, {"clip": None}, {"evaluate_every": None}, {"learning_rate": 1}],
    ids=str,
)
def test_settings_at_the_edge_are_taken(settings: dict[str, Any]) -> None:
    ((name, value),) = settings.items()
    assert getattr(Train.model_validate(settings), name) == value


@pytest.mark.parametrize(
    "written", [True, False, {"every": 2, "offload": False}, {"every": 1, "offload": True}], ids=str
)
def test_checkpointing_stays_as_recipes_write_it(written: Any) -> None:
    """In run folders and manifests, too: a run that was begun with `true` or `false` is resumed."""
    settings = Train.model_validate({"gradient_checkpointing": written})
    assert settings.model_dump()["gradient_checkpointing"] == written
    assert Train.model_validate(settings.model_dump()) == settings
