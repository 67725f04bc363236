"""`pcm panels`: one page of what other programs show of a LoRA file, by the fields that they document.

A1111 and Forge, ComfyUI Lora-Manager, ComfyUI's own model library (src/stores/modelStore.ts of its front
end), and ModelSpec's readers (https://github.com/Stability-AI/ModelSpec). Each line says which field it comes
from.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from ...samplers.families import family_title
from ...samplers.lora_file import file_hash, header_text, read_header, tensor_hash
from ...samplers.writing import MOST_HEADER
from ..lora.hashes import EMPTY_HASH
from ..system import pages
from .pairs import MUST
from .sidecars import A1111_VERSIONS, UNKNOWN, open_picture

TEMPLATE = Path(__file__).parent / "panels.html"
SIDE, QUALITY = 512, 88  # a preview's side on the page, in pixels, and its quality as a JPEG
MOST_TAGS = 12  # of the training, that are listed
DATA_URL = re.compile(r"data:image/(png|jpeg|webp|gif);base64,[A-Za-z0-9+/]+={0,2}")
# ends of a preview's name, in the order in which each program looks for them
A1111_PREVIEWS = (".preview.png", ".preview.jpg", ".preview.webp", ".png", ".webp", ".jpg")
# header entries -> what A1111's dialog calls them
A1111_TABLE = {
    "ss_sd_model_name": "Model",
    "ss_resolution": "Resolution",
    "ss_clip_skip": "Clip skip",
    "ss_num_train_images": "Pictures",
    "ss_network_module": "Module",
}
LORA_MANAGER_PREVIEWS = (".webp", ".preview.webp", ".preview.png", ".preview.jpeg", ".preview.jpg", ".png")
COMFYUI_PREVIEWS = tuple(f"{part}{kind}" for kind in (".png", ".jpg", ".jpeg", ".webp") for part in ("", ".preview"))
# what Lora-Manager looks for in `ss_base_model_version` -> its label; it shows other texts as they are
LORA_MANAGER_MODELS = {"sd_1.5": "SD 1.5", "sdxl": "SDXL 1.0", "pony": "Pony", "illustrious": "Illustrious"}
LORA_MANAGER_REQUIRED = ("file_name", "model_name", "file_path", "size", "modified", "sha256")
LORA_MANAGER_REQUIRED += ("base_model", "preview_url")
ARCHITECTURES = tuple(
    f"stable-diffusion-{name}/lora" for name in ("v1", "xl-v1-base", "v3-medium", "v3.5-medium", "v3.5-large")
)
# ComfyUI's front end takes the first of these that is there, or any entry whose name ends so
LIBRARY = {
    "Title": ("modelspec.title", "title", "display_name", "name"),
    "Architecture": ("modelspec.architecture", "architecture"),
    "Author": ("modelspec.author", "author"),
    "Usage hint": ("modelspec.usage_hint", "usage_hint"),
    "Trigger phrase": ("modelspec.trigger_phrase", "trigger_phrase"),
    "Description": ("modelspec.description", "description"),
    "Picture": ("modelspec.thumbnail", "thumbnail", "image", "icon"),
    "Tags": ("modelspec.tags", "tags"),
    "Resolution": ("modelspec.resolution", "resolution"),
}
SEARCHED = {"Tags": "found by search, not shown", "Resolution": "read, not shown"}


@dataclass(frozen=True)
class Line:
    """One thing that a program shows.

    value: the text, "" where it has nothing to show. source: the field that it comes from. on_card: whether
    it is seen at once, and not in a dialog or by search alone.
    """

    label: str
    value: str
    source: str
    on_card: bool = False


@dataclass
class Panel:
    """All that one program shows of a LoRA, as a card and its lines.

    where: the place in the program. picture: a data URL, "" for none. problems: sentences on what is missing
    or wrong, and the remedy. shown: whether the program shows a panel at all.
    """

    program: str
    where: str
    title: str
    badge: str = ""
    picture: str = ""
    lines: list[Line] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    shown: bool = True

    def add(self, label: str, value: Any, source: str, on_card: bool = False) -> None:
        """Add a line; a value of None is nothing to show."""
        self.lines.append(Line(label, "" if value is None else str(value), source, on_card))


@dataclass(frozen=True)
class Seen:
    """A LoRA file as other programs see it, with what lies beside it.

    metadata: the header's entries. header_bytes: length of the header. sha256: hash of the file. tensors:
    hash of its tensors, which the header's own should equal.
    """

    path: Path
    metadata: dict[str, str]
    header_bytes: int
    family: str | None
    sha256: str
    tensors: str

    @classmethod
    def of(cls, file: Path) -> Seen:
        """Read a file. Raises as `read_header`, or ValueError for a file that holds no LoRA."""
        header = read_header(file)
        file = header.path
        return cls(file, header.metadata, len(header_text(file)), header.family, file_hash(file), tensor_hash(file))

    def get(self, key: str) -> str:
        """A header entry, "" where there is none."""
        return self.metadata.get(key, "")

    @property
    def stored_hash(self) -> str:
        """The tensors' SHA-256 as the header has it, whose beginning sites call AutoV3."""
        return self.get("sshs_model_hash") or self.get("modelspec.hash_sha256").removeprefix("0x")

    def beside(self, suffix: str, problems: list[str]) -> dict[str, Any]:
        """The fields of the sidecar with this end; {}, and one more of `problems`, where it cannot be read."""
        path = self.path.with_suffix(suffix)
        if not path.is_file():
            problems.append(f"No {path.name}: pcm sidecars writes it.")
            return {}
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(fields, dict):
                raise ValueError("it is no JSON object")
        except (ValueError, RecursionError) as error:
            problems.append(f"{path.name} cannot be read ({error}). Write it again: pcm sidecars --overwrite.")
            return {}
        return fields

    def preview(self, suffixes: Sequence[str]) -> Path | None:
        """The first picture beside the file with one of these ends; None where there is none."""
        return next((p for suffix in suffixes if (p := self.path.with_suffix(suffix)).is_file()), None)


