"""What is behind an exception of torch or of the user's model: the line of it that says so, where, and what helps."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from ptq4vit_fx.errors import PTQError, failure
from ptq4vit_fx.passes.graph.batch_limits import BatchLimits
from ptq4vit_fx.passes.graph.places import frames_of, place_of

ANSI = re.compile(r"\x1b\[[0-9;]*m")
#: Lines of torch's messages that say nothing about the cause.
ASIDE = re.compile(
    r"For more information|Constraints violated|Suggested fixes|The error above|TORCH_LOGS|While executing|draft_export"
)
LONGEST = 300


@dataclass(frozen=True)
class Cause:
    """A kind of exception: what its text has, what was expected instead, and what helps."""

    pattern: str
    expected: str
    do: str


SIZE = Cause(
    r"doesn't match model|must match the size|shape mismatch|invalid for input"
    r"|must match except in dimension|[Ss]izes of tensors must match|Kernel size can't be greater|divisible"
    r"|out of range|size mismatch|Input (image )?(height|width|size)",
    "a size that the model accepts",
    "use the model's input size, or create it with img_size=",
)
#: In their order: the first whose pattern is in the text.
RUNNING = (
    Cause(
        r"to have \d+ channels|expected input\[.*\] to have|channel dimension|[Cc]hannels? .*(match|expected)",
        "as many channels as the model has",
        "pass images of that many channels, or create the model for yours (in_chans=, num_channels=)",
    ),
    Cause(
        r"OutOfMemoryError|out of memory|not enough memory|MemoryError|allocate memory",
        "memory for one forward",
        "pass a smaller example, or move the model to a device with more memory",
    ),
    Cause(
        r"ImportError|ModuleNotFoundError|requires the .* library",
        "what the model imports",
        "install that package",
    ),
    Cause(
        r"same device|device mismatch|on device|Input type .*cuda",
        "a model and tensors on one device",
        "move the whole model with .to(device), and create tensors of the forward with device=x.device",
    ),
    Cause(
        r"(expected|indices) to have .*(Long|Int)|scalar types?: Long|index.* must be .*(long|int)",
        "integers",
        "pass that input as torch.int64",
    ),
    Cause(
        r"same dtype|expected (scalar )?type|bias type|expected m1 and m2|[Hh]alf|BFloat16|must have the same dtype"
        r"|got .*c10::|not implemented for '(Byte|Char|Short|Int|Long|Bool)'",
        "one floating-point type throughout: weights and images are float32 here",
        "take casts to another type (half(), to(torch.float16)) out of the forward, and pass images as floats",
    ),
    Cause(
        r"Expected \d+D .*input|got \d+D|[Dd]imension out of range|not enough values to unpack|too many values"
        r"|number of dim|dimensions? .*(expected|required)|must be \d-?[dD]",
        "as many dimensions as the model takes",
        "pass a batch: (batch, channels, height, width) for images",
    ),
    Cause(
        r"cannot be multiplied|Given normalized_shape",
        "operands whose widths fit",
        "make that layer as wide as what it reads, or use the model's input size",
    ),
    SIZE,
    Cause(
        r"'forward' function|\"forward\" function",
        "a model with a forward",
        "define forward, or pass the module that has one",
    ),
    Cause(
        r"missing \d+ required|unexpected keyword|takes \d+ positional|You (must|have to) specify|required argument",
        "the inputs that forward needs",
        "pass one tensor per parameter, in their order, or a mapping from their names",
    ),
)
RAISES = Cause("", "a model that runs on the example", "run model(example) in evaluation mode and mend what it raises")


def cause_of(text: str, causes: Sequence[Cause], otherwise: Cause) -> Cause:
    """Return the first cause whose pattern is in the text."""
    return next((cause for cause in causes if re.search(cause.pattern, text)), otherwise)


def said(error: BaseException) -> str:
    """Return `Type: the line that says what happened`, whole, without colours."""
    lines = [line.strip(" -\t") for line in ANSI.sub("", str(error)).splitlines()]
    telling = [line for line in lines if line and not ASIDE.search(line)] or [line for line in lines if line]
    text = " ".join(telling[0].split()) if telling else ""
    if len(text) > LONGEST:
        text = text[:LONGEST].rsplit(" ", 1)[0] + " ..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


BATCH = Cause(
    r"specialized it to be a constant|Constraints violated|unhashable type: .*SymInt",
    "a forward for any batch size",
    "count images with x.shape[0], and compute on whole batches instead of image by image",
)
#: What BATCH is, where the place is known: the first whose pattern is in it.
PIECES = Cause(
    r"\b(tensor_|[hv]|d)?(split|chunk|unbind)\(",
    "a forward for any batch size",
    "compute on the whole batch instead of pieces of it",
)
CONDITION = Cause(
    "",
    "the same computation for any batch size",
    "leave the condition on the number of images out of that line, or decide it outside of the model",
)
VMAP = Cause(
    r"\b(vmap|jacrev|jacfwd|hessian|vjp|jvp)\(|vmapped|functorch|torch[.]func[.]|transform API must be Tensor",
    "a forward without torch.vmap and the other transforms of torch.func",
    "compute on whole batches: the layers of a model take them",
)
BATCHES = (BATCH, VMAP, PIECES, CONDITION)
VALUES = Cause(
    r"control flow|Proxy|data-dependent|DataDependent|symbolically traced|[.]item\(\)|[.]tolist\(\)",
    "a forward without control flow that depends on tensor values",
    "rewrite that line without the dependence (torch.where takes both ways), move it into a function registered with "
    "torch.fx.wrap, or keep its module closed with leaf_modules=",
)
NUMPY = Cause(
    r"numpy|np[.]ndarray",
    "a forward that computes with torch",
    "compute with torch what that line computes with NumPy, or keep its module closed with leaf_modules=",
)
ITERATION = Cause(
    r"Proxy object cannot be iterated",
    "a forward that goes through its inputs as tensors",
    "take one tensor per input where the line takes a list of them, and compute on it whole; or keep its module closed "
    "with leaf_modules=",
)
TYPE = Cause(
    r"[Uu]nexpected type .*Proxy|Proxy.*(should|must) be|should be .*(Tensor|PIL).*Proxy",
    "a forward that does not look at the type of its tensors",
    "leave the check of the type out of that line (of torchvision's transforms, those of v2 do without), or keep its "
    "module closed with leaf_modules=",
)
#: Exceptions of tracers, in their order.
TRACING = (
    VMAP,
    BATCH,
    ITERATION,
    TYPE,
    Cause(
        r"[Ff]ake impl|Unsupported|meta kernel|not implemented for Meta|'Meta' (device|backend)",
        "operators that torch.export knows the shapes of",
        "register one with torch.library.register_fake, or keep its module closed with leaf_modules=",
    ),
    Cause(
        r"too many nested parentheses",
        "modules with numbers as names, nested at most about 200 deep, as Python writes each with a bracket",
        "give those modules names (a class with attributes in the place of nn.Sequential), or nest them less deep",
    ),
    NUMPY,
    VALUES,
    *RUNNING,
)
UNTRACEABLE = Cause(
    "",
    "a forward that torch.fx or torch.export traces",
    "rewrite that line, or keep its module closed with leaf_modules=",
)
DIFFERS = Cause(
    "",
    "a graph that computes what the model computes",
    "leave out of the forward what depends on more than its inputs (counters, caches, the type of a tensor)",
)


@dataclass(frozen=True)
class Failed:
    """Why a tracer gave no graph: where, what was got, the kind of cause, the exception if there was one."""

    where: str
    got: str
    cause: Cause
    error: BaseException | None = None

    @staticmethod
    def differing(model: nn.Module, difference: str) -> Failed:
        """Return the failure of a graph that computes something else."""
        return Failed(type(model).__name__, difference, DIFFERS)


def failed(error: BaseException, model: nn.Module, limits: BatchLimits[str] | None = None) -> Failed:
    """Return why `error` stopped a tracer; limits: where the batch could not be any number, if that was watched."""
    text = f"{type(error).__name__}: {ANSI.sub('', str(error))}"
    cause = cause_of(text, TRACING, UNTRACEABLE)
    if cause is BATCH and limits and limits.first:
        where = limits.first
        if limits.constants:
            got = "a number of images that the line takes for a constant"
            return Failed(where, got, cause_of(where, (VMAP, PIECES), BATCH), error)
        return Failed(where, "a condition on the number of images", cause_of(where, (VMAP, PIECES), CONDITION), error)
    return Failed(place_of(frames_of(error), model), said(error), cause, error)


#: Causes of the second tracer that may be another's consequence: the first one tells more.
LATE = (VALUES, UNTRACEABLE, DIFFERS)


def neither(last: Failed, first: Failed | None) -> PTQError:
    """Return the error of a model that no tracer gets through; what names the cause is told first."""
    main, other = last, first
    if first is not None and (first.cause is VMAP or (last.cause in LATE and first.cause is not DIFFERS)):
        main, other = first, last
    if (
        main.cause is VALUES and last.cause is DIFFERS
    ):  # torch.export cannot pass a branch on values, one on sizes it can
        main = replace(main, cause=CONDITION)
    error = failure("trace", main.where, expected=main.cause.expected, got=main.got, do=main.cause.do)
    if other is None:
        return error
    name = "torch.export" if other is last else "torch.fx"
    return PTQError(f"{error} ({name} does not get through either: {other.got.split('. ')[0]})")


def rejected(model: nn.Module, inputs: Sequence[Tensor], error: BaseException) -> PTQError:
    """Return the error of a model that raises on the example: what, in which module and line, and what helps."""
    got = said(error)
    cause = cause_of(f"{type(error).__name__}: {error}", RUNNING, RAISES)
    shapes = ", ".join(f"{tuple(x.shape)}" for x in inputs)
    where = place_of(frames_of(error), model)
    return failure(
        "prepare_fx",
        f"example_inputs of shape {shapes}, in {where}",
        expected=cause.expected,
        got=got,
        do=cause.do,
    )
