import warnings
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, TrainableTokensConfig
from torch import Tensor, nn
from transformers import PreTrainedModel, T5Config, T5ForConditionalGeneration
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from onegpu.adapters import RecipeError, StackError, TargetError, attach, build, load, save
from onegpu.adapters.artefact import read
from onegpu.adapters.base import load_options
from onegpu.adapters.fingerprints import differences, fingerprint

Fresh = Callable[..., PreTrainedModel]
Run = Callable[..., Tensor]
Noise = Callable[[Mapping[str, nn.Parameter]], None]
Gradients = Callable[..., dict[str, Tensor]]
AssertSame = Callable[..., None]

SOME: Any = {"trainable-tokens": {"tokens": [9, 5, 40]}}  # not in order, on purpose
NEW: Any = {"trainable-tokens": {"tokens": [65, 5, 64]}}  # the table has 64 rows


class Words:
    """The part of a tokenizer that is asked."""

    def get_vocab(self) -> dict[str, int]:
        return {"<call>": 9, "Ġworld": 5, "<end>": 40, "<new>": 64}


@pytest.fixture
def ids(ids: Tensor) -> Tensor:
    """The shared ids, with chosen tokens among them: twice one, once another."""
    ids = ids.clone()
    ids[0, :2], ids[1, 3] = 9, 5
    return ids


@pytest.mark.parametrize("packing", [[], ["nf4"]], ids=["float", "nf4"])
@pytest.mark.parametrize("name", ["plain", "tied", "gpt2"])
def test_outputs_and_gradients_are_those_of_peft(
    fresh: Fresh,
    tmp_path: Path,
    noise: Noise,
    run: Run,
    gradients: Gradients,
    assert_same: AssertSame,
    name: str,
    packing: list[str],
) -> None:
    """Llama's output embeddings are its own, those of `tied` and of GPT-2 are the input ones."""
    model = fresh(name, *packing)
    before = run(model)
    stack = attach(model, [*packing, SOME])
    noise(stack.trainable())
    save(stack, tmp_path / "a")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        theirs = PeftModel.from_pretrained(fresh(name, *packing), str(tmp_path / "a"), is_trainable=True)
    torch.testing.assert_close(run(model), run(theirs), atol=1e-6, rtol=0)
    assert (run(model) - before).abs().max() > 0.01
    (their_rows,) = (p for p in theirs.parameters() if p.requires_grad)
    (rows,) = stack.trainable().values()
    found = gradients(theirs, {"rows": their_rows})
    assert_same(gradients(model, {"rows": rows}), found, tolerance=1e-5)


def test_a_headed_model_is_not_read_by_peft_which_has_no_place_for_the_head(fresh: Fresh) -> None:
    (attachment,) = attach(fresh("bert"), [SOME]).attachments
    assert "modules_to_save" not in {field.name for field in fields(TrainableTokensConfig)}
    assert attachment.peft_config() is None


