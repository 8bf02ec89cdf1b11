"""Cases 6 to 10 and 23 to 27 in the plain libraries: what is saved, loaded and merged.

Each function is a case: its first line says what a user does, and what it returns is what was observed.
"""

import json
import os
import pickle
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    Trainer,
    TrainingArguments,
)

from . import tiny
from .tiny import QUIET, loaded, logits, lora, model, saved, scratch, stir, watch

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return (Path.touch, (self.marker,))


def _far(ours: torch.Tensor, theirs: torch.Tensor) -> str:
    error = float((ours - theirs).abs().max() / theirs.abs().max())
    return f"{error:.1g} of the largest logit"


def _alter(place: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    tensors = load_file(place / TENSORS)
    change(tensors)
    save_file(tensors, place / TENSORS, metadata={"format": "pt"})
    return place


def _say(place: Path, **keys: Any) -> Path:
    content = json.loads((place / CONFIG).read_text("utf-8"))
    (place / CONFIG).write_text(json.dumps(content | keys), "utf-8")
    return place


def _killed(save: Callable[[Path], object], place: Path, size: int) -> None:
    """Save in a process that may write no file larger than `size` bytes, as on a disk that is full."""
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        try:
            save(place)
        finally:
            os._exit(0)
    os.waitpid(child, 0)


def case_06_compiled() -> str:
    """PEFT, `torch.compile(model)`, `save_pretrained`"""
    wrapped = lora()
    compiled = torch.compile(wrapped, backend="eager")
    place = Path(scratch()) / "adapter"
    compiled.save_pretrained(str(place))
    seen = watch(lambda: logits(loaded(place)))
    return f"{seen.said('missing')}; loaded, its logits differ by {_far(seen.result, logits(wrapped))}"


def case_06_network() -> str:
    """PEFT, a base with a hub id, `save_pretrained` without a network"""
    asked: list[str] = []
    listening = True

    def hear(event: str, args: tuple[Any, ...]) -> None:
        if listening and event == "socket.getaddrinfo":
            asked.append(str(args[0]))
            raise OSError("no network")

    wrapped = lora()
    wrapped.peft_config["default"].base_model_name_or_path = "somebody/some-model"
    wrapped.config._name_or_path = "somebody/some-model"
    sys.addaudithook(hear)
    seen = watch(lambda: wrapped.save_pretrained(str(Path(scratch()) / "adapter")))
    listening = False
    names = ", ".join(sorted(set(asked))) or "none"
    return f"{seen.said('vocab', 'hub', 'could not')}; asks for an address: {names}"


def case_07_dropped() -> str:
    """PEFT, a key is missing from the file"""
    place = _alter(saved(), lambda t: t.pop(next(k for k in t if "lora_B" in k)))
    return watch(lambda: loaded(place)).said()


def case_07_added() -> str:
    """PEFT, a key too many"""
    return watch(lambda: loaded(_alter(saved(), lambda t: t.update(other=torch.zeros(1))))).said()


def case_07_backbone() -> str:
    """PEFT, saved of `AutoModelForCausalLM`, loaded on `AutoModel`"""
    backbone = AutoModel.from_pretrained(tiny.folder(), dtype=torch.float32)
    seen = watch(lambda: loaded(saved(), backbone))
    if seen.error is not None:
        return seen.said()
    moved = [n for n, p in seen.result.named_parameters() if "lora_B" in n and p.any()]
    return f"{seen.said('missing')}; {len(moved)} tensors of the file are applied"


def case_08_head() -> str:
    """PEFT, a classifier, `LoraConfig` without `task_type`, trained, saved and loaded"""

    def classifier(seed: int) -> Any:
        base = AutoModelForSequenceClassification.from_pretrained(tiny.folder(), num_labels=3, dtype=torch.float32)
        base.score.weight.data = 0.1 * torch.randn(3, 32, generator=torch.Generator().manual_seed(seed))
        return base

    wrapped = get_peft_model(classifier(0), LoraConfig(r=4, target_modules=tiny.LINEARS))
    head = sum("score" in n and p.requires_grad for n, p in wrapped.named_parameters())
    stir(wrapped)
    place = saved(wrapped)
    base = classifier(1)
    seen = watch(lambda: loaded(place, base))
    return (
        f"{seen.said()}; {head} tensors of the head are trained; loaded on a new base, its logits differ by "
        f"{_far(logits(seen.result), logits(wrapped))}"
    )


def case_08_unfrozen() -> str:
    """PEFT, a norm is unfrozen by hand, trained and saved"""
    wrapped = lora()
    norm = wrapped.get_submodule("base_model.model.model.layers.0.input_layernorm")
    norm.requires_grad_(True)
    stir(wrapped)
    seen = watch(lambda: saved(wrapped))
    return f"{seen.said()}; loaded, its logits differ by {_far(logits(loaded(seen.result)), logits(wrapped))}"


def case_08_tokens() -> str:
    """PEFT, 3 new tokens by `resize_token_embeddings`, LoRA on `q_proj`, saved"""
    base = model()
    base.resize_token_embeddings(67)
    wrapped = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"]))
    seen = watch(lambda: saved(wrapped))
    tensors = load_file(seen.result / TENSORS)
    extra = [tuple(t.shape) for k, t in tensors.items() if "lora" not in k]
    trained = [n for n, p in wrapped.named_parameters() if p.requires_grad and "lora" not in n]
    shapes = ", ".join(f"{count} x {width}" for count, width in extra) or "nothing"
    return f"{seen.said('embedding')}; {len(trained)} rows are trained; beside LoRA the file holds: {shapes}"


def case_09_tied() -> str:
    """PEFT, a tied model, LoRA on `lm_head`: `merge_and_unload`, saved, and read by `AutoModelForCausalLM`"""
    seen = watch(lambda: lora(model("tied"), target_modules=["q_proj", "lm_head"]))
    if seen.error is not None:
        return seen.said()
    before = logits(seen.result)
    place = scratch()
    merged = watch(lambda: seen.result.merge_and_unload())
    merged.result.save_pretrained(place)
    again = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
    return f"{seen.said('tie')}; the logits differ by {_far(logits(again), before)}"


def case_10_packed() -> str:
    """PEFT, `merge_and_unload` into a 4-bit base"""
    packing = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")

    def packed() -> Any:  # a new one each time: an evaluation may repack the weights of the old one
        return model("wider", quantization_config=packing, device_map={"": "cpu"})

    bare, adapted = logits(packed()), logits(lora(packed()))
    wrapped = lora(packed())
    seen = watch(wrapped.merge_and_unload)
    if seen.error is not None:
        return seen.said()
    lost = float((logits(seen.result) - adapted).norm() / (adapted - bare).norm())
    return f"{seen.said('merge', 'rounding')}; the logits move by {lost:.0%} of what the adapter had changed"


def case_10_twice() -> str:
    """PEFT, `merge_adapter()` twice"""
    wrapped = lora()
    before = logits(wrapped)
    wrapped.merge_adapter()
    seen = watch(wrapped.merge_adapter)
    return f"{seen.said('merged')}; the logits differ by {_far(logits(wrapped), before)}"


def case_23_full_disk() -> str:
    """PEFT, `save_pretrained` over an older adapter, and the disk is full halfway"""
    wrapped = lora()
    place = saved(wrapped)
    _killed(lambda where: wrapped.save_pretrained(str(where)), place, 10_000)
    seen = watch(lambda: loaded(place))
    return f"loading the folder afterwards: {seen.said()}"


def case_24_other_base() -> str:
    """PEFT, loaded on a base whose weights differ by 10 %"""
    other = model()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    return watch(lambda: loaded(saved(), other)).said("base", "missing")


def case_24_pissa() -> str:
    """PEFT, `init_lora_weights="pissa"`, saved with the defaults, loaded on the base"""
    wrapped = lora(init_lora_weights="pissa")
    seen = watch(lambda: loaded(saved(wrapped)))
    return f"{seen.said('pissa')}; the logits differ by {_far(logits(seen.result), logits(wrapped))}"


def case_25_active_key() -> str:
    """PEFT, `adapter_config.json` with `"use_newthing": true`"""
    return watch(lambda: loaded(_say(saved(), use_newthing=True))).said("use_newthing", "unexpected")


def case_25_unknown_type() -> str:
    """PEFT, `adapter_config.json` with `"peft_type": "HYPERLORA"`"""
    return watch(lambda: loaded(_say(saved(), peft_type="HYPERLORA"))).said()


def case_27_pickle() -> str:
    """PEFT, a folder whose `adapter_model.bin` is a pickle that runs code"""
    place = saved()
    marker = place / "executed"
    (place / TENSORS).unlink()
    (place / "adapter_model.bin").write_bytes(pickle.dumps({"weights": Trap(marker)}))
    seen = watch(lambda: loaded(place))
    return f"{seen.said()}; the code {'ran' if marker.exists() else 'did not run'}"


def case_27_import() -> str:
    """PEFT, `AutoPeftModelForCausalLM` on a folder whose `auto_mapping` names a module, which is on the path"""
    place = _say(
        saved(),
        auto_mapping={"base_model_class": "Trap", "parent_library": "hostile_module"},
        base_model_name_or_path=str(tiny.folder()),
    )
    marker = place / "executed"
    (place / "hostile_module.py").write_text(f"from pathlib import Path\nPath({str(marker)!r}).touch()\n", "utf-8")
    from peft import AutoPeftModel

    sys.path.insert(0, str(place))
    try:
        causal = watch(lambda: AutoPeftModelForCausalLM.from_pretrained(str(place)))
        ran = marker.exists()
        _say(place, task_type=None)
        other = watch(lambda: AutoPeftModel.from_pretrained(str(place)))
    finally:
        sys.path.remove(str(place))
    imported = ["was imported" if yes else "was not imported" for yes in (ran, marker.exists())]
    return (
        f"{causal.said('hostile')}, the module {imported[0]}; `AutoPeftModel`: {other.said('hostile')}, "
        f"the module {imported[1]}"
    )


def case_27_checkpoint() -> str:
    """`Trainer`, what a checkpoint holds"""
    place = Path(scratch())
    saving = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    arguments = TrainingArguments(output_dir=str(place), **(QUIET | saving))
    Trainer(model=lora(), args=arguments, train_dataset=tiny.tokenised(), data_collator=tiny.padded).train()
    pickles = [p.name for p in sorted((place / "checkpoint-1").iterdir()) if p.suffix in (".pt", ".pth", ".bin")]
    return f"{len(pickles)} pickles ({', '.join(pickles)})"
