"""The words of prompts, gathered so that a text can be found among ten million prompts.

Neighbouring prompts of one submission share a row of ``prompt_words``, since those of a bulk submission have most of
their words in common, and a row of ``jobs`` changes too often to carry such an index itself: one of trigrams, or of
each prompt's own words, took about as long as all else of a submission of 50,000. So the index tells which neighbours
hold the words, and ``search`` looks at each of these prompts.

A word is a run of letters and digits, without case; of Chinese, Japanese and Korean each character is one.
"""

import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO
from uuid import UUID

TOGETHER = 100
"""Prompts that share a row."""
MOST_CHARACTERS = 100_000
"""Of the words in a row; Postgres takes no tsvector beyond 1 MB."""
LONGEST_WORD = 40
"""Longer ones are known by their beginning."""
IN_MEMORY_BYTES = 1_000_000
CHUNK_BYTES = 64_000
NULL = r"\N"

_CHARACTERS = "\u2e80-\u2fff\u3005-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = re.compile(rf"[{_CHARACTERS}]|[^\W_{_CHARACTERS}]+")

COPY = "COPY prompt_words (tenant, batch_id, job_id, first_position, last_position, words) FROM STDIN"


def words_of(prompt: str) -> list[str]:
    """Its words in order, each cut to what is kept of it."""
    return [word[:LONGEST_WORD] for word in _WORD.findall(prompt.lower())]


def owner_word(tenant: str) -> str:
    """Stands among the words for whose they are; no prompt has such a word."""
    return f"@{tenant}"


def lexeme(word: str) -> str:
    """As tsvector and tsquery read it."""
    return "'" + word.replace("\\", "\\\\").replace("'", "''") + "'"


@dataclass
class _Row:
    """Of neighbours: the first of them, and their words."""

    job_id: UUID
    first_position: int
    prompts: int = 0
    characters: int = 0
    words: set[str] = field(default_factory=set)

    @property
    def last_position(self) -> int:
        return self.first_position + self.prompts - 1

    @property
    def full(self) -> bool:
        return self.prompts == TOGETHER or self.characters > MOST_CHARACTERS

    def add(self, prompt: str) -> None:
        new = set(words_of(prompt)) - self.words
        self.words |= new
        self.characters += sum(map(len, new))
        self.prompts += 1


class WordRows:
    """The rows for one submission, gathered while its jobs go in, in constant memory; to be copied after them.

    A context: it holds a temporary file.
    """

    def __init__(self, tenant: str, batch_id: UUID | None) -> None:
        self._tenant = tenant
        self._batch_id = batch_id
        self._file = _temporary_file()
        self._row: _Row | None = None

    def __enter__(self) -> "WordRows":
        return self

    def __exit__(self, *_error: object) -> None:
        self._file.close()

    def add(self, job_id: UUID, position: int, prompt: str) -> None:
        """The next job of the submission."""
        self._row = self._row or _Row(job_id, position)
        self._row.add(prompt)
        if self._row.full:
            self._end_row()

    def chunks(self) -> Iterator[str]:
        """All of it as COPY's text; nothing can be added any more."""
        self._end_row()
        self._file.seek(0)
        while chunk := self._file.read(CHUNK_BYTES):
            yield chunk

    def _end_row(self) -> None:
        if self._row is None:
            return
        whose = (NULL, str(self._row.job_id)) if self._batch_id is None else (str(self._batch_id), NULL)
        words = " ".join(map(lexeme, [owner_word(self._tenant), *self._row.words]))
        place = (str(self._row.first_position), str(self._row.last_position))
        fields = map(_escaped, (self._tenant, *whose, *place, words))
        self._file.write("\t".join(fields) + "\n")
        self._row = None


def _temporary_file() -> IO[str]:
    """In memory while it is small."""
    return tempfile.SpooledTemporaryFile(IN_MEMORY_BYTES, "w+", encoding="utf-8", newline="\n")  # WordRows closes it


def _escaped(value: str) -> str:
    """For COPY's text form."""
    if value == NULL:
        return value
    return value.replace("\\", "\\\\").replace("\t", "\\t").replace("\n", "\\n").replace("\r", "\\r")
