"""The golden cases: each by the library it names, and by ours, which gives the same or the stated other value.

scipy, which made two of the golden values, is not a dependency: NormalDist and math.comb stand for it here.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import string
import unicodedata
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import NormalDist, fmean, stdev
from typing import Any

import jiwer
import numpy as np
import pytest
from rapidfuzz.distance import LCSseq, Levenshtein
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import Tokenizer
from sacrebleu.metrics import BLEU, CHRF

from voxtral_dist import significance
from voxtral_dist.ngram_scores import corpus_bleu, corpus_chrf
from voxtral_dist.scoring import (
    aggregate,
    rouge_l_f1,
    sample_asr,
    sample_qa,
    score_asr,
)
from voxtral_dist.text_norm import compression_ratio, mixed_tokens, normalize, respace, without_spaces
from voxtral_dist.transfer import relative_change

GOLDEN = json.loads((Path(__file__).parent / "golden_cases.json").read_text(encoding="utf-8"))
CASES = {case["id"]: case for case in GOLDEN["cases"]}
TOY = {name: np.array(values) for name, values in GOLDEN["toy"]["T"].items()}
HAS_MECAB = importlib.util.find_spec("mecab_ko") is not None
Args = dict[str, Any]


class Words(Tokenizer):
    """Lets ``rouge_score`` use a function as its tokenizer."""

    def __init__(self, cut: Callable[[str], list[str]]) -> None:
        self.cut = cut

    def tokenize(self, text: str) -> list[str]:
        return self.cut(text)


def folded(text: str) -> str:
    return unicodedata.normalize("NFC", text).lower()


TOKENIZERS = {
    "default": None,
    "char": Words(lambda text: list(without_spaces(folded(text)))),
    "eojeol": Words(lambda text: folded(text).split()),
    "mixed/1": Words(mixed_tokens),
}


def rouge_oracle(ref: str, hyp: str, tokenizer: str = "mixed/1") -> float:
    return RougeScorer(["rougeL"], tokenizer=TOKENIZERS[tokenizer]).score(ref, hyp)["rougeL"].fmeasure


def korquad_oracle(ref: str, hyp: str) -> list[float]:
    """KorQuAD v1.0 as published, step by step."""

    def cleaned(text: str) -> str:
        for char in "'\"《》<>〈〉()‘’":
            text = text.replace(char, " ")
        return " ".join("".join(char for char in text.lower() if char not in string.punctuation).split())

    r, h = cleaned(ref), cleaned(hyp)
    shared = sum((Counter(without_spaces(r)) & Counter(without_spaces(h))).values())
    total = len(without_spaces(r)) + len(without_spaces(h))
    return [r == h, 2 * shared / total if shared else 0.0]


def prepared(args: Args) -> tuple[str, str]:
    rule: Callable[[str], str] = {
        None: lambda text: text,
        "nfc": lambda text: unicodedata.normalize("NFC", text),
        "nospace": without_spaces,
        "ko-std/1 nospace": lambda text: without_spaces(normalize(text)),
    }[args.get("prep")]
    return rule(args["ref"]), rule(args["hyp"])


def jiwer_cer(args: Args) -> float:
    many = isinstance(args["ref"], list)
    return jiwer.cer(args["ref"], args["hyp"]) if many else jiwer.cer(*prepared(args))


def jiwer_edits(args: Args) -> list[float]:
    out = jiwer.process_characters(args["ref"], args["hyp"])
    return [out.substitutions, out.deletions, out.insertions, out.hits, out.cer]


def each(score: Callable[[str, str], Any], args: Args) -> Any:
    """``score`` of a pair, or of each pair of two lists."""
    ref, hyp = args["ref"], args["hyp"]
    return list(map(score, ref, hyp)) if isinstance(ref, list) else score(ref, hyp)


def bleu_oracle(args: Args) -> float:
    return BLEU(tokenize=args["tokenize"]).corpus_score([args["hyp"]], [[args["ref"]]]).score


def sentence_bleu(args: Args) -> float:
    return (
        BLEU(tokenize=args["tokenize"], effective_order=True).sentence_score(args["hyp"], [args["ref"]]).score
    )


def chrf(args: Args, word_order: int) -> float:
    return CHRF(word_order=word_order).corpus_score([args["hyp"]], [[args["ref"]]]).score


def aggregates_oracle(args: Args) -> list[float]:
    s, n = args["scores"], args["n"]
    weighted = sum(a * b for a, b in zip(s, n, strict=True)) / sum(n)
    return [
        fmean(s),
        weighted,
        min(s) / max(s),
        sum(s) ** 2 / len(s) / sum(x * x for x in s),
        max(s) - min(s),
    ]


def toy_blocks(args: Args) -> Any:
    """Labels of the toy set's clusters, None for utterances."""
    return TOY["speaker"] if args["unit"] == "speaker" else None


