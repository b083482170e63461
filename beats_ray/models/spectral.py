"""When and how long the Fourier transforms of the position convolution are; plain numbers, for formulas of memory too.

The convolution itself is in `transformer.py`.
"""

POSITION_CONVOLUTION = "beats_ray: position convolution"
"""What profiles call it."""
SPECTRAL_CLIPS = 4
"""The convolution of so many clips or more goes by its spectrum; of fewer, the kernel's own transform is dearer."""
MULTIPLE = 64


def transform_length(patches: int, taps: int) -> int:
    """Samples of the transforms: what wraps around must meet the zeros before the sequence. A length that is fast."""
    return -(-(patches + taps // 2) // MULTIPLE) * MULTIPLE


def num_frequencies(patches: int, taps: int) -> int:
    """Complex numbers for each channel."""
    return transform_length(patches, taps) // 2 + 1
