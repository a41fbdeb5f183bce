"""Rotate residual streams: outlier channels are spread over all channels, and what the model computes stays.

For an orthogonal R that keeps the mean of the channels, a normalization N without weights has N(x R) = N(x) R. What
writes a stream is multiplied by R once and for all, what reads it by R transposed; the weights of norms go into their
readers first, those of LayerScale into the products in front. Rotating activations for quantization: QuaRot,
https://arxiv.org/abs/2404.00456; that R keeps the ones is what LayerNorm needs.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor
from torch.fx import GraphModule, Node

from ptq4vit_fx.names import leaf_of
from ptq4vit_fx.passes.graph.contract import graph_pass
from ptq4vit_fx.passes.graph.dataflow import get_attribute, is_stored, origin, stored_path
from ptq4vit_fx.passes.graph.marks import kind_of
from ptq4vit_fx.passes.graph.norms import Affine, without_weights
from ptq4vit_fx.passes.graph.residual_streams import residual_streams
from ptq4vit_fx.passes.graph.rewriter import Writer, replace
from ptq4vit_fx.passes.graph.rotations import Rotation, ordered_sum, rotation
from ptq4vit_fx.passes.graph.stages import Stage
from ptq4vit_fx.passes.graph.stored_tensors import hold, overwrite, reads_of
from ptq4vit_fx.passes.graph.streams import Stream, described
from ptq4vit_fx.passes.graph.transformed import note
from ptq4vit_fx.plan import Transformed


@dataclass
class _Weights:
    """Values of stored tensors in float64, by their paths: two streams that turn one weight round it but once."""

    graph_module: GraphModule
    exact: dict[str, Tensor] = field(default_factory=dict)

    def __getitem__(self, path: str) -> Tensor:
        known = self.exact.get(path)
        return get_attribute(self.graph_module, path).detach().double() if known is None else known

    def store(self, reads: list[Node], value: Tensor, leaf: str) -> None:
        """Let nodes that read one tensor read another value: in its place, if nobody else reads it."""
        path = stored_path(reads[0])
        if set(reads_of(self.graph_module, get_attribute(self.graph_module, path))) <= set(reads):
            overwrite(self.graph_module, reads, value)
        else:
            path = hold(self.graph_module, path, f"{leaf_of(path)}_{leaf}", value)
            for read in reads:
                read.target = path
        self.exact |= dict.fromkeys(map(stored_path, reads), value)

    def store_bias(self, products: list[Node], value: Tensor) -> None:
        """Give products another bias, in the place of the one that they have alone, if any."""
        reads = [node.args[2] for node in products]
        old = stored_path(reads[0])
        if old and all(is_stored(read) and set(read.users) <= set(products) for read in reads):
            self.store([read for read in reads if isinstance(read, Node)], value, "rotated")
            return
        weight = stored_path(products[0].args[1])
        path = hold(self.graph_module, weight, "bias", value)
        for node in products:
            node.update_arg(2, Writer(node).attribute(path))
        self.exact[path] = value


@graph_pass(before=Stage.CANONICAL, after=Stage.CANONICAL)
def rotate_residual(graph_module: GraphModule, seed: int) -> int:
    """Rotate every residual stream that nothing else reads; return their number, and note the others with the reason.

    seed: of the first stream's R; each further one that is rotated takes the next.
    """
    places = {node: number for number, node in enumerate(graph_module.graph.nodes)}
    weights, rotated = _Weights(graph_module), 0
    streams = list(residual_streams(graph_module))
    if not streams:
        note(graph_module, Transformed("rotation", "model", done=False, note="no residual stream with normalizations"))
    for stream in streams:
        faults = sorted([*stream.faults, *_shared_weights(graph_module, stream)], key=lambda fault: places[fault[0]])
        if faults:
            note(graph_module, Transformed("rotation", stream.name, done=False, note=faults[0][1]))
            continue
        note(graph_module, Transformed("rotation", stream.name, done=True, note=_told(stream)))
        _rotate(graph_module, stream, rotation(stream.width, seed + rotated), weights)
        rotated += 1
    return rotated


def _told(stream: Stream) -> str:
    stored = f" and {len(stream.constants)} stored values" if stream.constants else ""
    written = f"{len(stream.writers)} products{stored} write"
    return f"{stream.width} channels, which {written} and {len(stream.readers)} products read"


def _edit(stream: Stream, product: Node) -> tuple[object, ...]:
    """Return what a stream does to the weight of a product: products that share one need the same."""
    reader, scale = stream.readers.get(product), stream.scales.get(product)
    affine = reader.affine if reader is not None else None
    return (
        stream.writers.get(product),
        scale and scale.path,
        reader and reader.channels,
        affine and (affine.gamma, affine.beta),
    )


def _shared_weights(graph_module: GraphModule, stream: Stream) -> list[tuple[Node, str]]:
    """Return the products whose weight is read by something that needs another one."""
    faults = []
    for product in stream.products:
        tensor = get_attribute(graph_module, stored_path(product.args[1]))
        for read in reads_of(graph_module, tensor):
            users = list(read.users) if read.op == "get_attr" else [read]
            other = [u for u in users if u not in stream.products or _edit(stream, u) != _edit(stream, product)]
            other += [u for u in users if u in stream.products and u.args[1] is not read]
            if other:
                faults.append((product, f"{described(product)} shares its weight with {described(other[0])}"))
                break
    return faults


def _rotate(graph_module: GraphModule, stream: Stream, turning: Rotation, weights: _Weights) -> None:
    products = [node for node in graph_module.graph.nodes if node in stream.products]
    for alike in _by_tensor(graph_module, {product: stored_path(product.args[1]) for product in products}):
        _rewrite(stream, alike, turning, weights)
    for alike in _by_tensor(graph_module, {constant: stored_path(constant) for constant in stream.constants}):
        channels = stream.constants[alike[0]]
        value = turning.turn(weights[stored_path(alike[0])], channels.dim, channels.blocks)
        weights.store(alike, value, "rotated")
    for scale in stream.scales.values():
        factors = [x for x in scale.node.args if isinstance(x, Node) and not is_stored(origin(x))]
        replace(scale.node, factors[0])
    for affine in stream.affines:
        without_weights(graph_module, affine)


def _by_tensor(graph_module: GraphModule, paths: dict[Node, str]) -> list[list[Node]]:
    """Return nodes in groups whose paths lead to one tensor."""
    groups: dict[int, list[Node]] = {}
    for node, path in paths.items():
        groups.setdefault(id(get_attribute(graph_module, path)), []).append(node)
    return list(groups.values())


def _rewrite(stream: Stream, products: list[Node], turning: Rotation, weights: _Weights) -> None:
    """Change the weight that some products share, all alike, and their biases."""
    product = products[0]
    read, bias_read = product.args[1], product.args[2] if kind_of(product) != "matmul" else None
    weight = weights[stored_path(read)]
    bias = weights[stored_path(bias_read)] if is_stored(bias_read) else None
    inner, outer = (0, 1) if kind_of(product) == "matmul" else (1, 0)
    reader, writer = stream.readers.get(product), stream.writers.get(product)
    if reader is not None:
        if reader.affine is not None:
            weight, bias = _absorbed(weight, bias, inner, reader.affine, weights)
        weight = turning.turn(weight, inner, reader.channels.blocks)
    if writer is not None:
        if product in stream.scales:
            factors = weights[stream.scales[product].path].flatten()
            weight = (weight.movedim(outer, -1) * factors).movedim(-1, outer)
            bias = bias * factors if bias is not None else None
        weight = turning.turn(weight, outer, writer.blocks)
        bias = turning.turn(bias, 0, writer.blocks) if bias is not None else None
    weights.store([node.args[1] for node in products if isinstance(node.args[1], Node)], weight, "rotated")
    if bias is not None:
        weights.store_bias(products, bias)


def _absorbed(
    weight: Tensor, bias: Tensor | None, inner: int, affine: Affine, weights: _Weights
) -> tuple[Tensor, Tensor | None]:
    """Return the weight and bias of a product that reads y in place of gamma y + beta."""
    columns = weight.movedim(inner, -1)
    blocks = columns.shape[-1] // affine.size
    if affine.beta and bool((beta := weights[affine.beta].flatten()).any()):
        added = ordered_sum((columns * beta.repeat(blocks)).flatten(1))
        bias = added if bias is None else bias + added
    if affine.gamma:
        columns = columns * weights[affine.gamma].flatten().repeat(blocks)
    return columns.movedim(-1, inner), bias
