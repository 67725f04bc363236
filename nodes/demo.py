"""The node that reads prompts for the bundled demo base, whose text encoders no core node loads."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from comfy_api.latest import io
from torch import Tensor

from ..samplers.emoji_words import EXAMPLES, parse
from .host import menu_of, show, speaking

BASE = Path(__file__).parents[1] / "trainer" / "tiny" / "emoji"
CONTEXT = 4096  # channels of SD3's joint context; those that the two small encoders leave free are zero
TOKENS = 77  # in a prompt, with its start and its end


class PCMDemoPrompt(io.ComfyNode):
    """PCM Demo Prompt: text to CONDITIONING, for the demo base alone."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return speaking(
            node_id="PCMDemoPrompt",
            display_name="PCM Demo Prompt",
            category=menu_of("CLIPTextEncode"),
            description="A demo: reads the prompt for the checkpoint pcm_demo_emoji, which comes with this pack and "
            "draws emoji, and for no other. For your own checkpoints use CLIP Text Encode.",
            search_aliases=["pcm", "demo", "prompt", "text encode", "tiny"],
            is_experimental=True,
            inputs=[
                io.String.Input(
                    "text",
                    multiline=True,
                    default=EXAMPLES[0],
                    tooltip=f"One thing or two on a background, such as '{EXAMPLES[0]}' or '{EXAMPLES[1]}'. Empty for "
                    "a negative prompt. A thing that the demo has not learnt is an error that names the nearest.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    display_name="conditioning",
                    tooltip="For the checkpoint pcm_demo_emoji alone; with any other model the picture is noise.",
                ),
            ],
        )

    @classmethod
    def execute(cls, text: str) -> io.NodeOutput:
        words = check(text)
        lines = [] if words else ["Empty: no prompt, as for a negative."]
        hidden, pooled = encode(words)
        conditioning = [[hidden, {"pooled_output": pooled}]]
        return io.NodeOutput(conditioning, ui=show(cls, [*lines, "Only for the checkpoint pcm_demo_emoji."]))


def check(text: str) -> str:
    """A prompt's words alone, as the demo learnt them. Raises ValueError for words that it has not learnt."""
    parse(text)
    return " ".join(re.findall(r"[^\W_]+", text.lower()))


@torch.no_grad()
def encode(text: str) -> tuple[Tensor, Tensor]:
    """A prompt -> context (1, 77, 4096) and pooled (1, 2048), fp32 on the CPU: the trainer's `SD3.encode_prompts`."""
    hidden = []
    pooled = []
    for tokenizer, encoder in encoders():
        ids = tokenizer(text, padding="max_length", max_length=TOKENS, return_tensors="pt").input_ids
        output = encoder(ids, output_hidden_states=True)
        hidden.append(output.hidden_states[-2])  # the last layer but one, as SD3 is trained on
        pooled.append(output.text_embeds)
    context = torch.cat(hidden, -1)
    return F.pad(context, (0, CONTEXT - context.shape[-1])), torch.cat(pooled, -1)


@cache
def encoders() -> list[tuple]:
    """The demo base's two tokenizers and CLIP text encoders, 0.8 MB, kept for the next run."""
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer  # which the host requires too

    pairs = []
    for suffix in ("", "_2"):
        words = base_part(f"tokenizer{suffix}")
        weights = base_part(f"text_encoder{suffix}")
        tokenizer = CLIPTokenizer.from_pretrained(words, local_files_only=True)
        encoder = CLIPTextModelWithProjection.from_pretrained(weights, local_files_only=True, use_safetensors=True)
        pairs.append((tokenizer, encoder.float().eval()))
    return pairs


def base_part(name: str) -> Path:
    """The path of a file or folder of the base. Raises FileNotFoundError where the pack came without it."""
    if not (BASE / name).exists():
        raise FileNotFoundError(f"The demo base lacks {BASE / name}: install the pack again, whole.")
    return BASE / name