def panels(file: Path) -> list[Panel]:
    """A panel for each program. Raises as `read_header`, or ValueError for a file that holds no LoRA."""
    seen = Seen.of(file)
    return [_a1111(seen), _lora_manager(seen), _comfyui(seen), _modelspec(seen)]


def write_page(file: Path, out: Path, overwrite: bool = False) -> dict[str, Any]:
    """Write `panels` as one HTML page that needs no other file.

    Raises ValueError for a page that exists and as `panels`, OSError where it cannot be written.
    """
    if out.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"--out is {out.name}; its name must end in .html.")
    if out.exists() and not overwrite:
        raise ValueError(f"{out} exists already: choose another name, or add --overwrite.")
    cards = panels(file)
    content = {"name": file.name, "panels": cards, "metadata": opened(read_header(file).metadata)}
    pages.write_page(out, TEMPLATE, content)
    problems = sum(len(panel.problems) for panel in cards)
    text = f"{out}: {len(cards)} panels, {problems} thing{'s' * (problems != 1)} missing or wrong"
    return {"out": str(out), "panels": [asdict(panel) for panel in cards], "problems": problems, "text": text}


def opened(metadata: dict[str, str]) -> str:
    """The header's entries as A1111 prints them: JSON, in which objects are opened."""
    entries = {key: _object(value) or value for key, value in metadata.items() if not value.startswith("data:")}
    return json.dumps(entries, indent=2, ensure_ascii=False)


