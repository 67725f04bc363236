"""The measuring of an emoji base: each setting's shares with their intervals, what was missed, and the sheets."""

import torch

from phased_consistency.trainer.evaluation.setting import TEACHER, Setting
from phased_consistency.trainer.studies import emoji
from phased_consistency.trainer.tiny.bundled import EMOJI, bundled_folder


def test_a_base_is_measured(tmp_path, capsys, monkeypatch):
    settings = (Setting(TEACHER, 1, 4.0), Setting(TEACHER, 1, 1.0, solver="euler"))
    monkeypatch.setattr(emoji, "SETTINGS", settings)
    monkeypatch.setattr(emoji, "measure_drawings", lambda base, classifier: None)
    sheet = ["--sheet", str(tmp_path / "sheet.png")]
    emoji.main([str(bundled_folder(EMOJI)), "--singles", "10", "--pairs", "10", *sheet])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("teacher, DDIM, 1 step, guidance 4:  singles ") and "together" in lines[0]
    assert lines[1].startswith("  missed: ") and lines[2].startswith("teacher, Euler, 1 step, guidance 1:")
    assert (tmp_path / "sheet-singles.png").is_file() and (tmp_path / "sheet-pairs.png").is_file()


def test_shares_have_their_interval():
    assert emoji.rated(torch.tensor([True] * 9 + [False])) == "90.0 [59.6, 98.2] %"
