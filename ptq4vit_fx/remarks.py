"""What a calibration says about itself unasked: one sentence per kind, however many products it is about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ptq4vit_fx.errors import some_names
from ptq4vit_fx.names import Site, operand_of

#: Signal-to-noise ratio in dB below which an operand is named: a third of its values' size is noise.
WEAK_SNR = 10.0
#: Share of the distance of an output of zeros above which a product is named.
WEAK_SHARE = 0.1


@dataclass(frozen=True)
class Remark:
    """A sentence about some products or operands: what they are, which, and what that means for the user."""

    what: str
    names: tuple[str, ...]
    consequence: str

    def __str__(self) -> str:
        return f"{self.what}: {len(self.names)} ({some_names(self.names)}); {self.consequence}"

    def in_full(self) -> str:
        """Return the sentence with every name."""
        return "\n    ".join([f"{self.what}: {len(self.names)}; {self.consequence}", *self.names])


def remarks(
    snr: Mapping[Site, float], shares: Mapping[str, float], without_gradient: Sequence[str]
) -> tuple[Remark, ...]:
    """Return what deserves a word, weakest first: operands below WEAK_SNR, products above WEAK_SHARE, lost gradients.

    snr: site, or op name for its output -> dB. shares: op name -> distance over that of an output of zeros.
    """
    weak = sorted((value, name) for name, value in snr.items() if operand_of(name) and value < WEAK_SNR)
    lossy = sorted(((share, name) for name, share in shares.items() if share > WEAK_SHARE), reverse=True)
    found = (
        Remark(
            f"operands below {WEAK_SNR:.0f} dB",
            tuple(f"{name} {value:.1f} dB" for value, name in weak),
            "their quantizers lose much of the values; give these products more bits, or leave them float with skip=",
        ),
        Remark(
            f"products with a distance above {WEAK_SHARE:.0%} of their output's energy",
            tuple(f"{name} {share:.0%}" for share, name in lossy),
            "the most likely places of a loss of accuracy; give them more bits, or leave them float with skip=",
        ),
        Remark(
            "products that no gradient of the loss reaches",
            tuple(without_gradient),
            "the model is certain of every calibration image, or the loss does not depend on them; "
            "their scales are chosen by plain squared error",
        ),
    )
    return tuple(remark for remark in found if remark.names)