def _a1111(seen: Seen) -> Panel:
    """The card in A1111 and Forge: the .json beside the file first, then kohya's entries of the header."""
    panel = Panel("A1111, Forge", "the Lora tab, and its card's dialog", seen.path.stem)
    sidecar, alias = seen.beside(".json", panel.problems), seen.get("ss_output_name") or seen.path.stem
    weight = sidecar.get("preferred weight") or 0
    panel.badge = _a1111_version(seen, sidecar, panel)
    panel.add("Name", alias, _source(seen, "ss_output_name", "the file's name"), True)
    panel.add("Description", sidecar.get("description"), ".json: description", True)
    panel.add("Preferred weight", weight or "", ".json: preferred weight")
    prompt = f"<lora:{alias}:{weight or 1}> {sidecar.get('activation text') or ''}".rstrip()
    panel.add("Put into the prompt", prompt, "name, preferred weight (else the setting's, 1), activation text")
    for key in ("activation text", "negative text", "notes"):
        panel.add(key.capitalize(), sidecar.get(key), f".json: {key}")
    hashes = f'Lora hashes: "{alias}: {seen.get("sshs_model_hash")[:12]}"' if seen.get("sshs_model_hash") else ""
    panel.add("In the infotext", hashes, "sshs_model_hash")
    panel.problems += _wrong_hash(seen, "sshs_model_hash", "A1111 names its pictures' LoRA by it")
    tags = _tags(seen)
    panel.add(
        "Tags of the training", ", ".join(f"{tag} {count}" for tag, count in tags[:MOST_TAGS]), "ss_tag_frequency"
    )
    for key, label in A1111_TABLE.items():
        panel.add(label, seen.get(key), key)
    _show(panel, seen.preview(A1111_PREVIEWS))
    return panel


def _a1111_version(seen: Seen, sidecar: dict[str, Any], panel: Panel) -> str:
    """The kind of checkpoint that A1111 takes the LoRA for, by the .json, else by the header; adds lines on it.

    A1111 hides LoRAs of another kind than the checkpoint that is loaded.
    """
    names = {*A1111_VERSIONS.values(), UNKNOWN}
    source = ".json: sd version"
    if str(sidecar.get("sd version")) in names:
        version = str(sidecar["sd version"])
    elif seen.get("ss_base_model_version").startswith("sdxl_"):
        version, source = "SDXL", "ss_base_model_version starts with sdxl_"
    elif seen.get("ss_v2") == "True":
        version, source = "SD2", "ss_v2"
    else:
        version = "SD1" if seen.metadata else UNKNOWN
        source = "any metadata, of which none says another" if seen.metadata else "no metadata"
    panel.add("Version", version, source, True)
    right = A1111_VERSIONS.get(seen.family, UNKNOWN)
    shown = next((family_title(family) for family, name in A1111_VERSIONS.items() if name == version), "")
    panel.add("Shown with", f"{shown} checkpoints; hidden with others" if shown else "", "the version")
    if version != right != UNKNOWN:
        panel.problems.append(
            f"A1111 takes it for {version}, but it is a LoRA for {family_title(seen.family)}: it is hidden where it "
            "belongs. Write the sidecars (pcm sidecars --overwrite)."
        )
    return version


def _lora_manager(seen: Seen) -> Panel:
    """The card in ComfyUI Lora-Manager: its .metadata.json beside the file first, then the header."""
    file = f"{seen.path.stem}.metadata.json"
    panel = Panel("ComfyUI Lora-Manager", "its page of LoRAs", seen.path.stem)
    sidecar = seen.beside(".metadata.json", panel.problems)
    panel.title = str(sidecar.get("model_name") or panel.title)
    version = seen.get("ss_base_model_version")
    label = next((text for mark, text in LORA_MANAGER_MODELS.items() if mark in version.lower()), version)
    panel.badge = str(sidecar.get("base_model") or label or UNKNOWN)
    at = lambda key: f".metadata.json: {key}"  # noqa: E731
    panel.add("Model name", panel.title, at("model_name") if sidecar.get("model_name") else "the file's name", True)
    panel.add(
        "Base model", panel.badge, at("base_model") if sidecar.get("base_model") else "ss_base_model_version", True
    )
    panel.add(
        "File name", sidecar.get("file_name") or seen.path.stem, at("file_name") if sidecar else "the file's name"
    )
    panel.add("SHA256", sidecar.get("sha256") or seen.sha256, at("sha256") if sidecar else "the file")
    panel.add("AutoV2", seen.sha256[:10], "SHA256 of the file")
    stored = seen.stored_hash
    panel.add("AutoV3", "" if EMPTY_HASH.startswith(stored[:12]) else stored[:12], _hash_key(seen))
    tips = _object(sidecar.get("usage_tips"))
    for key, value in (tips or {}).items():
        panel.add(f"Usage tip: {key}", value, at("usage_tips"), True)
    trained = sidecar.get("trainedWords") or [tag for tag, _ in _tags(seen)]
    panel.add("Trigger words", _joined(trained), at("trainedWords") + ", else ss_tag_frequency")
    panel.add("Tags", _joined(sidecar.get("tags")), at("tags"), True)
    panel.add("Notes", sidecar.get("notes"), at("notes"))
    panel.add("Description", sidecar.get("modelDescription"), at("modelDescription"))
    panel.problems += _wrong_manager_fields(seen, sidecar, file, tips)
    panel.problems += _wrong_hash(seen, "sshs_model_hash", "AutoV3, by which sites know it, is the first 12 of it")
    preview = Path(str(sidecar["preview_url"])) if sidecar.get("preview_url") else None
    _show(panel, preview if preview and preview.is_file() else seen.preview(LORA_MANAGER_PREVIEWS))
    return panel


