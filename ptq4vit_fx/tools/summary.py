"""The end of `ptq4vit quantize`: what was written and how good it is, in twenty lines, and the numbers behind them."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ptq4vit_fx.errors import printable
from ptq4vit_fx.export.onnx_export import ExportReport
from ptq4vit_fx.export.proof.against_float import BOUND, AgainstFloat
from ptq4vit_fx.export.proof.latency import Latency
from ptq4vit_fx.export.proof.verify import VerifyReport
from ptq4vit_fx.export.targets import TARGETS
from ptq4vit_fx.export.traps import SATURATION
from ptq4vit_fx.tools.runtimes import made_for

#: Columns of a terminal, and those of the word that a line starts with.
WIDTH, INDENT = 80, 12

#: Why a file of weights of 4 bits may be slower than float.
PACKED = "no CPU multiplies weights of 4 bits with activations of 8"


@dataclass(frozen=True)
class Summary:
    """What a run of `ptq4vit quantize` has written and measured.

    bits: of weights and activations; set_apart: products that have others. images: of the calibration; skipped: `path:
    reason` of those that it could not read; seconds: it took. why_seen: why the images of the comparison are those of
    the calibration, "" if they are not. float_file: the float model's file, None if it was not kept; float_bytes: of
    that file, or of its weights. expensive: product -> share of the distance of all products. flags: options that would
    help. warnings: those on the way. phases: seconds of each. report: the page that was written. file_batch: the only
    number of images that the file takes, None of any. left_float: products that are multiplied in float;
    weights_alone: those whose weight is quantized, beside float activations.
    """

    model: str
    bits: tuple[int, int]
    products: int
    sites: int
    images: int
    skipped: tuple[str, ...]
    seconds: float
    exported: ExportReport
    verified: VerifyReport
    against: AgainstFloat
    latency: Latency | None
    float_bytes: int
    float_file: str | None = None
    why_seen: str = ""
    why_no_latency: str = ""
    expensive: dict[str, float] = field(default_factory=dict)
    flags: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    phases: Mapping[str, float] = field(default_factory=dict)
    set_apart: int = 0
    report: str | None = None
    file_batch: int | None = None
    left_float: int = 0
    weights_alone: int = 0

    def complaints(self) -> tuple[str, ...]:
        """Return what the user must know first, a sentence each; nothing of a file that is as good as float."""
        found = []
        if not self.against.ok():
            found.append(f"worse than float: {self.against.headline()}, below {BOUND:.0%}; {self._advice()}")
        if not self.verified.ok:
            same = self.verified.same_functions
            found.append(
                f"the file does not compute what was simulated: the same class on {same.agreement:.1%} of "
                f"{same.images} images, bit-equal on {same.bit_equal:.1%}; see --verbose"
            )
        if self.verified.saturating:
            found.append(
                "this CPU has no VNNI: its default u8 x s8 kernels saturate, the same class on "
                f"{self.verified.default_agreement:.1%} of the images; for such CPUs take --target onnxruntime-avx2, "
                "or --w-bits 7"
            )
        return tuple(map(printable, found))

    def _advice(self) -> str:
        costly = ", ".join(f"{name} {share:.0%}" for name, share in self.expensive.items())
        told = f"most of the distance: {costly}; " if costly else ""
        skipping = f"--skip {shlex.quote(next(iter(self.expensive)))}" if self.expensive else ""
        return f"{told}try {', '.join(flag for flag in (*self.flags, skipping) if flag)}"

    def refusal(self, bound: float) -> str:
        """Return the sentence of a file that is worse than the user's bound."""
        kept = f"the file is kept: {self.exported.path}"
        return f"quantize: --fail-under: expected {bound:.1%} or more, got {self.against.score:.1%}; {kept}"

    def lines(self) -> tuple[str, ...]:
        """Return the report, of at most WIDTH columns but for long paths."""
        report, against = self.exported, self.against
        seen = (
            "images that calibration has not seen" if against.unseen else f"calibration's own images: {self.why_seen}"
        )
        same = self.verified.same_functions
        exact = f"bit-equal on {same.bit_equal:.1%} of {same.images} images"
        size = f"{report.bytes / 1e6:.2f} MB (float {self.float_bytes / 1e6:.2f} MB)"
        bits = f"W{self.bits[0]}A{self.bits[1]}{f', {self.set_apart} with --set' if self.set_apart else ''}"
        read = f"{self.images} images ({len(self.skipped)} skipped)"
        rows = [("float", against.headline()), ("", seen), *(("", line) for line in against.lines(most=1)[1:])]
        rows += [
            ("speed", self.why_no_latency if self.latency is None else str(self.latency)),
            *([("", f"{PACKED}: --a-bits 32 leaves these float")] if self._slow_and_packed() else []),
            ("simulation", f"{'the file computes it' if self.verified.ok else 'NOT what the file computes'}: {exact}"),
            *([("", f"{self._floats()}, whose last bits differ")] if self._floats() and same.bit_equal < 1 else []),
            *([("", self.verified.on_pixels)] if self.verified.on_pixels else []),
            ("file", str(report.path)),
            ("", f"{size}, opset {report.opset}, target {report.target}{self._only_batch()}"),
            ("runtime", made_for(report.target)),
            ("quantized", f"{self.products} products, {self.sites} sites, {bits}, {read}"),
            *([("", self._floats())] if self._floats() else []),
            ("", f"calibrated in {self.seconds:.1f} s"),
            *(("trap", str(trap)) for trap in self.verified.traps if trap.name != SATURATION.name),
        ]
        if self.report is not None:
            rows.append(("report", self.report))
        if self.warnings:
            rows.append(("warnings", f"{len(self.warnings)} on the way, above"))
        lines = [line for word, text in rows for line in wrapped(word, printable(text))]
        evaluate, inspect = (printable(command) for command in self.next_commands())  # whole, to be copied
        return (*lines, f"{'next':{INDENT}}{evaluate}", f"{'':{INDENT}}{inspect}")

    def _slow_and_packed(self) -> bool:
        """Whether the file is slower than float, and holds weights of 4 bits beside activations with codes."""
        slow = self.latency is not None and self.latency.ratio < 1
        packed = TARGETS[self.exported.target].packed(self.exported.opset)
        return slow and self.bits[0] <= packed and not self.weights_alone

    def _floats(self) -> str:
        counts = ((self.left_float, "left float"), (self.weights_alone, "with float activations"))
        return ", ".join(f"{count} product{'s' if count > 1 else ''} {what}" for count, what in counts if count)

    def _only_batch(self) -> str:
        return "" if self.file_batch is None else f", takes batches of {self.file_batch} only"

    def next_commands(self) -> tuple[str, str]:
        """Return the commands to go on with."""
        path = shlex.quote(str(self.exported.path))
        against = f" --against {shlex.quote(self.float_file)}" if self.float_file is not None else ""
        return f"ptq4vit eval {path} --data LABELLED{against}", f"ptq4vit inspect {path}"

    def in_full(self) -> str:
        """Return everything that is known of the file: what each step wrote, parity layer by layer, every operator."""
        seconds = ", ".join(f"{name} {taken:.1f}" for name, taken in self.phases.items())
        parts = (self.exported, *self.exported.rewrites, self.verified, self.against, f"seconds: {seconds}")
        return "\n".join(map(str, parts))

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers behind every line, JSON-ready."""
        figures = {entry: getattr(self, entry) for entry in self.__dataclass_fields__}
        return figures | {
            "bits": {"weights": self.bits[0], "activations": self.bits[1]},
            "exported": asdict(self.exported) | {"path": str(self.exported.path)},
            "verified": self.verified.to_dict(),
            "against": self.against.to_dict(),
            "latency": None if self.latency is None else self.latency.to_dict(),
            "runtime": made_for(self.exported.target),
            "complaints": self.complaints(),
            "next": self.next_commands(),
        }


def wrapped(word: str, text: str) -> list[str]:
    """Return a line behind the word that it starts with, in as many lines as it takes; paths stay whole."""
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=f"{word:{INDENT}}",
        subsequent_indent=" " * INDENT,
        break_long_words=False,
        break_on_hyphens=False,
    )
