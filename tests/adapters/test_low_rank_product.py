"""One step of autograd against the plain formula and stock PEFT: outputs, gradients, masks, what is kept."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from bitsandbytes.nn.modules import Int8Params, Linear8bitLt, Params4bit
from peft import LoraConfig
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from onegpu.adapters.drawn_masks import kept, share
from onegpu.adapters.frozen_linear import FrozenLinear, PackedWeight
from onegpu.adapters.lora import LoRA
from onegpu.adapters.low_rank import LowRankLinear, product
from onegpu.adapters.low_rank_product import is_plain
from onegpu.adapters.quantised import Blocks4Bit, RowsInt8

IN, OUT, RANK = 64, 96, 4
EXACT = {torch.float32: 1e-6, torch.bfloat16: 2e-2}


def _frozen(packed: PackedWeight, bias: bool, dtype: torch.dtype) -> FrozenLinear:
    return FrozenLinear(packed, nn.Parameter(torch.randn(OUT, dtype=dtype)) if bias else None, dtype)


def _four_bit(kind: str, bias: bool, dtype: torch.dtype) -> nn.Module:
    packed: Any = Params4bit(torch.randn(OUT, IN) * 0.2, requires_grad=False, quant_type=kind)
    return _frozen(Blocks4Bit(packed._quantize("cpu")), bias, dtype)


def _int8(bias: bool, dtype: torch.dtype) -> nn.Module:
    layer: Any = Linear8bitLt(IN, OUT, has_fp16_weights=False)
    weight: Any = Int8Params(torch.randn(OUT, IN) * 0.2, requires_grad=False, has_fp16_weights=False)
    layer.weight = weight.to("cpu")
    return _frozen(RowsInt8(layer), bias, dtype)


def _conv1d(bias: bool, dtype: torch.dtype) -> nn.Module:
    assert bias
    return Conv1D(OUT, IN).to(dtype)


BASES: dict[str, Callable[[bool, torch.dtype], nn.Module]] = {
    "linear": lambda bias, dtype: nn.Linear(IN, OUT, bias=bias, dtype=dtype),
    "conv1d": _conv1d,
    "nf4": lambda bias, dtype: _four_bit("nf4", bias, dtype),
    "fp4": lambda bias, dtype: _four_bit("fp4", bias, dtype),
    "int8": _int8,
}
KINDS = [(kind, bias) for kind in BASES for bias in (True, False) if bias or kind != "conv1d"]


def _layer(base: nn.Module, **settings: Any) -> LowRankLinear:
    config = LoRA(rank=RANK, alpha=6.0, **settings)
    return LowRankLinear(base.requires_grad_(False), torch.randn(RANK, IN) * 0.2, torch.randn(OUT, RANK), config)


@pytest.fixture(params=KINDS, ids=[f"{kind}-{'bias' if bias else 'none'}" for kind, bias in KINDS])
def layer(request: pytest.FixtureRequest) -> LowRankLinear:
    """An adapted linear of each kind, float32, in training."""
    kind, bias = request.param
    return _layer(BASES[kind](bias, torch.float32)).train()


def _plain(layer: LowRankLinear, x: Tensor) -> Tensor:
    """The formula, step by step; what autograd makes of it is what is expected."""
    y: Tensor = layer.base(x)
    return y + layer.scale * product(x, layer.lora_A, layer.lora_B)


def _results(
    forward: Callable[[Tensor], Tensor], layer: nn.Module, x: Tensor, over: Tensor | None = None
) -> dict[str, Tensor]:
    """Output and every gradient of a weighted sum of it."""
    x = x.detach().requires_grad_()
    layer.zero_grad()
    y = forward(x)
    y.backward(torch.linspace(-1, 2, y.numel()).view(y.shape).to(y.dtype) if over is None else over)
    found = {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}
    assert x.grad is not None
    return found | {"x": x.grad, "y": y.detach()}


def _assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        assert found[name].dtype is wanted.dtype, name
        assert found[name].shape == wanted.shape, name
        assert (found[name].float() - wanted.float()).norm() <= tolerance * wanted.float().norm(), name


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The base linears whose own forward pass was called."""
    called: list[nn.Module] = []
    for kind in (nn.Linear, Conv1D, FrozenLinear):
        real: Any = kind.forward

        def forward(self: nn.Module, x: Tensor, real: Any = real) -> Any:
            called.append(self)
            return real(self, x)

        monkeypatch.setattr(kind, "forward", forward)
    return called


