"""SentencePiece's BPE as a list of merges, which is how the `tokenizers` library knows BPE."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

__all__ = ["merges_of"]

LONGEST = 512  # characters; longer tokens (a hostile file) are never the result of a merge


def merges_of(tokens: Sequence[str], scores: Sequence[float], vocabulary: Mapping[str, int]) -> list[tuple[str, str]]:
    """SentencePiece's BPE joins the neighbours whose joint token has the best score; as a list of merges, that is every
    way to cut a token into two others, in order of the token's score (equal scores: in order of id; llama.cpp takes the
    leftmost in the text then, which no list of merges can say)."""
    merges = []
    for token in sorted(range(len(tokens)), key=lambda i: (-float(scores[i]), i)):
        text = tokens[token]
        merges += [
            (text[:cut], text[cut:])
            for cut in range(1, len(text) if len(text) <= LONGEST else 0)
            if text[:cut] in vocabulary and text[cut:] in vocabulary
        ]
    return merges
