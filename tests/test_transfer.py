"""Transfer between arms, forgetting and leave-one-out: signs, what counts as interference, what the page shows."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from evaluations import record, result

from voxtral_dist.comparison import compare, write_page
from voxtral_dist.errors import UserError
from voxtral_dist.predictions import EvalResult
from voxtral_dist.transfer import forgetting, leave_one_out, relative_change, transfer_matrix


def arm(
    name: str, edits: int, asked: int, answered: int | None = None, n: int = 100, **fields: Any
) -> EvalResult:
    """Of n transcripts of ten characters each has that many edits in ten samples; that many answers are right."""
    answered = asked if answered is None else answered
    said = ["가" * (10 - edits) + "나" * edits if k % 10 == 0 else "가" * 10 for k in range(n)]
    rows = [record("asr", k, "가" * 10, said[k], **fields) for k in range(n)]
    for task, right in (("sqa", asked), ("tqa", answered)):
        rows += [record(task, k, "역", "역" if k < right else "항", **fields) for k in range(n)]
    return result(name, rows)


def row_of(matrix: dict[str, Any], name: str) -> dict[str, Any]:
    return next(row for row in matrix["rows"] if row["name"] == name)


def test_relative_change_has_the_reference_values() -> None:
    """T and delta_m of CER .10 -> .08, SQA .70 -> .72, TQA .82 -> .80 (Maninis et al. 2019)."""
    changes = [
        relative_change(*pair) for pair in ((0.08, 0.10, True), (0.72, 0.70, False), (0.80, 0.82, False))
    ]
    assert changes == pytest.approx([0.2, 0.028571, -0.02439], abs=1e-6)
    assert relative_change(0.1, 0.0, True) is None and relative_change(None, 0.1, True) is None


def test_matrix_compares_each_task_with_the_arm_trained_on_it_alone() -> None:
    """The numbers of the reference case: CER .10 -> .08, SQA .70 -> .72, TQA .82 -> .80."""
    singles = {"asr": arm("s", 10, 0), "sqa": arm("s", 0, 70), "tqa": arm("s", 0, 0, 82)}
    matrix = transfer_matrix(arm("base", 5, 35, 41), singles, {"all": arm("x", 8, 72, 80)}, trials=999)
    assert [row["name"] for row in matrix["rows"]] == [
        "base model",
        "asr only",
        "sqa only",
        "tqa only",
        "all",
    ]
    assert matrix["tasks"] == ["asr", "sqa", "tqa"]
    cells = row_of(matrix, "all")["cells"]
    assert [cells[task]["transfer"] for task in matrix["tasks"]] == pytest.approx(
        [0.2, 0.028571, -0.02439], abs=1e-6
    )
    assert row_of(matrix, "all")["delta_m"] == pytest.approx(0.06806, abs=1e-5)
    assert [cells[task]["value"] for task in matrix["tasks"]] == pytest.approx([0.08, 0.72, 0.80])
    assert [cells[task]["over_base"] for task in matrix["tasks"]] == pytest.approx([-0.6, 37 / 35, 39 / 41])
    assert row_of(matrix, "asr only")["cells"]["asr"]["transfer"] == 0.0
    assert (
        row_of(matrix, "asr only")["delta_m"] is None
        and row_of(matrix, "base model")["cells"]["asr"]["test"] is None
    )


def test_interference_is_said_only_of_significant_losses() -> None:
    singles = {"asr": arm("s", 2, 0), "sqa": arm("s", 0, 80), "tqa": arm("s", 0, 0, 80)}
    mixtures = {"mild": arm("m", 2, 78, 80), "harsh": arm("h", 9, 40, 99)}
    matrix = transfer_matrix(None, singles, mixtures, trials=999)
    mild, harsh = (row_of(matrix, name)["cells"] for name in ("mild", "harsh"))
    assert mild["sqa"]["transfer"] < 0 and mild["sqa"]["test"]["verdict"] == "no difference shown"
    assert not any(cell["interference"] for cell in mild.values())
    assert {task: cell["interference"] for task, cell in harsh.items()} == {
        "asr": True,
        "sqa": True,
        "tqa": False,
    }
    assert harsh["tqa"]["test"]["verdict"] == "better" and harsh["asr"]["transfer"] == pytest.approx(-3.5)
    tests = [cell["test"] for cells in (mild, harsh) for cell in cells.values()]
    lowest = min(tests, key=lambda test: test["p"])
    assert lowest["p_holm"] == pytest.approx(6 * lowest["p"]), "all six tests are corrected together"


def test_what_has_no_single_arm_has_no_transfer() -> None:
    matrix = transfer_matrix(None, {"sqa": arm("s", 0, 80)}, {"all": arm("m", 2, 78)}, trials=99)
    row = row_of(matrix, "all")
    assert (
        row["cells"]["asr"]["transfer"] is None
        and row["cells"]["asr"]["test"] is None
        and row["delta_m"] is None
    )
    assert not row["cells"]["asr"]["interference"] and row["cells"]["sqa"]["transfer"] == pytest.approx(
        -0.025
    )
    perfect = transfer_matrix(None, {"asr": arm("s", 0, 0)}, {"all": arm("m", 2, 0)}, trials=99)
    assert row_of(perfect, "all")["cells"]["asr"]["transfer"] is None, "a rate of 0 cannot be divided by"
    with pytest.raises(UserError, match="m lacks 1 sample"):
        other = arm("m", 2, 78)
        transfer_matrix(None, {"sqa": arm("s", 0, 80)}, {"all": replace(other, records=other.records[1:])})


def test_forgetting_is_a_loss_whatever_the_metric() -> None:
    lost = forgetting(arm("base", 1, 90, 50), arm("tuned", 8, 50, 52), trials=999)
    assert (lost["base"], lost["tuned"]) == ("base", "tuned")
    asr, sqa, tqa = lost["rows"]
    assert asr["forgetting"] == pytest.approx(0.07) and sqa["forgetting"] == pytest.approx(0.4)
    assert tqa["forgetting"] == pytest.approx(-0.02) and tqa["verdict"] == "no difference shown"
    assert asr["verdict"] == sqa["verdict"] == "worse"
    for row in lost["rows"]:
        assert row["forgetting_low"] <= row["forgetting"] <= row["forgetting_high"]
    assert sqa["forgetting_low"] > 0.25


def two_domains(name: str, news_right: int, talk_right: int) -> EvalResult:
    """40 answers in each of two domains."""
    rows = [record("sqa", k, "역", "역" if k < news_right else "항", domain="news") for k in range(40)]
    rows += [record("sqa", 40 + k, "역", "역" if k < talk_right else "항", domain="talk") for k in range(40)]
    return result(name, rows)


def test_leave_one_out_scores_each_value_with_and_without() -> None:
    full = two_domains("full", 36, 30)
    table = leave_one_out(
        full, {"news": two_domains("no news", 12, 31), "talk": two_domains("no talk", 36, 29)}, trials=999
    )
    news, talk = table["rows"]
    assert (table["field"], table["full"], news["value"], talk["value"]) == ("domain", "full", "news", "talk")
    assert (news["a"], news["b"], news["difference"]) == pytest.approx((0.3, 0.9, 0.6))
    assert news["n"] == 40 and 0.4 < news["low"] < 0.6 < news["high"] and news["verdict"] == "better"
    assert talk["difference"] == pytest.approx(0.025) and talk["verdict"] == "no difference shown"


def test_leave_one_out_of_languages_and_what_is_not_there() -> None:
    full = arm("full", 0, 90, language="fr")
    (row, *_) = leave_one_out(full, {"fr": arm("no fr", 5, 40, language="fr")}, "language", trials=99)["rows"]
    assert row["task"] == "asr" and row["value"] == "fr" and row["verdict"] == "better"
    with pytest.raises(UserError, match="no sample of full has the domain 'sport'"):
        leave_one_out(full, {"sport": full})
    with pytest.raises(UserError, match="no fr lacks 300 samples"):
        leave_one_out(full, {"fr": replace(full, name="no fr", records=full.records[:0])}, "language")


def test_page_shows_the_sections_of_an_experiment(tmp_path: Path) -> None:
    singles = {"asr": arm("s", 2, 0), "sqa": arm("s", 0, 80)}
    mixed = replace(two_domains("full", 36, 30))
    extra = {
        "transfer": transfer_matrix(None, singles, {"mixed": arm("h", 9, 40)}, trials=499),
        "forgetting": {"mixed": forgetting(arm("base", 1, 90), arm("tuned", 8, 50), trials=499)},
        "leave_one_out": leave_one_out(mixed, {"news": two_domains("no news", 12, 31)}, trials=499),
        "arms": {
            "asr only": {"tasks": "asr"},
            "mixed": {"tasks": "asr,sqa", "train_shards": "/data/secret/shards"},
        },
        "seeds": {"mixed": {"asr cer": {"0": 0.0123, "1": 0.0456}}, "asr only": {"asr cer": {"0": 0.0789}}},
    }
    write_page(compare(list(singles.values()), trials=999), tmp_path / "comparison.html", extra=extra)
    html = (tmp_path / "comparison.html").read_text("utf-8")
    assert (
        "Transfer between tasks" in html
        and '<span class="bad">interference</span>' in html
        and "-3.5000" in html
    )
    assert "does not predict how well a model generalises" in html, "the caution stands beside it"
    assert "Forgetting on the guard set" in html and "+0.4000" in html
    assert "Trained without a domain, then with it" in html and "0.3000" in html and "+0.6000" in html
    assert "asr,sqa" in html and "shards" in html and "secret" not in html
    assert "seed 1" in html and "0.0456" in html
    stored = json.loads((tmp_path / "comparison.json").read_text("utf-8"))
    assert stored["transfer"] == json.loads(json.dumps(extra["transfer"])) and "secret" not in str(stored)
