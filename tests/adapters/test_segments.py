"""Segments of a row, and the attention over them."""

from contextlib import suppress

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from transformers import PreTrainedModel

from onegpu.adapters.segment_layout import Segments
from onegpu.adapters.segments import _Apart, cannot_pack, packed_attention, segments_of


def _apart(x: Tensor, segments: Segments) -> Tensor:
    found: Tensor = _Apart.apply(x, segments.keys, segments.key_places, segments.shared, segments.readers)  # type: ignore[no-untyped-call]
    return found


def test_segments_stand_beside_one_another() -> None:
    found = segments_of([3, 3, 2, 1], [None, 0, 0, None])
    assert found.queries.tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 0], [8, 0, 0]]
    assert found.keys.tolist() == [[0, 1, 2, 0, 0, 0], [0, 1, 2, 3, 4, 5], [0, 1, 2, 6, 7, 0], [8, 0, 0, 0, 0, 0]]
    assert found.places.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 9]
    assert found.key_places.tolist() == [0, 1, 2, 9, 10, 11, 15, 16, 18]
    assert found.shared.tolist() == [0, 1, 2]
    assert found.readers.tolist() == [[6, 12], [7, 13], [8, 14]]
    assert found.seen is not None
    assert found.seen[1, 0].int().tolist() == [[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]]
    assert found.seen[3, 0].int().tolist() == [[1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0]]


def test_no_tensor_is_a_view_whose_base_a_compiler_would_look_at() -> None:
    for before in ([None, 0, 0, None], [None] * 4):
        found = segments_of([3, 3, 200, 1], before)
        assert not [name for name, tensor in found._asdict().items() if tensor is not None and tensor._is_view()]


def test_without_a_common_beginning_no_mask_is_needed() -> None:
    found = segments_of([2, 4], [None, None])
    assert found.seen is None
    assert found.shared.shape == (0,)
    assert found.keys.tolist() == found.queries.tolist() == [[0, 1, 0, 0], [2, 3, 4, 5]]


def test_beginnings_with_unlike_numbers_of_readers() -> None:
    found = segments_of([2, 1, 1, 3, 1], [None, 0, 0, None, 3])
    nowhere = found.keys.numel()
    assert found.readers.tolist()[2:] == [[16, nowhere], [17, nowhere], [18, nowhere]]


def test_what_goes_on_from_a_segment_that_goes_on_itself_sees_both() -> None:
    found = segments_of([2, 1, 2, 1], [None, 0, 1, 0])
    assert found.keys.tolist() == [[0, 1, 0, 0, 0], [0, 1, 2, 0, 0], [0, 1, 2, 3, 4], [0, 1, 5, 0, 0]]
    assert found.shared.tolist() == [0, 1, 2]
    assert found.readers.tolist() == [[5, 10, 15], [6, 11, 16], [12, 20, 20]]
    assert found.seen is not None
    assert found.seen[:, 0, 0].sum(1).tolist() == [1, 3, 4, 3]


@pytest.mark.parametrize(
    ("lengths", "before"),
    [
        ([3, 2, 4], [None, None, None]),
        ([3, 3, 2, 1], [None, 0, 0, None]),
        ([2, 1, 1, 3, 1], [None, 0, 0, None, 3]),
        ([2, 1, 2, 1], [None, 0, 1, 0]),
    ],
)
def test_the_gradient_of_a_token_is_the_sum_over_all_who_see_it(lengths: list[int], before: list[int | None]) -> None:
    segments = segments_of(lengths, before)
    x = torch.randn(2, sum(lengths), 3, dtype=torch.float64, requires_grad=True)
    real = torch.zeros(segments.keys.numel() + 1, dtype=torch.bool)
    real[segments.key_places] = True
    real[segments.readers.flatten()] = True
    real = real[:-1].view(segments.keys.shape)
    # Padding is looked at by nobody, so nothing comes back from there.
    assert gradcheck(lambda x: _apart(x, segments).transpose(0, 1)[:, real], (x,))
    assert torch.equal(_apart(x, segments)[1, :, segments.places[0]], x[:, segments.keys[1, 0]])


def test_a_model_has_the_attention_it_had_afterwards(llama: PreTrainedModel) -> None:
    def attention() -> str:
        return str(llama.config._attn_implementation)

    before = attention()
    with suppress(KeyError), packed_attention(llama):
        assert attention() == "onegpu_packed"
        with packed_attention(llama):
            assert attention() == "onegpu_packed"
        assert attention() == "onegpu_packed"
        raise KeyError
    assert attention() == before


def test_it_wants_to_know_which_tokens_belong_together(llama: PreTrainedModel) -> None:
    with packed_attention(llama), pytest.raises(ValueError, match="which tokens belong together"):
        llama(input_ids=torch.tensor([[1, 2, 3]]))


def test_other_modules_cannot_be_packed() -> None:
    assert cannot_pack(torch.nn.Linear(2, 2), 5) == "it is not a model of transformers"
