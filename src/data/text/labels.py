"""Labels, which a recognizer outputs: the characters of the training texts, or tokens of a BPE trained on them.

Both are tokenizers (`data.tokenizers`), kept as tokenizer.json; the end of a text serves as CTC's blank.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from stoker.data.text.corpus import END_OF_TEXT
from stoker.data.text.tokenizers import Tokenizer, from_json, open_tokenizer

KINDS = ("chars", "bpe")
T = TypeVar("T")


def open_labels(kind: str, vocab_size: int, train: Sequence[str]) -> Tokenizer:
    """`chars`, `bpe` of `vocab_size` tokens, or the path of a tokenizer.json. Raises UserError."""
    if kind == "chars":
        return from_json("chars", _characters(train))
    return open_tokenizer(kind, vocab_size, list(train))


def _characters(texts: Sequence[str]) -> str:
    """A tokenizer.json with one id a character; those that are not in the texts are passed over."""
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models

    letters = [*sorted(set().union(*texts)), END_OF_TEXT]
    library = Library(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    library.decoder = decoders.Fuse()
    library.add_special_tokens([END_OF_TEXT])
    return library.to_str(pretty=True)


def unspelled(tokenizer: Tokenizer, texts: Iterable[str]) -> list[str]:
    """Characters of texts that have no label; blanks are left out."""
    letters = [letter for letter in sorted(set().union(*texts)) if letter.strip()]
    return [letter for letter, ids in zip(letters, tokenizer.encode_batch(letters)) if tokenizer.decode(ids) != letter]


def most_labels(tokenizer: Tokenizer, length: int) -> int:
    """Of a text of so many characters: where labels are not characters they may be bytes, up to four to one."""
    spelled = [tokenizer.decode([label]) for label in range(tokenizer.vocab_size) if label != tokenizer.end_of_text]
    return length if all(len(each) == 1 and each != "\ufffd" for each in spelled) else 4 * length


def aligned_length(labels: Sequence[int]) -> int:
    """The fewest frames, or columns, to which CTC can put labels: one for each, and one for a blank between two that
    are the same (Graves et al. 2006)."""
    return len(labels) + sum(a == b for a, b in zip(labels, labels[1:]))


def words(tokenizer: Tokenizer, labels: Sequence[tuple[int, T]]) -> Iterator[tuple[str, list[T]]]:
    """Ids with something about each -> the words they spell, with what belongs to the ids of each.

    A word begins at an id that spells a blank or begins with one; what belongs to a blank alone is left out.
    """
    ids, things = list[int](), list[T]()
    for label, thing in [*labels, (None, None)]:
        if label is None or tokenizer.decode([label]).startswith(" "):
            if word := tokenizer.decode(ids).strip():
                yield word, things
            ids, things = [], []
        if label is not None and thing is not None:
            ids.append(label)
            things += [thing] if tokenizer.decode([label]).strip() else []
