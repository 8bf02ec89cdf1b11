"""Every method of PEFT by name, over the bridge: `vera`, `ia3`, `oft`, ... One row says what the bridge cannot know.

A method that is ours too has PEFT's under a longer name: `lora` and `peft-lora`. Classes are made when one is asked
for. What the rows declare is proved by the conformance suite, for every one of them.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any, Literal, NamedTuple

from peft.utils import PeftType
from pydantic import Field, create_model

from ..contract import Adapter, Capabilities
from .config import OWNED, fields_of
from .injected import Bridged, Injected, Method
from .prompts import CachedPrompt, ContextPrompt, Prompt
from .variants import AdaLoRA, AdaptionPrompt, FeatureScales, Norms, PeftLoRA, Poly, Shadow, Unbridged

__all__ = ["PeftType"]


class Row(NamedTuple):
    """What the bridge has to be told of one method."""

    summary: str  # and the paper
    kind: type[Bridged] = Injected
    on: Literal["linears", "norms", "embeddings", "blocks"] = "linears"
    defaults: Mapping[str, Any] = {}
    leave_out: frozenset[str] = frozenset()
    always: frozenset[str] = frozenset()  # written even where they are PEFT's defaults
    frozen: frozenset[str] = frozenset()  # parameters of PEFT's layers that nobody trains
    declares: Mapping[str, bool] = {}  # capabilities that differ from those of most
    reasons: Mapping[str, str] = {}


LORA_LEFT_OUT = frozenset(
    {
        # These change the base's weights at the start: pissa, olora and loftq are adapters of their own.
        "corda_config", "loftq_config", "lora_ga_config",
        # These need another library's layers, other adapters, or a loss term that PEFT keeps in its trainer.
        "arrow_config", "kasa_config", "monteclora_config", "qalora_group_size", "use_bdlora", "use_qalora",
        "velora_config",
    }
)  # fmt: skip

NO_PLACE = "the vectors stand in front of the first sequence of a row only"
PROMPT: dict[str, Any] = {
    "declares": {"identity_at_start": False, "packing": False},
    "reasons": {"packing": NO_PLACE, "mergeable": "it changes inputs, not weights"},
}
CACHED: dict[str, Any] = {
    "declares": {
        "identity_at_start": False,
        "packing": False,
        "checkpointing": False,
        "encoder_decoder": False,
        "several": False,
    },
    "reasons": {
        "packing": NO_PLACE,
        "checkpointing": "keys and values in a cache are not recomputed; `prefix` does without one",
        "encoder_decoder": "its two caches are not PEFT's one",
        "several": "a model has one cache; `prefix` does without one",
        "mergeable": "it changes inputs, not weights",
    },
}
CAUSAL_PROMPT: dict[str, Any] = {
    "declares": PROMPT["declares"] | {"encoders": False, "encoder_decoder": False},
    "reasons": PROMPT["reasons"]
    | dict.fromkeys(("encoders", "encoder_decoder"), "PEFT has it for causal language models only"),
}
NOT_MERGED = {"mergeable": False}
NOT_PLANNED = {"planned": False}
NOT_IDENTITY = {"identity_at_start": False}
ROUNDED: dict[str, Any] = {
    "declares": NOT_IDENTITY,
    "reasons": {"identity_at_start": "what it starts from equals the base but for rounding"},
}

ROWS: dict[PeftType, Row] = {
    PeftType.ADALORA: Row(
        "AdaLoRA: a budget of ranks, moved to where it matters (https://arxiv.org/abs/2303.10512)",
        AdaLoRA,
        leave_out=LORA_LEFT_OUT | {"r", "eva_config", "use_dora", "rank_pattern", "alora_invocation_tokens"},
        frozen=frozenset({"ranknum"}),
        declares={"several": False},
        reasons={"several": "PEFT allocates ranks for one at a time"},
    ),
    PeftType.ADAMSS: Row(
        "AdaMSS: low-rank updates in clustered subspaces",
        declares=NOT_PLANNED,
        reasons={"planned": "PEFT looks at the weights to know"},
    ),
    PeftType.ADAPTION_PROMPT: Row(
        "LLaMA-Adapter: prompts in the attention of the upper layers (https://arxiv.org/abs/2303.16199)",
        AdaptionPrompt,
        declares={"several": False, "quantised_bases": False, "half_bases": False},
        reasons={
            "several": "PEFT has one in a layer's attention",
            "quantised_bases": "PEFT looks for float weights in the attention",
            "half_bases": "PEFT multiplies its float32 prompts with the base's weights",
            "mergeable": "it adds to the attention, not to its weights",
        },
    ),
    PeftType.BEFT: Row(
        "BEFT: a bias added to projections (https://arxiv.org/abs/2509.15974)",
        declares=NOT_MERGED,
        reasons={"mergeable": "PEFT adds it to a bias, and most bases have none"},
    ),
    PeftType.BOFT: Row("BOFT: orthogonal updates in butterfly form (https://arxiv.org/abs/2311.06243)"),
    PeftType.C3A: Row(
        "C3A: circular convolution in blocks (https://arxiv.org/abs/2407.19342)",
        declares=NOT_IDENTITY | {"several": False},
        reasons={"several": "PEFT runs the second with the first one's shapes"},
    ),
    PeftType.CARTRIDGE: Row(
        "Cartridge: a trained key-value cache (https://arxiv.org/abs/2506.06266)", CachedPrompt, **CACHED
    ),
    PeftType.CPT: Row(
        "CPT: a prompt that starts from examples (https://arxiv.org/abs/2410.17222)", ContextPrompt, **CAUSAL_PROMPT
    ),
    PeftType.DEFT: Row("DEFT: decomposed updates of a projected weight", **ROUNDED),
    PeftType.DELORA: Row("DeLoRA: direction and strength apart (https://arxiv.org/abs/2503.18225)"),
    PeftType.FOURIERFT: Row(
        "FourierFT: sparse spectral updates (https://arxiv.org/abs/2405.03003)",
        declares=NOT_IDENTITY | NOT_PLANNED,
        reasons={"planned": "PEFT draws its places on real tensors"},
    ),
    PeftType.FROD: Row(
        "FRoD: shared full-rank bases, sparse coefficients",
        declares=NOT_IDENTITY | NOT_PLANNED,
        reasons=ROUNDED["reasons"] | {"planned": "PEFT decomposes the weights to know"},
    ),
    PeftType.GLORA: Row(
        "GLoRA: scaled weights, biases and prompts in one (https://arxiv.org/abs/2306.07967)",
        declares={"quantised_bases": False},
        reasons={"quantised_bases": "PEFT has it for plain linears only"},
    ),
    PeftType.GRALORA: Row("GraLoRA: low-rank updates in a grid of blocks (https://arxiv.org/abs/2505.20355)"),
    PeftType.HIRA: Row(
        "HiRA: a low-rank update times the weight, element by element (https://openreview.net/pdf?id=TwJrTz9cRS)"
    ),
    PeftType.HRA: Row("HRA: Householder reflections (https://arxiv.org/abs/2405.17484)", **ROUNDED),
    PeftType.IA3: Row("IA3: a learned scale for each feature (https://arxiv.org/abs/2205.05638)", FeatureScales),
    PeftType.LILY: Row(
        "Lily: low-rank factors shared between layers (https://arxiv.org/abs/2407.09946)",
        declares=NOT_MERGED | {"row_by_row": False, "packing": False, "several": False},
        reasons={
            "row_by_row": "its router averages over the batch",
            "packing": "its router averages over the batch",
            "several": "PEFT shares its factors between layers, not between instances",
            "mergeable": "what it adds depends on the input",
        },
    ),
    PeftType.LN_TUNING: Row(
        "LN tuning: norms only (https://arxiv.org/abs/2312.11420)",
        Norms,
        on="norms",
        declares={"several": False},
        reasons={"several": "PEFT runs one at a time"},
    ),
    PeftType.LOHA: Row("LoHa: Hadamard product of two low-rank updates (https://arxiv.org/abs/2108.06098)"),
    PeftType.LOKR: Row("LoKr: Kronecker product of factors (https://arxiv.org/abs/2309.14859)"),
    PeftType.LORA: Row(
        "PEFT's LoRA with its variants (https://arxiv.org/abs/2106.09685)", PeftLoRA, leave_out=LORA_LEFT_OUT
    ),
    PeftType.MISS: Row("MiSS: one shard of the update, repeated (https://arxiv.org/abs/2409.15371)"),
    PeftType.MULTITASK_PROMPT_TUNING: Row(
        "Multitask prompt tuning with one task (https://arxiv.org/abs/2303.02861)",
        Prompt,
        leave_out=frozenset({"prompt_tuning_init_state_dict_path", "prompt_tuning_init_task", "num_tasks"}),
        **PROMPT,
    ),
    PeftType.OFT: Row(
        "OFT: orthogonal updates in blocks (https://arxiv.org/abs/2306.07280)", always=frozenset({"oft_block_size"})
    ),
    PeftType.OSF: Row(
        "OSF: the small singular directions of a weight (https://arxiv.org/abs/2504.07097)",
        declares=NOT_IDENTITY | {"several": False, "half_bases": False},
        reasons=ROUNDED["reasons"]
        | {
            "several": "PEFT trains the first only",
            "half_bases": "PEFT puts the weight together in the base's dtype, and rounding eats the gradient",
        },
    ),
    PeftType.PEANUT: Row("PEANuT: a small network of the weight (https://arxiv.org/abs/2410.01870)"),
    PeftType.POLY: Row(
        "Polytropon with one task (https://arxiv.org/abs/2202.13914)",
        Poly,
        leave_out=frozenset({"n_tasks"}),
        declares=NOT_MERGED | {"encoders": False, "row_by_row": False},
        reasons={
            "row_by_row": "PEFT samples its router while it trains",
            "encoders": "PEFT's layers take (rows, tokens, features), and the pooler of an encoder has no tokens",
        },
    ),
    PeftType.PREFIX_TUNING: Row(
        "PEFT's prefix tuning (https://arxiv.org/abs/2101.00190); `prefix` needs no cache", CachedPrompt, **CACHED
    ),
    PeftType.PROMPT_TUNING: Row("Prompt tuning (https://arxiv.org/abs/2104.08691)", Prompt, **PROMPT),
    PeftType.PSOFT: Row(
        "PSOFT: orthogonal updates in the principal subspace (https://openreview.net/forum?id=FSHrinMArK)"
    ),
    PeftType.PVERA: Row(
        "PVeRA: VeRA that samples its vectors (https://arxiv.org/abs/2512.07703)",
        declares={"row_by_row": False},
        reasons={"row_by_row": "it samples while it trains"},
    ),
    PeftType.P_TUNING: Row(
        "P-tuning: a prompt from a small network (https://arxiv.org/abs/2103.10385)", Prompt, **PROMPT
    ),
    PeftType.RANDLORA: Row("RandLoRA: sums of scaled random low-rank matrices (https://arxiv.org/abs/2502.00987)"),
    PeftType.ROAD: Row("RoAd: rotations in two dimensions (https://arxiv.org/abs/2409.00119)"),
    PeftType.SHADOW: Row(
        "Shadow: a small model beside the base",
        Shadow,
        on="blocks",
        leave_out=frozenset({"auxiliary_loss_weight"}),
        declares=NOT_MERGED | NOT_PLANNED | {"encoder_decoder": False, "several": False},
        reasons={
            "planned": "PEFT makes its second model with weights",
            "encoder_decoder": "PEFT's shadow follows one stack of layers",
            "several": "a model has one shadow",
            "mergeable": "it runs beside the layers",
        },
    ),
    PeftType.SHIRA: Row(
        "SHiRA: a sparse high-rank update (https://arxiv.org/abs/2406.13175)",
        declares=NOT_PLANNED,
        reasons={"planned": "PEFT draws its places on real tensors"},
    ),
    PeftType.SUPERTUNING: Row("Supertuning: a sparse update of chosen weights (https://arxiv.org/abs/2607.09287)"),
    PeftType.TINYLORA: Row(
        "TinyLoRA: a handful of parameters in a projected update (https://arxiv.org/abs/2602.04118)",
        declares=NOT_PLANNED,
        reasons={"planned": "PEFT looks at the weights to know"},
    ),
    PeftType.TRAINABLE_TOKENS: Row(
        "PEFT's trainable tokens: rows of the embedding",
        on="embeddings",
        declares={"several": False},
        reasons={
            "several": "PEFT keeps two apart only where their tokens differ",
        },
    ),
    PeftType.UNILORA: Row(
        "Uni-LoRA: one vector for all layers (https://arxiv.org/abs/2506.00799)", declares=NOT_IDENTITY
    ),
    PeftType.VBLORA: Row(
        "VB-LoRA: low-rank updates from a bank of vectors (https://arxiv.org/abs/2405.15179)", declares=NOT_IDENTITY
    ),
    PeftType.VERA: Row("VeRA: scales for shared random matrices (https://arxiv.org/abs/2310.11454)"),
    PeftType.WAVEFT: Row(
        "WaveFT: sparse wavelet updates (https://arxiv.org/abs/2505.12532)",
        declares=NOT_PLANNED,
        reasons={"planned": "PEFT draws its places on real tensors"},
    ),
    PeftType.XLORA: Row(
        "X-LoRA: a learned mixture of finished LoRAs (https://arxiv.org/abs/2402.07148)",
        Unbridged,
        declares=dict.fromkeys(("encoders", "decoders", "encoder_decoder", "mergeable", "peft_readable"), False),
        reasons=dict.fromkeys(
            ("encoders", "decoders", "encoder_decoder"),
            "it mixes LoRA folders that were trained before, by path, and runs the model twice in PEFT's own wrapper",
        ),
    ),
}


def __getattr__(name: str) -> type[Adapter]:
    if name not in PeftType.__members__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _class_of(PeftType[name])


@cache
def _class_of(peft_type: PeftType) -> type[Adapter]:
    row = ROWS[peft_type]
    method = Method(
        peft_type=peft_type,
        on=row.on,
        defaults=row.defaults,
        leave_out=row.leave_out,
        always=row.always,
        frozen=row.frozen,
    )
    settings = fields_of(method.config_class, OWNED | row.leave_out, row.defaults)
    own = dict(row.kind.model_fields)
    if row.on != "linears":
        settings["targets"] = (str | list[str], Field(default="all", description=f"Which {row.on}: names or patterns."))
        del own["targets"]
    made = create_model(
        peft_type.name,
        __base__=row.kind,
        __module__=__name__,
        __doc__=row.summary,
        **{name: definition for name, definition in settings.items() if name not in own},
    )
    usual: dict[str, Any] = {"peft_readable": True, "mergeable": issubclass(row.kind, Injected)}
    made.method, made.api = method, 1
    made.capabilities = Capabilities(**(usual | dict(row.declares)), reasons=row.reasons)
    return made
