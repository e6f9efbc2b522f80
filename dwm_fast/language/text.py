"""Text that Python itself ships: the topics of `help()`, that is parts of its language reference, letter by letter."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

SOURCE = "Python's pydoc topics (parts of its language reference), letters as tokens"
_HELD_OUT = 10


class Text:
    """The topics as numbers of letters; every tenth topic is held out.

    Attributes:
        letters: the vocabulary, in the order of its numbers. train, test: int64 (letters of the text,).
    """

    def __init__(self) -> None:
        from pydoc_data.topics import topics

        pages = [topics[name] for name in sorted(topics)]
        self.letters = sorted(set("".join(pages)))
        number = {letter: i for i, letter in enumerate(self.letters)}
        parts: tuple[list[int], list[int]] = ([], [])
        for i, page in enumerate(pages):
            parts[i % _HELD_OUT == 0].extend(number[letter] for letter in page)
        self.train, self.test = (torch.tensor(part) for part in parts)

    def batches(self, epoch: int, count: int, rows: int, length: int) -> Iterator[tuple[Tensor, Tensor]]:
        """`count` batches of random pieces of the training text and their next letters; the same for the same epoch."""
        generator = torch.Generator().manual_seed(epoch)
        for _ in range(count):
            starts = torch.randint(len(self.train) - length - 1, (rows,), generator=generator)
            pieces = torch.stack([self.train[s : s + length + 1] for s in starts.tolist()])
            yield pieces[:, :-1], pieces[:, 1:]

    def held_out(self, pieces: int, length: int) -> tuple[Tensor, Tensor]:
        """Evenly spaced pieces of the held-out text and their next letters."""
        starts = torch.linspace(0, len(self.test) - length - 2, pieces).long()
        rows = torch.stack([self.test[s : s + length + 1] for s in starts.tolist()])
        return rows[:, :-1], rows[:, 1:]
