import hashlib
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.nn import functional as F
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    EncoderDecoderModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from onegpu.adapters import RecipeError, artefact, attach, encoder_decoder as composing, load, load_base
from onegpu.adapters.fingerprints import differences, fingerprint
from onegpu.adapters.sources import locate
from onegpu.adapters.structure import head_modules, linears, output_embeddings

SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
CROSS = [f"decoder.bert.encoder.layer.{n}.crossattention" for n in range(2)]
NEW = (*CROSS, "decoder.cls.predictions.transform")
SETTINGS: dict[str, Any] = {
    "vocab_size": 24,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def _encoder(folder: Path, seed: int, **changes: Any) -> Path:
    torch.manual_seed(seed)
    BertModel(BertConfig(**(SETTINGS | changes))).save_pretrained(folder)
    _tokenizer(folder)
    return folder


def _tokenizer(folder: Path, last: str = "t") -> None:
    words = [*SPECIALS, *"abcdefghijklmnopqrs", last]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=inner, **names).save_pretrained(folder)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of two tiny encoders with unequal weights and one vocabulary."""
    root = tmp_path_factory.mktemp("parts")
    return _encoder(root / "reads", 1), _encoder(root / "writes", 2)


@pytest.fixture(scope="module")
def written(parts: tuple[Path, Path]) -> str:
    """The base of both, as a recipe names it."""
    return " + ".join(map(str, parts))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ONEGPU_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def base(written: str) -> Callable[..., PreTrainedModel]:
    """`base()`: a new instance of the composed model."""

    def make(*adapters: Any, precision: Any = "fp32") -> PreTrainedModel:
        return load_base(written, adapters, kind="sequence-to-sequence", precision=precision)

    return make


def _batch() -> dict[str, torch.Tensor]:
    """Sources, and targets that repeat the first three tokens of them: ids (8, 6) and (8, 4)."""
    source = torch.randint(4, 24, (8, 6), generator=torch.Generator().manual_seed(5))
    start = torch.full((8, 1), 2)
    return {"input_ids": source, "attention_mask": torch.ones_like(source)} | {
        "decoder_input_ids": torch.cat([start, source[:, :3]], 1),
    }


def _loss(model: Any) -> torch.Tensor:
    batch = _batch()
    logits = model(**batch).logits[:, :3].float()
    return F.cross_entropy(logits.flatten(0, 1), batch["input_ids"][:, :3].flatten())


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(**_batch()).logits
    return found


def test_it_is_what_transformers_composes_from_the_same_seed(
    parts: tuple[Path, Path], base: Callable[..., PreTrainedModel]
) -> None:
    torch.manual_seed(0)
    theirs = EncoderDecoderModel.from_encoder_decoder_pretrained(*map(str, parts))
    ours = base().state_dict()
    assert ours.keys() == theirs.state_dict().keys()
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours[name], tensor), name


def test_special_tokens_and_what_is_new_are_written_down(written: str) -> None:
    folder = Path(locate(written).materialise())
    config = json.loads((folder / "config.json").read_text("utf-8"))
    assert {key: config[f"{key}_token_id"] for key in ("decoder_start", "eos", "pad")} == {
        "decoder_start": 2,
        "eos": 3,
        "pad": 0,
    }
    assert tuple(config["onegpu_new_modules"]) == NEW
    assert (config["vocab_size"], config["max_position_embeddings"]) == (24, 32)
    assert AutoTokenizer.from_pretrained(folder).eos_token == "[SEP]"
    model: Any = EncoderDecoderModel.from_pretrained(folder)
    assert model.generate(torch.tensor([[2, 5, 3]]), max_new_tokens=2)[0, 0] == 2


def test_the_same_parts_give_the_same_bytes_everywhere(
    written: str, parts: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for name in ("one", "other"):
        monkeypatch.setenv("ONEGPU_CACHE", str(tmp_path / name))
        torch.manual_seed(ord(name[0]))
        folder = Path(locate(written).materialise())
        found.append({p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())})
        assert str(parts[0].parent) not in (folder / "config.json").read_text("utf-8")
    assert found[0] == found[1]
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= found[0].keys()


def test_it_is_composed_once_for_its_content(
    parts: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made: list[Path] = []
    monkeypatch.setattr(composing, "compose", lambda encoder, decoder, folder: made.append(encoder))
    one, other = parts
    there = locate(f"{one} + {other}").materialise()
    assert locate(f"{one.name} + {other.name}", beside=one.parent).materialise() == there
    assert made == [one]
    assert locate(f"{other} + {one}").materialise() != there
    assert locate(f"{one} + {_encoder(tmp_path / 'writes', 3)}").materialise() != there
    assert len(made) == 3
    assert capsys.readouterr().err.count("composing") == 3


def test_the_random_state_is_left_as_it_was(written: str) -> None:
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    locate(written).materialise()
    assert torch.equal(torch.rand(1), expected)


def test_a_folder_whose_name_has_a_plus_is_a_folder(tiny: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "a + b").symlink_to(tiny["plain"])
    assert locate("a + b", beside=tmp_path).parts is None


def test_parts_of_unequal_width_get_a_projection_that_is_new(tmp_path: Path) -> None:
    parts = _encoder(tmp_path / "wide", 1, hidden_size=48), _encoder(tmp_path / "narrow", 2)
    model = load_base(" + ".join(map(str, parts)), kind="sequence-to-sequence", precision="fp32")
    assert head_modules(model) == (*NEW, "enc_to_dec_proj")


def test_an_output_layer_that_a_checkpoint_has_is_not_new(parts: tuple[Path, Path], tmp_path: Path) -> None:
    BertForMaskedLM(BertConfig(**SETTINGS)).save_pretrained(tmp_path / "lm")
    _tokenizer(tmp_path / "lm")
    # It has no pooler either, which an encoder-decoder has no use for.
    model = load_base(f"{tmp_path / 'lm'} + {tmp_path / 'lm'}", kind="sequence-to-sequence", precision="fp32")
    assert head_modules(model) == tuple(CROSS)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("{one} + {one} + {one}", "made of two models, `ENCODER \\+ DECODER`"),
        ("{one} + someone/model", "base part 'someone/model': no such folder; a hub id must be downloaded"),
        ("{one} + no/such/folder", "base 'no/such/folder': no such file or folder"),
        ("{one} + {gguf}", "a GGUF file only decodes; both parts must be models that only encode"),
    ],
)
def test_what_is_no_pair_of_folders_is_refused_before_anything_is_read(
    parts: tuple[Path, Path], tmp_path: Path, name: str, told: str
) -> None:
    (tmp_path / "some.gguf").write_bytes(b"GGUF")
    with pytest.raises(RecipeError, match=told):
        locate(name.format(one=parts[0], gguf=tmp_path / "some.gguf"))


def test_a_pair_has_no_revision(written: str) -> None:
    with pytest.raises(RecipeError, match="only a hub id has revisions"):
        locate(written, revision="main")


def _decoder_only(folder: Path, tiny: dict[str, Path]) -> str:
    return str(tiny["plain"])


def _encoder_decoder(folder: Path, tiny: dict[str, Path]) -> str:
    T5ForConditionalGeneration(T5Config(d_model=16, d_ff=16, d_kv=8, num_layers=1, num_heads=2)).save_pretrained(folder)
    _tokenizer(folder)
    return str(folder)


def _other_vocabulary(folder: Path, tiny: dict[str, Path]) -> str:
    _encoder(folder, 1)
    _tokenizer(folder, last="u")
    return str(folder)


def _no_tokenizer(folder: Path, tiny: dict[str, Path]) -> str:
    return str(tiny["bert"])


def _no_decoder(folder: Path, tiny: dict[str, Path]) -> str:
    DistilBertModel(DistilBertConfig(vocab_size=24, dim=16, hidden_dim=16, n_layers=1, n_heads=2)).save_pretrained(
        folder
    )
    _tokenizer(folder)
    return str(folder)


def _half_a_checkpoint(folder: Path, tiny: dict[str, Path]) -> str:
    _encoder(folder, 1, num_hidden_layers=1)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    return str(folder)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (_decoder_only, "is a model that only decodes; both parts must be models that only encode"),
        (_encoder_decoder, "is a model with an encoder and a decoder; both parts"),
        (_other_vocabulary, "different vocabularies"),
        (_no_tokenizer, "bert' has no tokenizer"),
        (_no_decoder, "cannot be a decoder"),
        (_half_a_checkpoint, r"the checkpoint has no weights for encoder\.layer\.1"),
    ],
)
def test_a_part_that_cannot_be_composed_is_refused_and_leaves_no_cache(
    parts: tuple[Path, Path],
    tiny: dict[str, Path],
    tmp_path: Path,
    cache: Path,
    make: Callable[[Path, dict[str, Path]], str],
    told: str,
) -> None:
    part = make(tmp_path / "part", tiny)
    if "_token" not in make.__name__ and not (Path(part) / "tokenizer.json").exists():
        _copy_tokenizer_of(parts[0], part := _copied(part, tmp_path / "copied"))
    with pytest.raises(RecipeError, match=told):
        locate(f"{parts[0]} + {part}").materialise()
    assert list((cache / "composed").iterdir()) == []


def _copied(folder: str, target: Path) -> str:
    target.mkdir()
    for path in Path(folder).iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return str(target)


def _copy_tokenizer_of(source: Path, target: str) -> None:
    for path in source.glob("tokenizer*"):
        (Path(target) / path.name).write_bytes(path.read_bytes())


def test_what_is_new_is_trained_beside_any_adapter(base: Callable[..., PreTrainedModel]) -> None:
    model = base()
    stack = attach(model, ["lora"])
    assert head_modules(model) == NEW
    expected = {n for n, _ in model.named_parameters() if any(f"{path}." in n for path in NEW)}
    assert stack.heads.keys() == expected
    assert len(expected) == 2 * 10 + 4
    # Nothing reads what the encoder's pooler gives, so it would have no gradient.
    assert not any("pooler" in name for name in (*stack.trainable(), *linears(model)))
    assert output_embeddings(model) == "decoder.cls.predictions.decoder"


@pytest.mark.parametrize("spec", ["lora", {"bitfit": {"targets": "all-linear"}}, "full"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_it_learns_with(base: Callable[..., PreTrainedModel], spec: Any, precision: str) -> None:
    model = base(spec, precision=precision)
    stack = attach(model, [spec])
    before = _loss(model).item()
    optimizer = torch.optim.AdamW(list(stack.trainable().values()), lr=0.01)
    for step in range(240):
        optimizer.zero_grad()
        _loss(stack.model).backward()
        if step == 1:  # LoRA's A has no gradient before B has moved
            idle = [n for n, p in stack.trainable().items() if p.grad is None or not p.grad.any()]
            assert all("pooler" in name or "position" in name for name in idle), idle
        optimizer.step()
    assert _loss(model).item() < 0.5 * before


def test_gradients_of_what_is_new_are_those_of_the_plain_model(
    base: Callable[..., PreTrainedModel], written: str, assert_same: Any
) -> None:
    model, plain = base(), EncoderDecoderModel.from_pretrained(locate(written).materialise())
    stack = attach(model, ["lora"])  # fresh, so it adds nothing
    for one in (model, plain):
        _loss(one).backward()
    theirs = {name: plain.get_parameter(name).grad for name in stack.heads}
    # The softmax does not see a shift of the keys; their biases' gradients are rounding.
    told = [name for name in theirs if not name.endswith("self.key.bias")]
    assert_same({n: stack.heads[n].grad for n in told}, {n: theirs[n] for n in told}, 1e-5)


def test_new_modules_compute_in_float32_inside_a_bf16_base(base: Callable[..., PreTrainedModel]) -> None:
    model = base(precision="bf16")
    stack = attach(model, ["lora"])
    seen: dict[str, list[torch.dtype]] = {}

    def look(module: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        given = [v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor) and v.is_floating_point()]
        first = output[0] if isinstance(output, tuple) else output
        seen[type(module).__name__] = [*{v.dtype for v in given}, first.dtype]

    for path in (CROSS[0], NEW[-1]):
        model.get_submodule(path).register_forward_hook(look, with_kwargs=True)
    assert _logits(model).dtype == torch.bfloat16
    assert seen == {
        "BertAttention": [torch.float32, torch.bfloat16],
        "BertPredictionHeadTransform": [torch.float32, torch.bfloat16],
    }
    assert {p.dtype for p in stack.heads.values()} == {torch.float32}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_detaching_leaves_the_base_as_it_was(base: Callable[..., PreTrainedModel], noise: Any, precision: str) -> None:
    model = base(precision=precision)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    logits = _logits(model)
    stack = attach(model, ["lora"])
    noise(stack.trainable())
    assert not torch.equal(_logits(model), logits)
    stack.detach()
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(_logits(model), logits)


def test_what_was_trained_is_saved_and_loaded(
    base: Callable[..., PreTrainedModel], noise: Any, tmp_path: Path, written: str
) -> None:
    model = base()
    stack = attach(model, ["lora"])
    noise(stack.trainable())
    artefact.save(stack, tmp_path / "adapter", source=written)
    fresh = base()
    load(fresh, tmp_path / "adapter")
    assert torch.equal(_logits(fresh), _logits(model))


def test_stock_peft_reads_it(base: Callable[..., PreTrainedModel], noise: Any, tmp_path: Path) -> None:
    model = base()
    stack = attach(model, ["lora"])
    noise(stack.trainable())
    artefact.save(stack, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text("utf-8"))
    assert config["modules_to_save"] == sorted(NEW)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PEFT only warns of keys that are missing
        warnings.simplefilter("ignore", FutureWarning)
        theirs = PeftModel.from_pretrained(base(), str(tmp_path / "adapter"))
    torch.testing.assert_close(_logits(theirs), _logits(model))


def test_precisions_of_one_base_are_the_same_base(base: Callable[..., PreTrainedModel]) -> None:
    assert differences(fingerprint(base()), base(precision="bf16")) == ([], [])
    assert not any("crossattention" in name or "pooler" in name for name in fingerprint(base()).tensors)


def test_what_is_new_stays_unpacked(base: Callable[..., PreTrainedModel]) -> None:
    model = base("nf4")
    packed = {path for path, m in linears(model).items() if type(m).__name__ == "FrozenLinear"}
    assert packed
    assert not any(path.startswith(NEW) for path in packed)
    attach(model, ["nf4", "lora"])
    assert torch.isfinite(_loss(model))