@pytest.mark.parametrize("packing", [[], ["nf4"], ["int8"]], ids=["float", "nf4", "int8"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["plain", "tied", "gpt2", "bert"])
def test_fresh_off_and_detached_it_is_the_base_to_the_bit(
    fresh: Fresh, run: Run, noise: Noise, name: str, precision: str, packing: list[str]
) -> None:
    model = fresh(name, *packing, precision=precision)
    reference, names, before = run(model), list(dict(model.named_modules())), fingerprint(model)
    stack = attach(model, [*packing, SOME])
    with stack.base_only():
        base = run(model)
    assert torch.equal(run(model), base)
    noise(stack.attachments[0].trainable())
    assert (run(model).float() - base.float()).abs().max() > 0.01
    with stack.base_only():
        assert torch.equal(run(model), base)
    assert differences(before, model) == ([], [])
    stack.detach()
    assert torch.equal(run(model), reference)
    assert list(dict(model.named_modules())) == names


@pytest.mark.parametrize("spec", [SOME, NEW], ids=["known", "new"])
@pytest.mark.parametrize("name", ["tied", "gpt2"])
def test_it_is_training_rows_of_a_resized_table(
    fresh: Fresh,
    run: Run,
    noise: Noise,
    gradients: Gradients,
    assert_same: AssertSame,
    ids: Tensor,
    name: str,
    spec: Any,
) -> None:
    """The independent reference: a model whose table really has the rows, and the gradient of that table."""
    model, reference = fresh(name), fresh(name)
    stack = attach(model, [spec])
    noise(stack.trainable())
    (rows,) = stack.trainable().values()
    tokens = spec["trainable-tokens"]["tokens"]
    if spec is NEW:
        ids = ids.clone()
        ids[0, 4], ids[1, 0] = 64, 65
        reference.resize_token_embeddings(66, mean_resizing=False)
    table = reference.get_input_embeddings().get_parameter("weight")
    with torch.no_grad():
        table[tokens] = rows
    table.requires_grad_(True)
    logits = run(model, input_ids=ids)
    assert logits.shape[-1] == len(table)
    torch.testing.assert_close(logits, run(reference, input_ids=ids), atol=1e-6, rtol=0)
    ours = gradients(model, {"rows": rows}, input_ids=ids)
    theirs = gradients(reference, {"rows": table}, input_ids=ids)["rows"][tokens]
    assert_same(ours, {"rows": theirs}, tolerance=1e-5)


def test_a_new_token_starts_at_the_mean_and_leaves_the_other_logits_alone(
    fresh: Fresh, run: Run, ids: Tensor, noise: Noise
) -> None:
    model = fresh("tied")
    before, mean = run(model), model.get_input_embeddings().get_parameter("weight").mean(0)
    stack = attach(model, [NEW])
    (rows,) = stack.trainable().values()
    torch.testing.assert_close(rows[0], mean)
    assert torch.equal(run(model)[..., :64], before)
    assert run(model).shape[-1] == 66
    with_new = ids.clone()
    with_new[0, 0] = 65
    start = run(model, input_ids=with_new)
    noise(stack.trainable())
    with stack.base_only():  # the base has no such row: it stays where it started
        assert torch.equal(run(model, input_ids=with_new), start)
    assert not torch.equal(run(model, input_ids=with_new), start)


def test_a_model_without_output_embeddings_takes_new_tokens_too(
    fresh: Fresh, run: Run, ids: Tensor, gradients: Gradients
) -> None:
    model = fresh("bert")
    stack = attach(model, [{"trainable-tokens": {"tokens": [64]}}])
    ids = ids.clone()
    ids[0, 2] = 64
    assert run(model, input_ids=ids).shape == (2, 3)
    assert gradients(model, stack.attachments[0].trainable(), input_ids=ids)


@pytest.mark.parametrize("name", ["plain", "tied", "bert"])
@pytest.mark.parametrize("packing", [[], ["nf4"]], ids=["float", "nf4"])
def test_it_is_saved_as_the_rows_alone_and_loaded(
    fresh: Fresh, run: Run, noise: Noise, tmp_path: Path, name: str, packing: list[str]
) -> None:
    stack = attach(fresh(name, *packing), [*packing, SOME])
    noise(stack.trainable())
    save(stack, tmp_path / "a")
    tensors = stack.attachments[0].tensors()
    assert [t.shape for t in tensors.values()] == [(3, 32)] * (2 if name == "tied" else 1)  # PEFT has tied ones twice
    assert all(key.endswith(".trainable_tokens_delta") for key in tensors)
    again = load(fresh(name, *packing), tmp_path / "a")
    assert torch.equal(run(again.model), run(stack.model))


def test_new_rows_are_saved_and_loaded_too_and_not_for_peft(
    fresh: Fresh, run: Run, noise: Noise, tmp_path: Path
) -> None:
    stack = attach(fresh("tied"), [NEW])
    noise(stack.trainable())
    save(stack, tmp_path / "a")
    assert stack.attachments[0].peft_config() is None
    assert [t.shape for t in stack.attachments[0].tensors().values()] == [(3, 32)]
    again = load(fresh("tied"), tmp_path / "a")
    assert torch.equal(run(again.model), run(stack.model))


def test_texts_are_looked_up_once_and_saved_as_ids(fresh: Fresh, run: Run, noise: Noise, tmp_path: Path) -> None:
    """So a saved adapter needs no tokenizer."""
    specs: Any = [{"trainable-tokens": {"tokens": ["<call>", "Ġworld", 40]}}]
    stack = attach(fresh("plain"), specs, tokenizer=Words())
    assert stack.attachments[0].resolved() == {"tokens": [9, 5, 40], "new": 0, "tied": False}
    noise(stack.trainable())
    save(stack, tmp_path / "a")
    assert read(tmp_path / "a").manifest.adapters[0].config == {"tokens": [9, 5, 40]}
    assert torch.equal(run(load(fresh("plain"), tmp_path / "a").model), run(stack.model))


@pytest.mark.parametrize("name", ["plain", "tied", "gpt2", "bert"])
def test_merged_equals_unmerged(fresh: Fresh, run: Run, noise: Noise, name: str) -> None:
    model = fresh(name)
    stack = attach(model, [SOME])
    noise(stack.attachments[0].trainable())
    unmerged = run(model)
    stack.attachments[0].merge()
    torch.testing.assert_close(run(model), unmerged, atol=1e-6, rtol=0)
    table = model.get_input_embeddings()
    assert type(table) is nn.Embedding
    assert torch.equal(table.weight[[9, 5, 40]], next(iter(stack.trainable().values())))


def test_new_rows_cannot_be_merged(fresh: Fresh, run: Run) -> None:
    model = fresh("tied")
    stack = attach(model, [NEW])
    before = run(model)
    with pytest.raises(StackError, match="new tokens have no rows in the table"):
        stack.attachments[0].merge()
    assert torch.equal(run(model), before)


def test_untied_rows_rest_while_a_window_holds_none_of_the_tokens(
    fresh: Fresh, gradients: Gradients, ids: Tensor
) -> None:
    without = torch.full_like(ids, 7)
    for name, rests in (("plain", True), ("tied", False)):
        stack = attach(fresh(name), [SOME])
        (attachment,) = stack.attachments
        gradients(stack.model, stack.trainable(), input_ids=without)
        assert attachment.may_rest() == ({"model.embed_tokens.tokens.trainable-tokens"} if rests else set())
        gradients(stack.model, stack.trainable(), input_ids=ids)
        assert attachment.may_rest() == frozenset()


def test_it_is_float32_with_the_rate_of_the_embeddings(fresh: Fresh) -> None:
    stack = attach(fresh("tied", precision="bf16"), [SOME, {"layerwise-lr": {"decay": 0.5}}])
    assert {p.dtype for p in stack.trainable().values()} == {torch.float32}
    assert [rate.multiplier for rate in stack.rates().values()] == [0.125]


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(
    fresh: Fresh, noise: Noise, gradients: Gradients, assert_same: AssertSame, reentrant: bool
) -> None:
    model = fresh("tied", "nf4").train()
    stack = attach(model, ["nf4", "lora", SOME])
    noise(stack.trainable())
    plain = gradients(model, stack.trainable())
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_same(gradients(model, stack.trainable()), plain)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_of_them_are_one_with_all_their_rows(fresh: Fresh, run: Run, noise: Noise, order: tuple[int, int]) -> None:
    model, single = fresh("tied"), fresh("tied")
    base = run(model)
    stacks = [
        attach(model, [{"trainable-tokens": {"name": name, "tokens": tokens}}])
        for name, tokens in (("a", [9, 64]), ("b", [5]))
    ]
    whole = attach(single, [{"trainable-tokens": {"tokens": [9, 64, 5]}}])
    (rows,) = whole.trainable().values()
    noise(whole.trainable())
    with torch.no_grad():
        for stack, part in zip(stacks, (rows[:2], rows[2:]), strict=True):
            next(iter(stack.trainable().values())).copy_(part)
    torch.testing.assert_close(run(model), run(single), atol=1e-6, rtol=0)
    for index in order:
        stacks[index].detach()
    assert torch.equal(run(model), base)


def test_an_embedding_that_scales_what_it_looks_up_does_so_for_its_rows(fresh: Fresh, run: Run, noise: Noise) -> None:
    """Gemma's does, and rounds the scale to the precision of its table."""
    for precision in ("fp32", "bf16"):
        model = fresh("plain", precision=precision)
        plain = model.get_input_embeddings()
        scaled = Gemma3TextScaledWordEmbedding(64, 32, padding_idx=0, embed_scale=32**0.5).to(model.dtype)
        scaled.load_state_dict(plain.state_dict())
        model.set_input_embeddings(scaled)
        before = run(model)
        stack = attach(model, [SOME])
        assert torch.equal(run(model), before)
        noise(stack.trainable())
        expected = run(model)
        stack.attachments[0].merge()
        torch.testing.assert_close(run(model), expected, atol=1e-6, rtol=0)


def test_one_table_at_several_places_has_the_same_rows_at_all_of_them(ids: Tensor, noise: Noise) -> None:
    """T5: shared by encoder, decoder and output embeddings."""
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(
        T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=2)
    ).eval()

    def run() -> Tensor:
        with torch.no_grad():
            found: Tensor = model(input_ids=ids, decoder_input_ids=ids).logits
        return found

    before = run()
    stack = attach(model, [SOME])
    assert torch.equal(run(), before)
    noise(stack.trainable())
    expected = run()
    stack.attachments[0].merge()
    torch.testing.assert_close(run(), expected, atol=1e-5, rtol=0)
    assert (expected - before).abs().max() > 0.01


