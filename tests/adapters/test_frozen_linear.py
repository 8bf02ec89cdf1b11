import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from onegpu.adapters.frozen_linear import FrozenLinear, PackedWeight


class Halves(PackedWeight):
    """A toy storage: bytes that stand for multiples of one half, and a scale that must never be rounded."""

    kind = "halves"

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.register_buffer("values", values)
        self.register_buffer("scale", torch.tensor(0.123456789))
        self.shape = (values.shape[0], values.shape[1])
        self.asked: list[torch.dtype] = []

    def dequantise(self, dtype: torch.dtype) -> Tensor:
        self.asked.append(dtype)
        return (self.get_buffer("values") * self.get_buffer("scale")).to(dtype)


@pytest.fixture
def linear() -> FrozenLinear:
    """3 inputs, 5 outputs."""
    values = torch.randint(-9, 9, (5, 3), dtype=torch.int8)
    return FrozenLinear(Halves(values), nn.Parameter(torch.randn(5), requires_grad=False))


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 4, 3)])
@pytest.mark.parametrize("bias", [True, False])
def test_it_multiplies_by_the_dequantised_weight(linear: FrozenLinear, shape: tuple[int, ...], bias: bool) -> None:
    if not bias:
        linear.register_parameter("bias", None)
    x = torch.randn(shape)
    torch.testing.assert_close(linear(x), F.linear(x, linear.packed.dequantise(x.dtype), linear.bias))


def test_the_gradient_of_its_input_is_that_of_a_plain_linear(linear: FrozenLinear) -> None:
    x, same = (torch.ones(2, 4, 3).requires_grad_() for _ in range(2))
    linear(x).square().sum().backward()
    F.linear(same, linear.packed.dequantise(torch.float32), linear.bias).square().sum().backward()
    assert x.grad is not None
    assert same.grad is not None
    torch.testing.assert_close(x.grad, same.grad)
    assert x.grad.abs().sum() > 0


def test_its_gradient_is_right_to_finite_differences(linear: FrozenLinear) -> None:
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(linear.double(), (x,))


def test_a_second_derivative_is_refused_instead_of_wrong(linear: FrozenLinear) -> None:
    x = torch.randn(2, 3, requires_grad=True)
    (grad,) = torch.autograd.grad(linear(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_computes_in_the_dtype_of_its_input(linear: FrozenLinear, dtype: torch.dtype) -> None:
    assert linear(torch.randn(2, 3, dtype=dtype)).dtype is dtype


def test_under_autocast_it_computes_in_the_lower_dtype(linear: FrozenLinear) -> None:
    x = torch.randn(2, 3, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = linear(x)
    assert y.dtype is torch.bfloat16
    y.float().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype is torch.float32
    assert isinstance(linear.packed, Halves)
    assert linear.packed.asked == [torch.bfloat16] * 2  # never a float32 copy of the weight


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_cast_of_the_model_leaves_what_is_packed_alone(linear: FrozenLinear, dtype: torch.dtype) -> None:
    before = {name: buffer.clone() for name, buffer in linear.packed.named_buffers()}
    linear.to(dtype)
    for name, buffer in linear.packed.named_buffers():
        assert buffer.dtype is before[name].dtype
        assert torch.equal(buffer, before[name])


def test_a_move_takes_what_is_packed_along(linear: FrozenLinear) -> None:
    linear.to("meta")
    assert {buffer.device.type for buffer in linear.packed.buffers()} == {"meta"}
    assert {buffer.dtype for buffer in linear.packed.buffers()} == {torch.int8, torch.float32}


def test_it_can_be_copied_and_its_state_saved(linear: FrozenLinear) -> None:
    copied, x = copy.deepcopy(linear), torch.randn(2, 3)
    assert torch.equal(copied(x), linear(x))
    assert linear.state_dict().keys() == {"bias", "packed.values", "packed.scale"}


def test_it_has_nothing_to_train(linear: FrozenLinear) -> None:
    assert not [name for name, parameter in linear.packed.named_parameters()]


def test_it_prints_its_shape_and_storage(linear: FrozenLinear) -> None:
    assert "in_features=3, out_features=5, kind=halves" in repr(linear)