def sign_flip_oracle(args: Args) -> float:
    """Every sign vector, in integers."""
    change, blocks = TOY["err_a"] - TOY["err_b"], toy_blocks(args)
    if blocks is not None:
        change = np.array([change[blocks == block].sum() for block in np.unique(blocks)])
    signs = np.array(list(itertools.product((1, -1), repeat=len(change))))
    return float(np.mean(np.abs(signs @ change) >= abs(change.sum())))


def mapsswe_oracle(args: Args) -> list[float]:
    change = [float(a - b) for a, b in zip(TOY["err_a"], TOY["err_b"], strict=True)]
    z = fmean(change) / (stdev(change) / math.sqrt(len(change)))
    return [z, 2 * NormalDist().cdf(-abs(z))]


def bootstrap_oracle(args: Args) -> list[float]:
    """The golden case's own words: one draw of all indices, nothing counted or cut into chunks."""
    n = len(TOY["ref_len"])
    drawn = np.random.default_rng(args["seed"]).integers(0, n, (args["trials"], n))
    rates = (TOY["err_a"] - TOY["err_b"])[drawn].sum(axis=1) / TOY["ref_len"][drawn].sum(axis=1)
    return [*np.percentile(rates, [2.5, 97.5]), np.mean(rates > 0)]


def holm_oracle(args: Args) -> list[float]:
    """Adjusted p of each = the largest (m - j) p_j among those that are not larger than it."""
    order = sorted(args["p"])
    scaled = [min(1.0, (len(order) - rank) * p) for rank, p in enumerate(order)]
    return [max(scaled[: order.index(p) + 1]) for p in args["p"]]


def rates_of(*errors: Any) -> list[float]:
    return [float(values.sum() / TOY["ref_len"].sum()) for values in errors]


def transfer_oracle(args: Args) -> list[float]:
    pairs = zip(args["single"], args["multi"], args["lower_is_better"], strict=True)
    each = [(-1) ** lower * (multi - single) / single for single, multi, lower in pairs]
    return [*each, fmean(each)]


ORACLES: dict[str, Callable[[Args], Any]] = {
    "corpus_rates": lambda a: rates_of(TOY["err_a"], TOY["err_b"], TOY["err_a"] - TOY["err_b"]),
    "sign_flip_exact": sign_flip_oracle,
    "mapsswe": mapsswe_oracle,
    "mcnemar_exact": lambda a: (
        2
        * sum(math.comb(a["b"] + a["c"], k) for k in range(min(a["b"], a["c"]) + 1))
        / 2 ** (a["b"] + a["c"])
    ),
    "paired_bootstrap": bootstrap_oracle,
    "holm": holm_oracle,
    "delta_m": transfer_oracle,
    "jiwer_cer": jiwer_cer,
    "jiwer_wer": lambda a: jiwer.wer(a["ref"], a["hyp"]),
    "jiwer_wer_and_cer": lambda a: [jiwer.wer(a["ref"], a["hyp"]), jiwer.cer(a["ref"], a["hyp"])],
    "mean_of_jiwer_cer": lambda a: fmean(map(jiwer.cer, a["ref"], a["hyp"])),
    "jiwer_cer_and_rapidfuzz_rate": lambda a: [
        jiwer.cer(a["ref"], a["hyp"]),
        Levenshtein.distance(a["ref"], a["hyp"]) / len(a["ref"]),
    ],
    "jiwer_character_edits": jiwer_edits,
    "jiwer_cer_without_and_with_first_repeated": lambda a: [
        jiwer.cer(a["ref"], a["hyp"]),
        jiwer.cer(a["ref"] + a["ref"][:1], a["hyp"] + a["hyp"][:1]),
    ],
    "rouge_l_f": lambda a: each(lambda ref, hyp: rouge_oracle(ref, hyp, a["tokenizer"]), a),
    "lcs_f_nospace": lambda a: (
        2
        * LCSseq.similarity(without_spaces(a["ref"]), without_spaces(a["hyp"]))
        / len(without_spaces(a["ref"] + a["hyp"]))
    ),
    "korquad_em_and_f1": lambda a: korquad_oracle(a["ref"], a["hyp"]),
    "bleu_corpus": bleu_oracle,
    "bleu_corpus_and_sentence_effective_order": lambda a: [bleu_oracle(a), sentence_bleu(a)],
    "chrf2_and_chrfpp": lambda a: [chrf(a, 0), chrf(a, 2)],
    "compression_ratio": lambda a: len(a["text"].encode()) / len(zlib.compress(a["text"].encode())),
    "nfkc_length": lambda a: len(unicodedata.normalize("NFKC", a["text"])),
    "swer": lambda a: jiwer.wer(a["ref"], a["hyp_respaced"]),
    "aggregates": aggregates_oracle,
}