@pytest.mark.parametrize(
    ("name", "tokens", "error", "message"),
    [
        ("plain", ["<call>"], StackError, "'<call>' is a text, and there is no tokenizer"),
        ("plain", [5, 9, 5], TargetError, "token 5 is listed twice"),
        ("plain", [-1], TargetError, "token -1 is out of range: the table has ids 0 to 63, new ones begin at 64"),
        ("tied", [65], TargetError, "token 65 is out of range"),
        ("tied", [64, 66], TargetError, "token 66 is out of range"),
        ("plain", [64], StackError, "token 64 is new, and its logit needs a row of lm_head too, which is not tied"),
        ("bert", [0], TargetError, "token 0 is the padding token"),
    ],
)
def test_a_token_that_cannot_be_trained_is_refused_and_nothing_is_changed(
    fresh: Fresh, name: str, tokens: list[Any], error: type[Exception], message: str
) -> None:
    model = fresh(name)
    before = list(dict(model.named_modules()))
    with pytest.raises(error, match=message):
        attach(model, [{"trainable-tokens": {"tokens": tokens}}])
    assert list(dict(model.named_modules())) == before


def test_a_text_that_the_tokenizer_does_not_have_is_refused_with_the_nearest(fresh: Fresh) -> None:
    with pytest.raises(TargetError, match=r"'<cal>' is no token of the tokenizer; did you mean '<call>'.*add_tokens"):
        attach(fresh("plain"), [{"trainable-tokens": {"tokens": ["<cal>"]}}], tokenizer=Words())
    with pytest.raises(TargetError, match="token 9 is listed twice"):
        attach(fresh("plain"), [{"trainable-tokens": {"tokens": ["<call>", 9]}}], tokenizer=Words())


