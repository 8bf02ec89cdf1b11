"""Bases that somebody else made: whatever is in their folder, transformers follows none of it to code or elsewhere."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers.modeling_utils
from transformers import LlamaForCausalLM

from onegpu.adapters import RecipeError, load_base
from onegpu.adapters.pretrained import read_config, read_tokenizer, readable
from onegpu.adapters.sources import LARGEST, locate

Base = Callable[..., Path]
KERNEL = "somebody/kernel"


@pytest.fixture
def base(worded: Path, tmp_path: Path) -> Base:
    """`base("config.json", hidden_size=0)`: the worded Llama with other settings in one of its files."""

    def build(name: str = "config.json", **settings: Any) -> Path:
        folder = Path(shutil.copytree(worded, tmp_path / "base"))
        content = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
        (folder / name).write_text(json.dumps(content | settings))
        return folder

    return build


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that transformers would have fetched and run."""
    names: list[str] = []

    def fetch(name: str, **options: Any) -> None:
        names.append(name)

    monkeypatch.setattr(transformers.modeling_utils, "lazy_import_flash_attention", fetch)
    return names


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
@pytest.mark.parametrize("value", [KERNEL, {"": KERNEL}, "flash_attention_2"], ids=str)
def test_a_configuration_chooses_no_code_for_attention(key: str, value: Any, base: Base, fetched: list[str]) -> None:
    model = load_base(str(base(**{key: value})), precision="fp32")
    assert model.config._attn_implementation == "sdpa"
    assert fetched == []


def test_transformers_alone_would_fetch_it(base: Base, fetched: list[str]) -> None:
    folder = base(attn_implementation=KERNEL)
    LlamaForCausalLM.from_pretrained(folder)
    assert set(fetched) == {KERNEL}


@pytest.mark.parametrize("name", ["pytorch_model.bin", "../outside.safetensors", "/x.safetensors", 5, None])
def test_an_index_names_only_safetensors_beside_it(name: Any, base: Base, tmp_path: Path) -> None:
    folder = base("model.safetensors.index.json", metadata={}, weight_map={"lm_head.weight": name})
    shutil.copy(folder / "model.safetensors", tmp_path / "outside.safetensors")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    (folder / "other.safetensors").write_bytes(b"")
    with pytest.raises(RecipeError, match=r"index.json names .*: weights are read from safetensors beside it"):
        load_base(str(folder), precision="fp32")


@pytest.mark.parametrize("content", [{}, {"weight_map": []}, {"weight_map": None}], ids=str)
def test_a_damaged_index_is_one_message(content: dict[str, Any], base: Base) -> None:
    with pytest.raises(RecipeError, match=r"index\.json has no weight_map"):
        load_base(str(base("model.safetensors.index.json", **content)), precision="fp32")


def test_shards_are_read(worded: Path, tmp_path: Path) -> None:
    LlamaForCausalLM.from_pretrained(worded).save_pretrained(tmp_path / "sharded", max_shard_size="20kB")
    assert (tmp_path / "sharded/model.safetensors.index.json").exists()
    assert load_base(str(tmp_path / "sharded"), precision="fp32").num_parameters()


def test_a_folder_with_an_adapter_in_it_leads_to_no_other_base(base: Base) -> None:
    folder = base("adapter_config.json", peft_type="LORA", base_model_name_or_path="/elsewhere")
    with pytest.raises(RecipeError, match=r"holds an adapter \(adapter_config.json\): name the base"):
        load_base(str(folder), precision="fp32")


DEEP = "[" * 100_000 + "]" * 100_000
DAMAGED = ["", "null", "[1]", '"a"', DEEP, '{"model_type": ["llama"]}', '{"model_type": "llama", "dtype": "os.system"}']


@pytest.mark.parametrize("content", DAMAGED, ids=lambda content: content[:20])
def test_a_damaged_configuration_is_one_message(content: str, base: Base) -> None:
    folder = base()
    (folder / "config.json").write_text(content)
    with pytest.raises(RecipeError, match="cannot be used as a causal-lm model: ") as caught:
        load_base(str(folder), precision="fp32")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["", "null", "[1]", DEEP, '{"tokenizer_class": [1]}'], ids=lambda c: c[:20])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_tokenizer_is_one_message(name: str, content: str, base: Base) -> None:
    folder = base()
    (folder / name).write_text(content)
    with pytest.raises(RecipeError, match=r"^no tokenizer: ") as caught, readable("no tokenizer"):
        read_tokenizer(folder)
    assert "\n" not in str(caught.value)


def test_more_layers_than_any_model_has_are_refused_before_one_is_built(base: Base) -> None:
    with pytest.raises(RecipeError, match="num_hidden_layers: 1000000000, and no model has more"):
        read_config(base(num_hidden_layers=10**9))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors.index.json"])
def test_a_file_that_would_fill_the_memory_is_refused_unread(name: str, base: Base) -> None:
    folder = base()
    with (folder / name).open("ab") as file:
        os.truncate(file.fileno(), LARGEST + 1)
    with pytest.raises(RecipeError, match=f"{name} has more than .* bytes: none is so large"):
        locate(str(folder))


def test_errors_of_the_house_pass_and_others_are_told_by_their_kind() -> None:
    with pytest.raises(RecipeError, match=r"^mine$"), readable("reading"):
        raise RecipeError("mine")
    with pytest.raises(RecipeError, match=r"^reading: KeyError: 'a'$"), readable("reading"):
        raise KeyError("a")
    with pytest.raises(RecipeError, match=r"^reading: AssertionError$"), readable("reading"):
        raise AssertionError
