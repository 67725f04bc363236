"""The ComfyUI nodes: thin adapters between the host and samplers/. The only code that imports the host."""

from comfy_api.latest import ComfyExtension, io

from .loader import PCMLoadLora
from .sampling import PCMSample, PCMSampler, PCMScheduler

NODES: list[type[io.ComfyNode]] = [PCMLoadLora, PCMScheduler, PCMSampler, PCMSample]


class PhasedConsistency(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES


def comfy_entrypoint() -> PhasedConsistency:
    """What the host calls to get the nodes."""
    return PhasedConsistency()
