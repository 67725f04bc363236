"""The nodes' names and tooltips in other languages. In tests/, with a ComfyUI running that has this pack:

    python -m host.locales http://127.0.0.1:8188

writes locales/*/nodeDefs.json from translations.json, which has each English text once; test_locales.py compares.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from host.schemas import object_info
from host.workflows import ROOT, specs_of

TABLE = Path(__file__).with_name("translations.json")
LANGUAGES = ("zh", "zh-TW", "ja", "ko")


def translations() -> dict[str, dict[str, str]]:
    """Of each English text, one translation for each language."""
    return json.loads(TABLE.read_text(encoding="utf-8"))


def path_of(language: str) -> Path:
    """Where the host looks for a language's nodes."""
    return ROOT / "locales" / language / "nodeDefs.json"


def node_defs(kinds: dict[str, Any]) -> dict[str, Any]:
    """What the frontend shows of each node, in English, in the form of nodeDefs.json."""
    return {
        node: {
            "display_name": kind["display_name"],
            "description": kind["description"],
            "inputs": {name: {"name": name, "tooltip": spec[1]["tooltip"]} for name, spec in specs_of(kind).items()},
            "outputs": {
                str(slot): {"name": name, "tooltip": tooltip}
                for slot, (name, tooltip) in enumerate(zip(kind["output_name"], kind["output_tooltips"], strict=True))
            },
        }
        for node, kind in kinds.items()
    }


def texts(tree: dict[str, Any]) -> list[str]:
    """Every text in a tree of dicts, once, in their order."""
    parts = (texts(value) if isinstance(value, dict) else [value] for value in tree.values())
    return list(dict.fromkeys(text for part in parts for text in part))


def translated(tree: dict[str, Any], words: dict[str, str]) -> dict[str, Any]:
    return {key: translated(v, words) if isinstance(v, dict) else words[v] for key, v in tree.items()}


def files(kinds: dict[str, Any]) -> dict[Path, str]:
    """Every language's file. Raises ValueError naming the texts that lack a translation, and those no node has."""
    english, table = node_defs(kinds), translations()
    node_texts = texts(english)
    lines = [f"{text!r} is on no node any more" for text in table if text not in node_texts]
    for text in node_texts:
        if missing := [lang for lang in LANGUAGES if lang not in table.get(text, {})]:
            lines.append(f"{text!r} has no {', '.join(missing)}")
    if lines:
        raise ValueError(f"{TABLE} is not up to date:\n" + "\n".join(lines))
    return {
        path_of(lang): json.dumps(
            translated(english, {text: row[lang] for text, row in table.items()}), ensure_ascii=False, indent=2
        )
        + "\n"
        for lang in LANGUAGES
    }


if __name__ == "__main__":
    try:
        written = files(object_info(sys.argv[1]))
    except ValueError as problem:
        sys.exit(str(problem))
    for path, text in written.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