def _wrong_manager_fields(seen: Seen, sidecar: dict[str, Any], file: str, tips: dict[str, Any] | None) -> list[str]:
    """Sentences on what is missing or wrong in Lora-Manager's sidecar. file: its name; tips: its usage_tips, read."""
    if not sidecar:
        return []
    problems: list[str] = []
    remedy = "Write it again: pcm sidecars --overwrite."
    if missing := [key for key in LORA_MANAGER_REQUIRED if key not in sidecar]:
        problems.append(f"{file} lacks {', '.join(missing)}, which Lora-Manager requires. {remedy}")
    if sidecar.get("usage_tips") and tips is None:
        problems.append(f"{file}: usage_tips is no JSON object in a string, the only form that is read. {remedy}")
    if sidecar.get("sha256", seen.sha256) != seen.sha256:
        problems.append(f"{file} has another file's sha256: the LoRA was changed after. {remedy}")
    if sidecar.get("preview_url") and not Path(str(sidecar["preview_url"])).is_file():
        problems.append(f"{file} names a preview that is not there, {sidecar['preview_url']}. {remedy}")
    return problems


def _comfyui(seen: Seen) -> Panel:
    """The panel in ComfyUI's own model library: by the header alone, as far as ComfyUI reads one."""
    panel = Panel("ComfyUI", "the model library, with the mouse on the file", seen.path.stem)
    large = seen.header_bytes > MOST_HEADER
    if large:
        panel.problems.append(
            f"The header has {seen.header_bytes} bytes, and ComfyUI reads at most {MOST_HEADER}: nothing is shown but "
            "the file's name. Take its largest entry out (pcm tag --remove)."
        )
    elif not seen.metadata:
        panel.problems.append("The header has no metadata: nothing is shown but the file's name (pcm tag adds some).")
    entries = {label: (None, "") if large else find(seen.metadata, *names) for label, names in LIBRARY.items()}
    values = {label: value for label, (_, value) in entries.items()}
    panel.title = values["Title"] or seen.path.stem
    panel.add("Title", panel.title, entries["Title"][0] or "the file's name", True)
    panel.add("File", seen.path.name, "the file's name", True)
    for label, (key, value) in entries.items():
        if label not in ("Title", "Picture"):
            note = f" ({SEARCHED[label]})" if label in SEARCHED else ""
            panel.add(label, value, (key or LIBRARY[label][0]) + note, label not in SEARCHED)
    panel.problems += [
        f"No {LIBRARY[label][0]}: ComfyUI takes {key} for it, by the end of its name (pcm tag {LIBRARY[label][0]}=...)."
        for label, (key, value) in entries.items()
        if value and key != LIBRARY[label][0]
    ]
    panel.picture = values["Picture"] if DATA_URL.fullmatch(values["Picture"]) else ""
    if values["Picture"] and not panel.picture:
        panel.problems.append(f"{entries['Picture'][0]} is no picture as a data URL (pcm tag --thumbnail PICTURE).")
    elif not panel.picture and not large:
        panel.problems.append("No modelspec.thumbnail: the panel has no picture (pcm tag --thumbnail PICTURE).")
    icon = seen.preview(COMFYUI_PREVIEWS)
    panel.add(
        "Icon", "the picture" if panel.picture else icon.name if icon else "", "the picture, else the preview file"
    )
    has_title = panel.title != seen.path.stem
    panel.shown = has_title or any(
        values[k] for k in ("Author", "Description", "Usage hint", "Trigger phrase", "Picture")
    )
    return panel


