"""What samples of comparisons bring besides tokens and masks.

Such a sample is several rows of a batch, one for each text, best first.  The loss mask of a row is on its answer; that
of a row that only fills up a step is off everywhere, and neither it nor its sample counts.
"""

from __future__ import annotations

from engine.model.fields import Field

END = Field("end_SB")                                                    # bool: the last token of the text
MARGIN = Field("margin_B", sequence_dim=None, batch_dim=0)               # fp32: of the sample, on each of its rows
REFERENCE = Field("reference_B", sequence_dim=None, batch_dim=0)         # fp32: log π(answer) under the reference