def test_no_token_has_two_trained_rows(fresh: Fresh) -> None:
    model = fresh("tied")
    attach(model, [{"trainable-tokens": {"tokens": [5, 64]}}])
    for tokens, message in (([9, 5], "token 5 is trained by another"), ([65, 64], "token 64 is trained by another")):
        with pytest.raises(StackError, match=message):
            attach(model, [{"trainable-tokens": {"name": "b", "tokens": tokens}}])


def test_what_can_be_seen_without_weights_is_refused_then(tiny: dict[str, Path]) -> None:
    stack = build([{"trainable-tokens": {"tokens": [5, 99]}}])
    with pytest.raises(TargetError, match="token 99 is out of range"):
        load_options(str(tiny["plain"]), stack, kind="causal-lm", precision="fp32")


@pytest.mark.parametrize("tokens", [[], [1.5], [True], "all", None])
def test_a_setting_of_another_kind_is_refused(tokens: object) -> None:
    with pytest.raises(RecipeError, match=r"adapters\[0\]\.trainable-tokens\.tokens"):
        build([{"trainable-tokens": {"tokens": tokens}}])


def test_a_model_that_is_not_of_transformers_is_refused() -> None:
    with pytest.raises(StackError, match="needs a transformers model with an embedding table, not Embedding"):
        attach(nn.Embedding(4, 4), [{"trainable-tokens": {"tokens": [1]}}])
