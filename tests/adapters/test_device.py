import pytest
import torch

from onegpu.adapters import DeviceError
from onegpu.adapters.device import (
    Attention,
    Hardware,
    Precision,
    attention_of,
    compute_dtype,
    detect,
    grad_scaler,
    peak_memory,
)

CPU = Hardware("cpu")
T4 = Hardware("cuda", (7, 5), "T4")
A100 = Hardware("cuda", (8, 0), "A100")
UNKNOWN = Hardware("cuda", None, "a card that does not say")


@pytest.mark.parametrize(
    ("hardware", "precision", "expected"),
    [
        (T4, "auto", torch.float16),  # it accepts bf16, and emulates it slowly
        (A100, "auto", torch.bfloat16),
        (UNKNOWN, "auto", torch.float16),
        (CPU, "auto", torch.float32),
        (CPU, "bf16", torch.bfloat16),
        (CPU, "fp32", torch.float32),
        (A100, "bf16", torch.bfloat16),
        (A100, "fp16", torch.float16),
        (T4, "fp16", torch.float16),
        (T4, "fp32", torch.float32),
    ],
)
def test_compute_dtype_follows_the_capability(hardware: Hardware, precision: Precision, expected: torch.dtype) -> None:
    assert compute_dtype(precision, hardware) is expected


@pytest.mark.parametrize(("hardware", "precision"), [(T4, "bf16"), (UNKNOWN, "bf16"), (CPU, "fp16")])
def test_a_precision_that_the_device_lacks_is_refused_and_not_replaced(
    hardware: Hardware, precision: Precision
) -> None:
    with pytest.raises(DeviceError, match=precision) as caught:
        compute_dtype(precision, hardware)
    assert caught.value.exit_code == 3


def test_the_refusal_names_the_card_and_what_works() -> None:
    with pytest.raises(DeviceError, match=r"T4 .*\(7, 5\).*fp16, fp32 or auto"):
        compute_dtype("bf16", T4)


def test_only_fp16_has_its_loss_scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # or torch switches every scaler off
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    device = torch.device("cuda")
    enabled = {
        dtype: grad_scaler(dtype, device).is_enabled() for dtype in (torch.float16, torch.bfloat16, torch.float32)
    }
    assert enabled == {torch.float16: True, torch.bfloat16: False, torch.float32: False}


def test_a_scaler_that_is_off_leaves_the_loss_alone() -> None:
    loss = torch.tensor(3.0)
    assert grad_scaler(torch.float32, torch.device("cpu")).scale(loss) is loss


def test_detection_gives_a_single_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert detect() == CPU
    assert detect().device == torch.device("cpu")


def test_detection_reads_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        major, minor, name, total_memory = 7, 5, "T4", 16 * 2**30

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    assert detect() == Hardware("cuda", (7, 5), "T4", 16 * 2**30)


def test_peak_memory_of_a_process_is_in_bytes() -> None:
    # Python with torch takes hundreds of megabytes: a unit that is off by 1024 falls outside.
    assert 100 * 2**20 < peak_memory(torch.device("cpu")) < 100 * 2**30


@pytest.mark.parametrize(
    ("hardware", "dtype", "expected"),
    [
        (CPU, torch.bfloat16, "eager"),
        (CPU, torch.float32, None),
        (A100, torch.bfloat16, None),
        (T4, torch.float16, None),
    ],
)
def test_attention_is_the_model_s_own_choice_except_for_bf16_on_a_cpu(
    hardware: Hardware, dtype: torch.dtype, expected: str | None
) -> None:
    assert attention_of("auto", dtype, hardware) == expected


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_attention_that_was_asked_for_is_taken(name: Attention) -> None:
    assert attention_of(name, torch.bfloat16, CPU) == name
