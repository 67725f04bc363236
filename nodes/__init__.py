"""The ComfyUI nodes: thin adapters between the host and samplers/. The only code that imports the host."""

from comfy_api.latest import ComfyExtension, io

from .compare import PCMCompare
from .demo import PCMDemoPrompt
from .edit_changing import PCMDenoise, PCMInterpolate, PCMStroke
from .edit_keeping import PCMColorize, PCMInpaint, PCMOutpaint, PCMSuperResolution
from .edit_parts import (
    PCMColorizeOperator,
    PCMEditDecode,
    PCMEditSampler,
    PCMInpaintOperator,
    PCMOutpaintOperator,
    PCMSuperResolutionOperator,
)
from .guidance import PCMCFGSchedule
from .info import PCMLoraInfo, PCMStampRecipe
from .loader import PCMLoadLora
from .model_recipe import PCMRecipe
from .sampling import PCMSample, PCMSampler, PCMScheduler

NODES: list[type[io.ComfyNode]] = [
    # loading and sampling
    PCMLoadLora,
    PCMRecipe,
    PCMScheduler,
    PCMSampler,
    PCMSample,
    # editing, one node an edit
    PCMInpaint,
    PCMOutpaint,
    PCMColorize,
    PCMSuperResolution,
    PCMStroke,
    PCMDenoise,
    PCMInterpolate,
    # editing in parts, for core custom sampling
    PCMInpaintOperator,
    PCMOutpaintOperator,
    PCMColorizeOperator,
    PCMSuperResolutionOperator,
    PCMEditSampler,
    PCMEditDecode,
    # LoRA files
    PCMLoraInfo,
    PCMStampRecipe,
    # trying out
    PCMCompare,
    PCMCFGSchedule,
    PCMDemoPrompt,
]


class PhasedConsistency(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES


def comfy_entrypoint() -> PhasedConsistency:
    """The pack's extension; the host calls this to get the nodes."""
    return PhasedConsistency()