def our_rates(args: Args, *names: str) -> Any:
    refs, hyps = ([text] if isinstance(text, str) else text for text in (args["ref"], args["hyp"]))
    rates = [score_asr(refs, hyps)[name] for name in names]
    return rates if len(rates) > 1 else rates[0]


def our_edits(args: Args) -> list[float]:
    row = sample_asr(args["ref"], args["hyp"])
    return [row["S"], row["D"], row["I"], row["ref_len"] - row["S"] - row["D"], row["cer"]]


def our_korquad(args: Args) -> list[float]:
    row = sample_qa([args["ref"]], args["hyp"])
    return [bool(row["korquad_em"]), row["korquad_f1"]]


def our_bleu(args: Args) -> Any:
    return corpus_bleu([[args["ref"]]], [args["hyp"]], args["tokenize"])["bleu"]


def our_swer(args: Args) -> Any:
    assert respace(args["ref"], args["hyp"]) == args["hyp_respaced"]
    return our_rates(args, "swer")


def our_aggregates(args: Args) -> list[float]:
    scores, sizes = args["scores"], args["n"]
    result = aggregate(
        {
            "asr": {"n": sizes[0], "cer": 1 - scores[0]},
            "sqa": {"n": sizes[1], "rouge_l_f1": scores[1]},
            "tqa": {"n": sizes[2], "rouge_l_f1": scores[2]},
        }
    )
    return [result[key] for key in ("macro", "weighted", "balance", "jain", "gap")]


def our_paired(clusters: Any = None, **settings: int) -> significance.Paired:
    errors = TOY["err_a"], TOY["err_b"], TOY["ref_len"]
    return significance.paired(*errors, clusters, lower_is_better=True, **settings)


def our_rates_of_toy(args: Args) -> list[float]:
    nothing = np.zeros_like(TOY["err_a"])
    pairs = ((TOY["err_a"], nothing), (TOY["err_b"], nothing), (TOY["err_a"], TOY["err_b"]))
    return [
        significance.paired(*pair, TOY["ref_len"], lower_is_better=True, trials=2).difference
        for pair in pairs
    ]


def our_bootstrap(args: Args) -> list[float]:
    result = our_paired(trials=args["trials"], seed=args["seed"])
    return [result.low, result.high, result.probability_of_improvement]


def our_transfer(args: Args) -> list[float]:
    each = [
        relative_change(*cell)
        for cell in zip(args["multi"], args["single"], args["lower_is_better"], strict=True)
    ]
    return [*each, fmean(each)]


