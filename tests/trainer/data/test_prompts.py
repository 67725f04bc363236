"""The prompt list that ships with the pack."""

from phased_consistency.trainer.data.prompts import PROMPTS, read_prompts


def test_the_list_is_long_and_has_no_repeats():
    prompts = read_prompts(None)
    assert len(prompts) >= 300
    assert len({p.lower() for p in prompts}) == len(prompts)


def test_every_prompt_fits_the_text_encoder():
    assert max(len(p.split()) for p in read_prompts(None)) <= 77


def test_the_file_is_tidy():
    text = PROMPTS.read_text(encoding="utf-8")
    lines = text.splitlines()
    assert all(line == line.strip() and line for line in lines)
    assert text.endswith("\n") and "\r" not in text and "\t" not in text
    assert lines[0].startswith("#") and not any(line.startswith("#") for line in lines[1:])