def find(metadata: dict[str, str], *names: str) -> tuple[str | None, str]:
    """Look an entry up by the rule of ComfyUI's front end: for each name that entry, else the first that ends so.

    Returns (the entry's name, its text), (None, "") where there is none.
    """
    for name in names:
        key = name if name in metadata else next((key for key in metadata if key.endswith(name)), None)
        if key is not None:
            return key, metadata[key]
    return None, ""


def _modelspec(seen: Seen) -> Panel:
    """The card of programs that follow ModelSpec: its entries of the header."""
    panel = Panel("SwarmUI and others by ModelSpec", "the model's card", seen.get("modelspec.title") or seen.path.stem)
    architecture = seen.get("modelspec.architecture")
    panel.badge = architecture.split("/")[0]
    keys = [key for key in MUST if key != "modelspec.title"] + ["modelspec.hash_sha256"]
    for key in ["title", "author", "description", "usage_hint", "trigger_phrase", "tags", "license", "date"]:
        panel.add(key.replace("_", " ").capitalize(), seen.get(f"modelspec.{key}"), f"modelspec.{key}", key != "date")
    for key in keys:
        panel.add(key.removeprefix("modelspec.").replace("_", " ").capitalize(), seen.get(key), key)
    if missing := [key for key in MUST if not seen.get(key)]:
        panel.problems.append(f"ModelSpec demands {', '.join(missing)}: pcm tag sets them.")
    if architecture and architecture not in ARCHITECTURES:
        panel.problems.append(
            f"modelspec.architecture is {architecture!r}, which other programs do not know; known for these families: "
            f"{', '.join(ARCHITECTURES)}."
        )
    panel.problems += _wrong_hash(seen, "modelspec.hash_sha256", "it says whether the file is whole")
    picture = seen.get("modelspec.thumbnail")
    panel.picture = picture if DATA_URL.fullmatch(picture) else ""
    return panel


def _wrong_hash(seen: Seen, key: str, why: str) -> list[str]:
    """A sentence where the header's hash at `key` is missing or wrong. why: what the hash is for."""
    stored = seen.get(key).removeprefix("0x")
    remedy = "pcm convert writes it anew"
    if not stored:
        return [f"No {key} in the header: {why} ({remedy})."]
    if stored == EMPTY_HASH:
        return [f"{key} is the hash of an empty file, and is passed over ({remedy})."]
    if stored != seen.tensors:
        return [f"{key} is not the hash of the file's tensors: {why} ({remedy})."]
    return []


def _show(panel: Panel, preview: Path | None) -> None:
    """Put the preview on the panel, or a sentence on why there is none."""
    try:
        picture = open_picture(preview) if preview else None
    except ValueError as error:
        panel.problems.append(str(error))
        picture = None
    else:
        if picture is None:
            panel.problems.append("No preview picture beside the file: pcm sidecars --preview PICTURE.")
    panel.add("Preview", preview.name if preview else "", "the first of its names that is there")
    if picture:
        picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        panel.picture = pages.jpeg_url(picture, QUALITY)


def _tags(seen: Seen) -> list[tuple[str, int]]:
    """The training's tags as kohya counts them (`ss_tag_frequency`), with their number, the most frequent first."""
    counts: Counter[str] = Counter()
    for folder in (_object(seen.get("ss_tag_frequency")) or {}).values():
        if isinstance(folder, dict):
            counts.update({str(tag).strip(): n for tag, n in folder.items() if isinstance(n, int)})
    return counts.most_common()


def _object(text: Any) -> dict[str, Any] | None:
    """The JSON object in a string; None for anything else."""
    try:
        value = json.loads(text) if isinstance(text, str) and text.startswith("{") else None
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _joined(words: Any) -> str:
    return ", ".join(map(str, words)) if isinstance(words, list) else str(words or "")


def _source(seen: Seen, key: str, otherwise: str) -> str:
    return key if key in seen.metadata else otherwise


def _hash_key(seen: Seen) -> str:
    return "sshs_model_hash" if seen.get("sshs_model_hash") else "modelspec.hash_sha256"
