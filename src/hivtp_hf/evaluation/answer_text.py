"""When two answers are the same."""

import re

# Goes into config.json, so that the numbers say what they mean.
RULE = "lower case, without blanks at both ends and without blanks and . , ; : ! ? at the end; then equal as a whole"

_AT_THE_END = re.compile(r"[\s.,;:!?]+\Z")


def normalised(answer: str) -> str:
    """An answer as it is compared; two answers are the same where these are equal. Empty for nothing but punctuation."""
    return _AT_THE_END.sub("", answer.lower()).strip()