OURS: dict[str, Callable[[Args], Any]] = {
    "corpus_rates": our_rates_of_toy,
    "sign_flip_exact": lambda a: our_paired(toy_blocks(a)).p_value,
    "mapsswe": lambda a: significance.mapsswe(TOY["err_a"], TOY["err_b"]),
    "mcnemar_exact": lambda a: significance.mcnemar_exact(a["b"], a["c"]),
    "paired_bootstrap": our_bootstrap,
    "holm": lambda a: significance.holm(a["p"]),
    "delta_m": our_transfer,
    "chrf2_and_chrfpp": lambda a: [corpus_chrf([[a["ref"]]], [a["hyp"]])["chrf"], None],
    "jiwer_cer": lambda a: our_rates(a, "cer" if "nospace" in a.get("prep", "") else "cer_spaced"),
    "jiwer_wer": lambda a: our_rates(a, "wer"),
    "jiwer_wer_and_cer": lambda a: our_rates(a, "wer", "cer_spaced"),
    "mean_of_jiwer_cer": lambda a: fmean(
        sample_asr(*pair)["cer"] for pair in zip(a["ref"], a["hyp"], strict=True)
    ),
    "jiwer_cer_and_rapidfuzz_rate": lambda a: our_rates(a, "cer_spaced"),
    "jiwer_character_edits": our_edits,
    "jiwer_cer_without_and_with_first_repeated": lambda a: [
        our_rates(a, "cer"),
        our_rates({key: texts + texts[:1] for key, texts in a.items()}, "cer"),
    ],
    "rouge_l_f": lambda a: each(rouge_l_f1, a),
    "lcs_f_nospace": lambda a: rouge_l_f1(a["ref"], a["hyp"]),
    "korquad_em_and_f1": our_korquad,
    "bleu_corpus": our_bleu,
    "bleu_corpus_and_sentence_effective_order": our_bleu,
    "compression_ratio": lambda a: compression_ratio(a["text"]),
    "nfkc_length": lambda a: len(normalize(a["text"])),
    "swer": our_swer,
    "aggregates": our_aggregates,
}

# Where the case records what a library does with raw text, an edge or another tokenizer: our value for it.
DEVIATIONS: dict[str, Any] = {
    "G02": 0.2,  # syllables are counted, however they are composed
    "G03": 0.0,
    "G11": [None, None],  # a corpus without reference text has no rate
    "G12": None,
    "G13": None,
    "G15": 1 / 3,
    "G18": 2 / 3,  # the blank before a hypothesis goes
    "G20": 1.0,  # mixed/1 in place of the case's tokenizer
    "G22": 0.875,
    "G23": 0.7,
    "G24": 0.7,
    "G26": 0.571429,
    "G27": [1.0, 0.0, 0.0],  # nothing for nothing is right
    "G31": [True, 1.0],
    "G37": None,  # too short for BLEU
    "G38": None,
    "G39": [64.47741, None],  # chrF2 is reported, chrF++ is not
    "G45": 3,  # jamo that stand alone stay
    "G70": 0.0,  # every kind of blank parts words
    "G71": 0.0,
    "G72": 0.0,
}
# mixed/1 is ours, and so is its case of two texts without a token.
LIBRARY: dict[str, Any] = {"G52": 0.0}

NO_MECAB = pytest.mark.skipif(not HAS_MECAB, reason="sacrebleu[ko] is not installed")
ALL_CASES = [pytest.param(name, marks=[NO_MECAB] if name == "G36" else []) for name in CASES]


def assert_close(actual: Any, expected: Any, case: Args) -> None:
    tolerance = 5e-5 if case["fn"] == "compression_ratio" else GOLDEN["tolerance"]
    pairs = list(zip(actual, expected, strict=True)) if isinstance(expected, list) else [(actual, expected)]
    for got, wanted in pairs:
        assert got == wanted if wanted is None else got == pytest.approx(wanted, abs=tolerance)


@pytest.mark.parametrize("name", ALL_CASES)
def test_the_library_gives_the_golden_value(name: str) -> None:
    case = CASES[name]
    assert_close(ORACLES[case["fn"]](case["args"]), LIBRARY.get(name, case["expected"]), case)


@pytest.mark.parametrize("name", ALL_CASES)
def test_ours_gives_the_golden_value_or_the_stated_other(name: str) -> None:
    case = CASES[name]
    assert_close(OURS[case["fn"]](case["args"]), DEVIATIONS.get(name, case["expected"]), case)


def test_no_case_is_left_out() -> None:
    assert len(CASES) == 82 and {*DEVIATIONS, *LIBRARY} < {*CASES}
