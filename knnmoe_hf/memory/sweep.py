"""What a memory is expected to gain and to cost at each threshold of its confidence, as a calibration estimated it."""

from dataclasses import dataclass

from knnmoe_hf.memory.numbers import is_finite


@dataclass(frozen=True)
class SweepPoint:
    """
    One threshold of `confidence="calibrated"`; all layers have the same.

    Attributes:
        threshold: evidence at which the memory is half open, between background text (0) and the references (1).
        gain: expected fall of the NLL of held-out references, in nats per token.
        harm: expected rise of the NLL of background text, in the mean of its kinds, in nats per token.

    Raises:
        ValueError: for numbers that are not finite.
    """

    threshold: float
    gain: float
    harm: float

    def __post_init__(self):
        if not all(map(is_finite, (self.threshold, self.gain, self.harm))):
            raise ValueError(f"the numbers of a SweepPoint are not finite: {self}.")
