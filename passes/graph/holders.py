"""Tensors of the converted graph live in plain modules under their site's name, so that ONNX shows those names."""

from __future__ import annotations

from torch import Tensor, nn
from torch.fx import GraphModule, Node

from ptq4vit_fx.passes.graph.dataflow import adopt_meta


class SiteTensors(nn.Module):
    """The integer codes, scale and zero point of one site: buffers only."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)


def hold(graph_module: GraphModule, path: str, tensors: dict[str, Tensor], *, like: Node) -> list[Node]:
    """Register the tensors under `path` (a site, or a site and a branch) and return get_attr nodes that read them.

    Call inside of `graph.inserting_before`.
    """
    target = path.replace(":", ".")
    graph_module.add_submodule(target, SiteTensors(tensors))
    return [adopt_meta(graph_module.graph.get_attr(f"{target}.{name}"), like, path) for name in tensors]
