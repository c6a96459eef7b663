from corral.retrieval.passages import Passage


def test_a_passage_survives_json_and_its_digest_depends_on_its_place() -> None:
    passage = Passage("faq.html", "FAQ", ("Basics", "What is it?"), "A system.", 120, 3)
    assert Passage.from_json(passage.to_json()) == passage
    moved = Passage("faq.html", "FAQ", ("Basics", "What is it?"), "A system.", 121, 3)
    assert passage.digest == Passage.from_json(passage.to_json()).digest != moved.digest


def test_a_title_that_is_also_the_first_heading_is_named_once() -> None:
    assert Passage("a.md", "FAQ", ("FAQ", "Basics"), "x", 0).heading_path == "FAQ › Basics"
