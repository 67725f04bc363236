"""phased-consistency: ComfyUI nodes and a trainer for few-step images with Phased Consistency Models."""

import importlib.util

WEB_DIRECTORY = "./nodes/web"

# The host imports this folder as a package and has `comfy_api`; the trainer and test collectors do not. (Any folder
# called comfy on the path would pass for `comfy`, and comfy-cli makes one in the home.)
if __package__ and importlib.util.find_spec("comfy_api") is not None:
    from .nodes import comfy_entrypoint as comfy_entrypoint
