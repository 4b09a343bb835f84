"""Seeds that follow from what they are for, so that nothing random needs saved state."""

import numpy as np


def derive_seed(*parts: int) -> int:
    """A seed below 2**63 from whole numbers >= 0 (run seed, step, rank, ...); other parts, unrelated seed."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)
