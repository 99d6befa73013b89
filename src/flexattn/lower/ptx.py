"""PTX that NVIDIA's assembler translates as it is written.

In: PTX from Triton. Out: PTX of the same meaning, without what ptxas gets wrong.

ptxas 12.8 to 13.1 makes one instruction, VIMNMX3, of max(max(x, -y), z) on Hopper and later GPUs,
and loses the minus; likewise of minima. It does so for every way to write a negation but ~y + 1.
"""

from __future__ import annotations

import re

_NEGATION = re.compile(r"^(\s*)neg\.s(16|32)(\s+)(%\w+), (%\w+);", re.MULTILINE)
_BY_COMPLEMENT = r"\1not.b\2\3\4, \5;\n\1add.s\2\3\4, \4, 1;"


def assembled_rightly(text: str) -> str:
    """The text with integers of up to 32 bits negated by their complement.

    Examples:
        >>> print(assembled_rightly("neg.s32 %r2, %r1;"))
        not.b32 %r2, %r1;
        add.s32 %r2, %r2, 1;
    """
    return _NEGATION.sub(_BY_COMPLEMENT, text)