@pytest.mark.parametrize("shape", [(5, IN), (2, 3, IN), (IN,), (2, 1, 3, IN)], ids=str)
def test_it_equals_the_plain_formula(layer: LowRankLinear, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    found = _results(layer, layer, x)
    assert {"lora_A", "lora_B", "x", "y"} == found.keys()
    _assert_close(found, _results(lambda x: _plain(layer, x), layer, x))


@pytest.mark.parametrize(("kind", "bias"), KINDS)
def test_in_bf16_it_differs_by_rounding_only_and_gradients_are_float32(kind: str, bias: bool) -> None:
    layer = _layer(BASES[kind](bias, torch.bfloat16)).train()
    x = torch.randn(2, 7, IN)
    found, plain = _results(layer, layer, x.bfloat16()), _results(lambda x: _plain(layer, x), layer, x.bfloat16())
    assert found["lora_A"].dtype is found["lora_B"].dtype is torch.float32
    _assert_close(found, plain, tolerance=1e-2)
    exact = _results(lambda x: _plain(wide, x), wide := copy.deepcopy(layer).float(), x.bfloat16().float())
    for name, wanted in exact.items():
        assert (found[name] - wanted).norm() <= 1.05 * (plain[name] - wanted).norm(), "no worse than the plain formula"


@pytest.mark.parametrize("bias", [True, False])
def test_it_equals_the_linear_of_stock_peft(bias: bool) -> None:
    base = nn.Linear(IN, OUT, bias=bias)
    layer, x = _layer(base), torch.randn(2, 7, IN)
    theirs: Any = PeftLinear(base, "default", LoraConfig(r=RANK, lora_alpha=6), r=RANK, lora_alpha=6)
    with torch.no_grad():
        theirs.lora_A["default"].weight.copy_(layer.lora_A)
        theirs.lora_B["default"].weight.copy_(layer.lora_B)
    expected = _results(theirs, theirs, x)
    named = {name.split(".")[0]: value for name, value in expected.items()}
    _assert_close(_results(layer, layer, x), named)


@pytest.mark.parametrize("view", ["transposed", "strided", "expanded"])
def test_inputs_and_gradients_may_lie_in_memory_in_any_way(layer: LowRankLinear, view: str) -> None:
    x = {
        "transposed": torch.randn(3, 2, IN).transpose(0, 1),
        "strided": torch.randn(2, 6, 2 * IN)[:, ::2, ::2],
        "expanded": torch.randn(IN).expand(2, 3, IN),
    }[view]
    over = torch.randn(OUT).expand(2, 3, OUT)
    _assert_close(_results(layer, layer, x, over), _results(lambda x: _plain(layer, x), layer, x.contiguous(), over))


@pytest.mark.parametrize("shape", [(0, IN), (2, 0, IN)], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_an_empty_batch_has_empty_outputs_and_no_gradient(shape: tuple[int, ...], dropout: float) -> None:
    layer = _layer(nn.Linear(IN, OUT), dropout=dropout).train()
    found = _results(layer, layer, torch.zeros(shape))
    assert found["y"].shape == (*shape[:-1], OUT)
    assert found["x"].shape == shape
    assert not found["lora_A"].any()
    assert not found["lora_B"].any()


@pytest.mark.parametrize("frozen", ["lora_A", "lora_B"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_either_factor_may_be_frozen(layer: LowRankLinear, frozen: str, dropout: float) -> None:
    layer.dropout, x = dropout, torch.randn(5, IN)
    torch.manual_seed(1)
    expected = _results(layer, layer, x)
    layer.get_parameter(frozen).requires_grad_(False)
    torch.manual_seed(1)
    found = _results(layer, layer, x)
    assert expected.pop(frozen).any()
    _assert_close(found, expected, tolerance=0)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_output_is_the_same_and_nothing_is_kept(
    layer: LowRankLinear, context: Callable[[], Any]
) -> None:
    x = torch.randn(2, 3, IN)
    expected = layer(x)
    with context():
        y = layer(x)
    assert torch.equal(y, expected)
    assert y.grad_fn is None


def test_an_input_that_needs_no_gradient_gets_none(layer: LowRankLinear, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first adapted linear of a model: the product as large as the base's own forward pass is left out."""
    products: list[tuple[int, ...]] = []
    real = torch.Tensor.__matmul__

    def count(left: Tensor, right: Tensor) -> Tensor:
        found = real(left, right)
        products.append(tuple(found.shape))
        return found

    for needed in (True, False):
        y = layer(torch.randn(5, IN).requires_grad_(needed))
        with monkeypatch.context() as patched:
            patched.setattr(torch.Tensor, "__matmul__", count)
            y.sum().backward()
        assert products
        assert ((5, IN) in products) is needed
        products.clear()


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_a_base_that_is_trained_beside_it_gets_its_gradients(kind: str) -> None:
    layer, x = _layer(BASES[kind](True, torch.float32)), torch.randn(2, 3, IN)
    layer.base.requires_grad_(True)
    found = _results(layer, layer, x)
    assert {"base.weight", "base.bias"} < found.keys()
    _assert_close(found, _results(lambda x: _plain(layer, x), layer, x))


def test_the_bias_of_a_packed_linear_can_be_trained() -> None:
    layer, x = _layer(BASES["nf4"](True, torch.float32)), torch.randn(2, 3, IN)
    layer.base.get_parameter("bias").requires_grad_(True)
    found = _results(layer, layer, x)
    torch.testing.assert_close(found["base.bias"], torch.linspace(-1, 2, 6 * OUT).view(6, OUT).sum(0))
    _assert_close(found, _results(lambda x: _plain(layer, x), layer, x))


@pytest.mark.parametrize("trained", [True, False])
def test_under_autocast_it_computes_in_the_lower_dtype(layer: LowRankLinear, trained: bool) -> None:
    """What trains a whole base in bf16, such as `full`: its weights and their gradients stay float32."""
    for parameter in layer.base.parameters():
        parameter.requires_grad_(trained)
    x = torch.randn(2, 3, IN)

    def lower(forward: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        def run(x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return forward(x)

        return _results(run, layer, x)

    found = lower(layer)
    assert found["y"].dtype is torch.bfloat16
    assert {g.dtype for name, g in found.items() if name != "y"} == {torch.float32}
    _assert_close(found, lower(lambda x: _plain(layer, x)), tolerance=2e-2)


# --- dropout


def _masked(layer: LowRankLinear, x: Tensor, seed: int) -> Tensor:
    """The plain formula with the mask that a pass from this seed draws."""
    torch.manual_seed(seed)
    mask = kept(x.detach().reshape(-1, IN), torch.randint(2**62, ()), share(layer.dropout)).view(x.shape)
    y: Tensor = layer.base(x)
    inputs = x * mask / (1 - share(layer.dropout) / 2**16)
    return y + layer.scale * product(inputs, layer.lora_A, layer.lora_B)


def test_the_gradient_is_that_of_the_mask_of_its_own_forward_pass(layer: LowRankLinear) -> None:
    layer.dropout, x = 0.4, torch.randn(2, 7, IN)
    torch.manual_seed(11)
    found = _results(layer, layer, x)
    _assert_close(found, _results(lambda x: _masked(layer, x, 11), layer, x))
    torch.manual_seed(12)
    assert not torch.equal(layer(x), found["y"])


def test_its_gradients_are_right_to_finite_differences() -> None:
    layer = _layer(nn.Linear(IN, OUT), dropout=0.3).double().train()

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        torch.manual_seed(5)
        y: Tensor = torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))
        return y[:, :5]

    layer.base.requires_grad_(True)
    names = [name for name, _ in layer.named_parameters()]
    x = torch.randn(3, IN, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (x, *layer.parameters()), fast_mode=True)


def test_dropout_keeps_the_expectation_and_is_off_in_evaluation() -> None:
    layer, x = _layer(nn.Linear(IN, OUT), dropout=0.5), torch.randn(5, IN)
    exact = _plain(layer, x)
    assert torch.equal(layer.eval()(x), layer.eval()(x))
    torch.testing.assert_close(layer(x), exact)
    with torch.no_grad():
        mean = torch.stack([layer.train()(x) for _ in range(3000)]).mean(0)
    assert (mean - exact).norm() < 0.05 * (exact - layer.base(x)).norm()


def test_without_dropout_no_random_number_is_drawn(layer: LowRankLinear) -> None:
    state = torch.get_rng_state()
    layer(torch.randn(0, IN)).sum().backward()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_draws_the_same_masks(layer: LowRankLinear, reentrant: bool) -> None:
    layer.dropout, x = 0.4, torch.randn(2, 3, IN)
    torch.manual_seed(1)
    expected = _results(layer, layer, x)
    torch.manual_seed(1)
    found = _results(lambda x: checkpoint(layer, x, use_reentrant=reentrant), layer, x)
    _assert_close(found, expected, tolerance=0)


def test_a_checkpoint_that_draws_other_random_numbers_has_the_gradient_of_its_second_pass() -> None:
    """As with torch's own dropout: the seed belongs to what is computed again, not to the first pass."""
    layer, x = _layer(nn.Linear(IN, OUT), dropout=0.4).train(), torch.randn(5, IN, requires_grad=True)
    torch.manual_seed(1)
    y = checkpoint(layer, x, use_reentrant=False, preserve_rng_state=False)
    torch.manual_seed(2)
    y.sum().backward()
    expected = _results(lambda x: _masked(layer, x, 2), copy.deepcopy(layer), x, torch.ones(5, OUT))
    assert layer.lora_B.grad is not None
    _assert_close({"x": x.grad}, {"x": expected["x"]})  # type: ignore[dict-item]


# --- what is kept


class _Kept:
    """Bytes of tensors that autograd keeps, other than parameters and inputs; each once."""

    def __init__(self, *known: Tensor) -> None:
        self.known = {t.untyped_storage().data_ptr() for t in known}
        self.bytes = 0

    def pack(self, tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in self.known:
            self.known.add(tensor.untyped_storage().data_ptr())
            self.bytes += tensor.untyped_storage().nbytes()
        return tensor


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", BASES)
def test_nothing_is_kept_but_the_input_and_what_is_as_narrow_as_the_rank(
    kind: str, dtype: torch.dtype, dropout: float
) -> None:
    layer = _layer(BASES[kind](True, dtype), dropout=dropout).train()
    x = torch.randn(3, 7, IN, dtype=dtype, requires_grad=True)
    kept = _Kept(x, *layer.parameters())
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda tensor: tensor):
        layer(x)
    seed = 8 if dropout else 0
    assert kept.bytes == 3 * 7 * RANK * dtype.itemsize + seed


# --- several on one linear, and what falls back


def _stacked(base: nn.Module) -> LowRankLinear:
    """Three, of which the one in the middle is off and the others drop other shares."""
    inner, middle = _layer(base, dropout=0.2), None
    middle = _layer(inner)
    middle.on = False
    outer = _layer(middle, dropout=0.6)
    for module in (inner, middle, outer):
        module.lora_A.requires_grad_(True)
        module.lora_B.requires_grad_(True)
    return outer.eval()


def test_several_on_one_linear_are_one_step(asked: list[nn.Module]) -> None:
    for kind, bias in KINDS:
        outer, x = _stacked(BASES[kind](bias, torch.float32)), torch.randn(2, 3, IN)
        inner: Any = outer.base.base
        found = _results(outer, outer, x)
        assert not asked, "the linear beneath was multiplied on its own"
        expected = _results(
            lambda x, inner=inner, outer=outer: (
                _plain(inner, x) + outer.scale * product(x, outer.lora_A, outer.lora_B)  # type: ignore[misc]
            ),
            outer,
            x,
        )
        _assert_close(found, expected)
        asked.clear()


def test_those_that_are_off_are_nothing(asked: list[nn.Module]) -> None:
    outer, x = _stacked(nn.Linear(IN, OUT)), torch.randn(2, 3, IN)
    inner: Any = outer.base.base
    outer.on = False
    assert torch.equal(outer(x), inner(x))
    assert not asked
    inner.on = False
    assert torch.equal(outer(x), inner.base(x))


def test_each_has_a_mask_of_its_own() -> None:
    outer, x = _stacked(nn.Linear(IN, OUT)).train(), torch.randn(5, IN)
    inner: Any = outer.base.base
    with torch.no_grad():
        inner.lora_B.copy_(outer.lora_B)
        inner.lora_A.copy_(outer.lora_A)
        inner.dropout = outer.dropout
        torch.manual_seed(1)
        both = outer(x) - inner.base(x)
        outer.on = False
        torch.manual_seed(1)
        alone = inner(x) - inner.base(x)
    assert (both - 2 * alone).norm() > 0.1 * both.norm()


class _Twice(nn.Linear):
    """Somebody's own linear."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def _hooked(linear: nn.Module) -> Iterator[Any]:
    yield linear.register_forward_hook(lambda module, args, y: 2 * y)
    yield linear.register_forward_pre_hook(lambda module, args: (2 * args[0],))


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("kind", ["linear", "conv1d", "nf4"])
def test_a_linear_that_somebody_hooks_is_called(kind: str, which: int) -> None:
    layer, x = _layer(BASES[kind](True, torch.float32)), torch.randn(2, 3, IN)
    before = layer(x)
    handle = list(_hooked(layer.base))[which]
    for other in (layer.base._forward_hooks, layer.base._forward_pre_hooks):
        for key in [key for key in other if key != handle.id]:
            del other[key]
    assert not is_plain(layer.base)
    _assert_close(_results(layer, layer, x), _results(lambda x: _plain(layer, x), layer, x), tolerance=0)
    assert (layer(x) - before).norm() > 0.5
    handle.remove()
    assert is_plain(layer.base)
    assert torch.equal(layer(x), before)


def test_a_linear_whose_forward_was_replaced_or_is_of_another_class_is_called() -> None:
    x = torch.randn(2, 3, IN)
    for linear in (_Twice(IN, OUT), nn.Linear(IN, OUT)):
        layer = _layer(linear)
        if type(linear) is nn.Linear:
            vars(linear)["forward"] = lambda x, linear=linear: 2 * F.linear(x, linear.weight, linear.bias)
        assert torch.equal(layer.base(x), 2 * F.linear(x, linear.weight, linear.bias))
        _assert_close(_results(layer, layer, x), _results(lambda x, la=layer: _plain(la, x), layer, x), tolerance=0)  # type: ignore[misc]


def test_hooks_on_linears_are_seen_by_those_who_watch_every_module() -> None:
    layer, seen = _layer(nn.Linear(IN, OUT)), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, y: seen.append(type(module)))
    try:
        layer(torch.randn(2, IN))
    finally:
        handle.remove()
    assert seen == [nn.Linear, LowRankLinear]


def test_an_adapter_in_the_middle_that_somebody_hooks_is_called() -> None:
    outer, x = _stacked(nn.Linear(IN, OUT)), torch.randn(2, 3, IN)
    before, inner = outer(x), outer.base
    with torch.no_grad():
        handle = inner.register_forward_hook(lambda module, args, y: y + 1)
        torch.testing.assert_close(outer(x), before + 1)
        handle.remove()
        torch.testing.assert_close(outer(x), before)


def test_a_second_derivative_is_refused_instead_of_wrong(layer: LowRankLinear) -> None:
    x = torch.randn(2, IN, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


# --- a compiler


@pytest.mark.parametrize("kind", BASES)
def test_a_compiler_sees_one_graph_and_gives_the_same(kind: str) -> None:
    """The tracing is real; what the graph is turned into is left out, for it takes minutes."""
    layer, x = _layer(BASES[kind](True, torch.float32), dropout=0.4).train(), torch.randn(2, 3, IN)
    torch._dynamo.reset()
    compiled: Any = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.manual_seed(1)
    expected = _results(layer, layer, x)
    torch.manual_seed(1)
    _assert_close(_results(compiled, layer, x), expected)
