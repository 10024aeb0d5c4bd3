"""How fast text becomes tokens, by tokenizer, beside the `tokenizers` library on the same text.

    python benchmarks/tokenization.py

On 10 MB of text made here, or on that of `--dataset PATH`, a text file or a folder of them. All cores, the median of
three, ours and the library in turn; reading the text, training the bpe and writing the tokens are not counted. A
vocabulary whose files cannot be had is left out. Uses a folder of its own.
"""

import argparse
import os
import random
from tempfile import TemporaryDirectory

import rig
import tokenizers as library

from stoker.config import UserError
from stoker.data.text import corpus, tokens, vocabularies
from stoker.data.text.tokenizers import open_tokenizer

KINDS = ("bpe", "gpt2", "gpt4", "gpt4o")
MEGABYTES = 10


def made_up() -> list[str]:
    """Documents of words that are as unevenly frequent as those of a language."""
    draw = random.Random(0)
    documents: list[str] = []
    words = ["".join(draw.choices("etaoinshrdlucmfwypvbgkjqxz", range(26, 0, -1), k=draw.randint(2, 9)))
             for _ in range(30_000)]
    shares = [1 / rank for rank in range(1, len(words) + 1)]
    while sum(map(len, documents)) < MEGABYTES * 1e6:
        sentences = (" ".join(draw.choices(words, shares, k=12)).capitalize() + "." for _ in range(500))
        documents.append(" ".join(sentences))
    return documents


def row(kind: str, documents: list[str]) -> str:
    try:
        ours = open_tokenizer(kind, 32_000, documents)
    except UserError as error:
        return f"{kind:6s} left out: {error}"
    theirs = library.Tokenizer.from_str(ours.to_json())
    parts = [texts for _, (texts, _) in tokens._batches(documents)]
    seconds = rig.median_seconds({
        "ours": lambda: [ours.encode_batch(texts) for texts in parts],
        "theirs": lambda: [theirs.encode_batch_fast(texts, add_special_tokens=False) for texts in parts],
    }, rounds=3)
    size = sum(len(document.encode()) for document in documents) / 1e6
    return (f"{kind:6s} {ours.vocab_size:>7,} {size / seconds['ours']:6.1f} MB/s   "
            f"{seconds['theirs'] / seconds['ours']:4.1f} x the library's {size / seconds['theirs']:.1f} MB/s")


def main() -> None:
    asked = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    asked.add_argument("--dataset", help="a text file, or a folder of text files", metavar="PATH")
    dataset = asked.parse_args().dataset
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(vocabularies.folder()))
    with TemporaryDirectory() as folder:
        os.environ["STOKER_HOME"] = folder
        documents = corpus.documents(dataset).train if dataset else made_up()
        print(f"{sum(map(len, documents)) / 1e6:.1f} M characters, documents: {len(documents):,}")
        for kind in KINDS:
            print(row(kind, documents), flush=True)


if __name__ == "__main__":
    main()
