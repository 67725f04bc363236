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
from .sampling import PCMSample, PCMSampler, PCMScheduler

NODES: list[type[io.ComfyNode]] = [
    *(PCMLoadLora, PCMScheduler, PCMSampler, PCMSample),
    *(PCMInpaint, PCMOutpaint, PCMColorize, PCMSuperResolution, PCMStroke, PCMDenoise, PCMInterpolate),
    *(PCMInpaintOperator, PCMOutpaintOperator, PCMColorizeOperator, PCMSuperResolutionOperator),
    *(PCMEditSampler, PCMEditDecode),
    *(PCMLoraInfo, PCMStampRecipe),
    *(PCMCompare, PCMCFGSchedule),
    PCMDemoPrompt,
]


class PhasedConsistency(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES


def comfy_entrypoint() -> PhasedConsistency:
    """What the host calls to get the nodes."""
    return PhasedConsistency()
