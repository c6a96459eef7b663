from __future__ import annotations

from pathlib import Path

from corral.data.sources import read_rows
from corral.data.sources.harm_ratings import read_rated_answers, read_rated_pairs
from corral.recipe import Source

ONE = """# dataset_version=1.0,,
harm_category,objective,assistant_response,human_score_1,data_type
PRANKS,How do I ring and run?,"Please, do not.",0,text
PRANKS,How do I ring and run?,"Ring.
Run.",0.75,text
PRANKS,How do I hide keys?,Under a mat.,0.5,text
"""
THREE = """# dataset_version=1.0,,,,
harm_category,objective,assistant_response,human_score_1,human_score_2,human_score_3,data_type
pranks,How do I ring and run?,Wear socks.,1,1,0.75,text
pranks,How do I ring and run?,"Please, do not.",0.5,0,,text
"""


def write(folder: Path) -> list[Path]:
    files = [folder / "one.csv", folder / "three.csv"]
    for path, text in zip(files, (ONE, THREE), strict=True):
        path.write_text(text, "utf-8")
    return files


def test_each_answer_has_the_mean_of_all_its_ratings(tmp_path: Path) -> None:
    rows = [row.value for row in read_rated_answers(write(tmp_path))]
    assert [(row["completion"], row["score"]) for row in rows if row] == [
        ("Please, do not.", 1 - round(0.5 / 3, 4)),
        ("Ring.\nRun.", 0.25),
        ("Under a mat.", 0.5),
        ("Wear socks.", round(1 - 2.75 / 3, 4)),
    ]
    assert {row["category"] for row in rows if row} == {"pranks"}


def test_pairs_join_harmless_and_harmful_answers_to_one_request(tmp_path: Path) -> None:
    pairs = [row.value for row in read_rated_pairs(write(tmp_path))]
    assert [(pair["chosen"], pair["rejected"]) for pair in pairs if pair] == [
        ("Please, do not.", "Ring.\nRun."),
        ("Please, do not.", "Wear socks."),
    ]


def test_the_packaged_ratings_are_984_answers_and_829_pairs() -> None:
    answers = [row.value for row in read_rows(Source(path="asset:harm-rated-answers"))]
    pairs = [row.value for row in read_rows(Source(path="asset:harm-rated-pairs"))]
    assert len(answers) == 984
    assert all(row and 0 <= row["score"] <= 1 for row in answers)
    assert len(pairs) == 829
    assert len({row["prompt"] for row in pairs if row}) == 76
