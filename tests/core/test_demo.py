from grating_core.demo import QUESTION, first_stage, load_passages


def test_passages_are_distinct_and_of_a_size() -> None:
    passages = load_passages()
    assert len(passages) == len(set(passages)) > 300
    lengths = sorted(len(passage.split()) for passage in passages)
    assert 100 <= lengths[len(lengths) // 2] <= 250


def test_first_stage_finds_passages_about_the_question() -> None:
    found = first_stage(QUESTION, load_passages(), 20)
    assert len(found) == 20
    assert any("finally" in passage for passage in found)


def test_first_stage_takes_what_there_is() -> None:
    assert sorted(first_stage("a cat", ["a cat", "a dog"], 50)) == ["a cat", "a dog"]
