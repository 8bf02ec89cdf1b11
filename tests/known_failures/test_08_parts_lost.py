"""8. What was trained beside the adapter is lost: a classification head, the rows of new tokens.

Met: the head's name was not guessed, or a copy of it was trained and the original used; embeddings grew and were not
saved. After loading, a classifier guesses and new tokens are noise.

Here: the task names its head, which is trained, saved and loaded with the adapter; new tokens are rows of their own,
and no larger table; the tokenizer that has them stays with the base, and another one is refused; saving refuses
whatever is trainable and belongs to nothing that is saved.

Also: tests/adapters/test_artefact.py, tests/adapters/test_trainable_tokens.py, tests/test_without_recipes.py
"""

import shutil
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from onegpu.adapters import ArtefactError, StackError, artefact, attach, load, load_base, save

Fresh = Callable[..., PreTrainedModel]
LABELS = ["money", "sports", "weather"]
ELSEWHERE = """
import sys, torch
from safetensors.torch import load_file
from onegpu.adapters import load, load_base
torch.set_num_threads(1)
base, adapter, probe = sys.argv[1:]
model = load_base(base, kind="sequence-classification", labels=["a", "b", "c"], precision="fp32", seed=5)
load(model, adapter)
expected = load_file(probe)
model.config.pad_token_id = 1
with torch.no_grad():
    assert torch.equal(model(input_ids=expected["ids"]).logits, expected["logits"])
"""


def test_a_classifier_is_the_same_in_a_new_process(
    bases: dict[str, Path], noise: Callable[[Any], None], ids: Tensor, logits: Callable[..., Tensor], tmp_path: Path
) -> None:
    model = load_base(str(bases["plain"]), kind="sequence-classification", labels=LABELS, precision="fp32")
    model.config.pad_token_id = 1
    stack = attach(model, ["lora"])
    assert list(stack.heads) == ["score.weight"]
    noise(stack.trainable())
    save(stack, tmp_path / "adapter")
    save_file({"ids": ids, "logits": logits(model)}, tmp_path / "probe.safetensors")
    arguments = [str(bases["plain"]), str(tmp_path / "adapter"), str(tmp_path / "probe.safetensors")]
    done = subprocess.run([sys.executable, "-c", ELSEWHERE, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("variant", ["plain", "tied", "wide-heads"])
def test_three_tokens_are_three_rows_of_the_file(variant: str, fresh: Fresh, tmp_path: Path) -> None:
    stack = attach(fresh(variant), [{"trainable-tokens": {"tokens": [5, 6, 7]}}])
    save(stack, tmp_path / "adapter")
    written = load_file(tmp_path / "adapter/adapter_model.safetensors")
    # As PEFT does, the rows are written once more for output embeddings that are tied to them.
    assert len(written) == (2 if variant == "tied" else 1)
    assert {tuple(rows.shape) for rows in written.values()} == {(3, 32)}


def test_new_tokens_are_rows_of_the_file_and_the_table_is_none_of_it(
    fresh: Fresh, noise: Callable[[Any], None], ids: Tensor, logits: Callable[..., Tensor], tmp_path: Path
) -> None:
    model, again = fresh("tied"), fresh("tied")
    new = ids.clone()
    new[0, :3] = torch.tensor([64, 65, 66])  # the table ends at 63
    stack = attach(model, [{"trainable-tokens": {"tokens": [64, 65, 66]}}])
    noise(stack.trainable())
    save(stack, tmp_path / "adapter")
    written = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert [tuple(rows.shape) for rows in written.values()] == [(3, 32)]
    load(again, tmp_path / "adapter")  # nobody resized it
    assert again.config.vocab_size == 64
    assert logits(model, input_ids=new).shape[-1] == 67
    assert torch.equal(logits(again, input_ids=new), logits(model, input_ids=new))


def test_output_embeddings_that_lack_the_rows_of_new_tokens_are_told(fresh: Fresh) -> None:
    with pytest.raises(StackError, match=r"token 66 is new, and its logit needs a row of lm_head too"):
        attach(fresh("plain"), [{"trainable-tokens": {"tokens": [64, 65, 66]}}])


def test_the_tokenizer_with_the_new_tokens_is_needed_again(
    bases: dict[str, Path], tokenizer: Any, recipe: Callable[..., Any], run: Any, onegpu: Any, tmp_path: Path
) -> None:
    """It stays with the base; the manifest has its digest, so that another one is refused."""
    base = Path(shutil.copytree(bases["tied"], tmp_path / "base"))
    longer = deepcopy(tokenizer)
    names = [f"<new{i}>" for i in range(64 - len(tokenizer) + 3)]  # up to the end of the table, and three beyond it
    longer.add_tokens(names)
    longer.save_pretrained(base)
    out = run(recipe([{"trainable-tokens": {"tokens": names[-3:]}}], base=base)).adapter
    assert artefact.read(out).manifest.adapters[0].config == {"tokens": [64, 65, 66]}
    assert onegpu("chat", str(out), "-m", "hi", "--tokens", "1")[0] == 0
    tokenizer.save_pretrained(base)
    code, _, errors = onegpu("chat", str(out), "-m", "hi", "--tokens", "1")
    assert code == 2
    assert "tokenizer" in errors
    assert "vocabulary" in errors


def test_what_somebody_else_unfroze_is_not_lost_in_silence(fresh: Fresh, tmp_path: Path) -> None:
    model = fresh()
    stack = attach(model, ["lora"])
    model.get_submodule("model.layers.0.input_layernorm").requires_grad_(True)
    with pytest.raises(
        ArtefactError, match=r"model\.layers\.0\.input_layernorm\.weight is trainable but belongs to no"
    ):
        save(stack, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
