"""Peak and memory of the devices that a plan can be made for."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """Dense bf16 peak in FLOP/s, and memory in bytes, according to the vendor's data sheet."""

    peak: float
    memory: float


DEVICES = {
    "a100": Device(312e12, 80e9),
    "h100": Device(989e12, 80e9),
    "h200": Device(989e12, 141e9),
    "rtx4090": Device(165e12, 24e9),
}
