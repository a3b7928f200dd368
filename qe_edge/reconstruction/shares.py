"""Share of all tokens in an expert's fit, beside the expert's own tokens. It keeps the expert useful for others."""

from __future__ import annotations

GLOBAL_SHARE = 0.05  # in every fit
TRIAL_SHARE = 0.1  # in the short trials that tell a budget what routing gains
FEW_TOKENS = 4  # tokens per rank; an expert with fewer leans on all tokens
FEW_TOKENS_SHARE = 0.5  # and this much
